"""Entmax on the kernels of the others, and one that finds the levels first: looks.py.

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
from manyheads.core.tiling import row_start
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
from manyheads.engines.triton.hopper.looks import find, with_rows
from manyheads.engines.triton.hopper.looks import why_not as why_no_looks

ENOUGH = 2.0**-14  # as in kernels/newton.py


def why_not(form: Scores, x: Inputs) -> str | None:
    if not isinstance(form.alpha, str) and not 1 + LEAST <= (form.alpha or 0) <= 2:
        return f"the Hopper kernels take entmax with an alpha from {1 + LEAST:g} to 2, not {form.alpha}"
    return why_no_looks(form, x)


def run(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    """o and tau, float32 [batch, heads, q_len]."""
    tau = levels_of(form, x)
    return _forward(form, weights, with_rows(x, {TAU: tau}))[0], tau


def gradients(
    form: Scores, x: Inputs, tau: Tensor, do: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv; None for those that are not needed."""
    y = with_rows(x, {TAU: tau})
    mean, _ = _forward(form, slopes, y)
    return backward.run(given_levels(form, weights, row_start(x.q_positions)), y, mean, tau, do, None, needed)


def alpha_gradient(form: Scores, x: Inputs, tau: Tensor, do: Tensor) -> Tensor:
    """Of an alpha that is an operand, float32 [heads]. Correia, Niculae, Martins. "Adaptively Sparse Transformers."
    2019. arXiv:1909.00015."""
    assert isinstance(form.alpha, str)
    y = with_rows(x, {TAU: tau})
    sums = {SLOPES: _forward(form, slopes, y)[1], ENTROPIES: _forward(form, entropies, y)[1]}
    change, _ = _forward(form, by_alpha, with_rows(y, sums))
    found = torch.linalg.vecdot(change.float(), do.float()).sum((0, 2))
    return torch.where(x.operands[form.alpha] - 1 > LEAST, found, 0.0)


def levels_of(form: Scores, x: Inputs) -> Tensor:
    """tau, float32 [batch, heads, q_len]; inf for queries that see no key."""
    tau = torch.full(x.q.shape[:3], math.inf, dtype=torch.float32, device=x.q.device)
    if x.q.numel() and x.k.numel():
        power = power_of(form).known
        powers = None if power else 1 / _above(form, x)
        find(scaled(form), x, 1 + steps_to_levels(form.alpha, x.kv_len), tau, powers=powers, power=power)
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
    return forward.run(given_levels(form, what, row_start(x.q_positions)), x)
