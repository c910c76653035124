"""Entmax on the kernels of the others, and one of its own that finds the levels: kernels/levels.py.

    p_j = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)),   tau such that sum_j p_j = 1

With tau at hand a weight is a function of its score alone: the forward pass takes it as one that nothing divides. With
r_j = p_j^(2 - alpha) the gradient of s_j is r_j (dp_j - sum_l r_l dp_l / sum_l r_l): r is that function's derivative,
and the mean comes of sum_l r_l v_l / sum_l r_l, which a softmax of the scores log r gives.

Peters, Niculae, Martins. "Sparse Sequence-to-Sequence Models." 2019. arXiv:1905.05702. Levels found on the way through
the keys: Goncalves, Treviso, Martins. "AdaSplash." 2025. arXiv:2502.12082.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import position_operands
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import backward, forward
from manyheads.engines.triton.hopper.given_levels import (
    ENTROPIES,
    LEAST,
    SLOPES,
    TAU,
    by_alpha,
    entropies,
    given_levels,
    power_of,
    scaled,
    slopes,
    weights,
)
from manyheads.engines.triton.hopper.kernels import levels
from manyheads.engines.triton.hopper.launching import SIZES, STEPS, Kernel, descriptor, places, source_of
from manyheads.engines.triton.hopper.tables import EVERY, Table, steps_of, table_of

ENOUGH = 2.0**-14  # as in kernels/levels.py
LEVELS = Kernel(
    levels, "levels",
    (
        "q_desc", "k_desc", "level", "ahead", "powers", "q_at", "kv_at", "table", *STEPS, *SIZES, "scale",
        "STAGES: tl.constexpr", "KIND: tl.constexpr", "MASKED: tl.constexpr", "POSITIONS: tl.constexpr",
        "FIRST: tl.constexpr", "POWER: tl.constexpr",
    ),
    (*STEPS, *SIZES), ("mask", "score"),
)  # fmt: skip


def why_not(form: Scores, x: Inputs) -> str | None:
    if isinstance(x.q_positions, Tensor):
        return "the Hopper kernels find levels of entmax for consecutive queries, not for positions in a tensor"
    if not isinstance(form.alpha, str) and not 1 + LEAST <= (form.alpha or 0) <= 2:
        return f"the Hopper kernels take entmax with an alpha from {1 + LEAST:g} to 2, not {form.alpha}"
    read = *form.program.tensors, *(x.operands[name] for name in form.program.operand_names)
    if torch.is_grad_enabled() and any(t.requires_grad for t in read):
        return "the Hopper kernels give no gradients to what the scores of entmax read"
    if form.program.tensors and torch.compiler.is_compiling():  # a graph brings its own, the functions keep theirs
        return "under torch.compile the Hopper kernels take no entmax whose scores or masks captured tensors"
    return None


def run(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    """o and tau, float32 [batch, heads, q_len]."""
    tau = levels_of(form, x)
    return _forward(form, weights, _with(x, {TAU: tau}))[0], tau


def gradients(
    form: Scores, x: Inputs, tau: Tensor, do: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv; None for those that are not needed."""
    y = _with(x, {TAU: tau})
    mean, _ = _forward(form, slopes, y)
    return backward.run(given_levels(form, weights, _first(x)), y, mean, tau, do, None, needed)


def alpha_gradient(form: Scores, x: Inputs, tau: Tensor, do: Tensor) -> Tensor:
    """Of an alpha that is an operand, float32 [heads]. Correia, Niculae, Martins. "Adaptively Sparse Transformers."
    2019. arXiv:1909.00015."""
    assert isinstance(form.alpha, str)
    y = _with(x, {TAU: tau})
    sums = {SLOPES: _forward(form, slopes, y)[1], ENTROPIES: _forward(form, entropies, y)[1]}
    change, _ = _forward(form, by_alpha, _with(y, sums))
    found = torch.linalg.vecdot(change.float(), do.float()).sum((0, 2))
    return torch.where(x.operands[form.alpha] - 1 > LEAST, found, 0.0)


def levels_of(form: Scores, x: Inputs) -> Tensor:
    """tau, float32 [batch, heads, q_len]; inf for queries that see no key."""
    tau = torch.full(x.q.shape[:3], math.inf, dtype=torch.float32, device=x.q.device)
    if not (x.q.numel() and x.k.numel()):
        return tau
    product = scaled(form)
    keys, stages, _ = forward.tiling_of(product, x)
    operands = position_operands(product, x)
    source = source_of(product, x, ("mask", "score"))
    arguments = source.arguments(x.q.device, **operands)
    table = table_of(product.program, x, (forward.QUERIES, keys), operands)
    kind, values = table or Table(EVERY, tau)
    shape = x.batch, x.heads, cdiv(x.q_len, forward.QUERIES)
    ahead = torch.empty(math.prod(shape), 2, dtype=torch.int32, device=x.q.device)
    at, starts, steps = places((x.q_positions, x.kv_positions), x.q_len, x.kv_len, x.q.device)
    power = power_of(form).known
    powers = None if power else 1 / _above(form, x)
    own = (
        descriptor(x.q, forward.QUERIES // 2), descriptor(x.k, keys), tau, ahead, powers, *at, values,
        *steps_of(table, shape), x.heads, x.heads // x.kv_heads, x.q_len, x.kv_len, *starts, *steps, float(x.scale),
        stages, kind, table is not None or x.kv_len % keys != 0, at[0] is not None,
    )  # fmt: skip
    with torch.cuda.device_of(x.q):
        for look in range(1 + steps_to_levels(form.alpha, x.kv_len)):
            LEVELS.run(math.prod(shape), (*own, look == 0, power), source, arguments)
    return tau


def steps_to_levels(alpha: float | str | None, kv_len: int) -> int:
    """After so many steps of Newton's the weights of no row add up to more than 1 + ENOUGH; tiles that arrive earlier,
    nearly all, cost no more than a launch.

    A step on a convex function N makes the product of N and its slope at least four times smaller. It is at most
    kv_len^(2 (alpha - 1)) at first, the slope never falls below 1, and the sum is (1 + N)^k.
    """
    ends = (LEAST, 1.0) if isinstance(alpha, str) else ((alpha or 2) - 1,) * 2
    return math.ceil(max(above * math.log2(kv_len) + math.log2(1 / (above * ENOUGH)) / 2 for above in ends))


def _above(form: Scores, x: Inputs) -> Tensor:
    """alpha - 1, float32 [heads]."""
    if isinstance(form.alpha, str):
        return (x.operands[form.alpha].detach().float() - 1).clamp(min=LEAST)
    return torch.full((x.heads,), (form.alpha or 2) - 1, device=x.q.device)


def _forward(form: Scores, what: Callable[..., Any], x: Inputs) -> tuple[Tensor, Tensor]:
    return forward.run(given_levels(form, what, _first(x)), x)


def _first(x: Inputs) -> int:
    assert not isinstance(x.q_positions, Tensor), "why_not said so"
    return x.q_positions.start


def _with(x: Inputs, rows: dict[str, Tensor]) -> Inputs:
    return x.with_(operands={**x.operands, **rows})
