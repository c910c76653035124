"""Normalisers whose weights are functions of one score once a level is known for each query: kernels/levels.py finds
it, in several looks at all keys, and the kernels of the others do the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import position_operands
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import forward
from manyheads.engines.triton.hopper.kernels import levels
from manyheads.engines.triton.hopper.launching import SIZES, STEPS, Kernel, descriptor, masked, places, source_of
from manyheads.engines.triton.hopper.tables import EVERY, Table, steps_of, table_of

LEVELS = Kernel(
    levels, "levels",
    (
        "q_desc", "k_desc", "level", "ends", "ahead", "powers", "q_at", "kv_at", "table", *STEPS, *SIZES, "scale",
        "count", "STAGES: tl.constexpr", "KIND: tl.constexpr", "MASKED: tl.constexpr", "POSITIONS: tl.constexpr",
        "FIRST: tl.constexpr", "POWER: tl.constexpr",
    ),
    (*STEPS, *SIZES, "count"), ("mask", "score"),
)  # fmt: skip


def why_not(form: Scores, x: Inputs) -> str | None:
    of = form.normaliser
    if isinstance(x.q_positions, Tensor):
        return f"the Hopper kernels find levels of {of} for consecutive queries, not for positions in a tensor"
    read = *form.program.tensors, *(x.operands[name] for name in form.program.operand_names)
    if torch.is_grad_enabled() and any(t.requires_grad for t in read):
        return f"the Hopper kernels give no gradients to what the scores of {of} read"
    if form.program.tensors and torch.compiler.is_compiling():  # a graph brings its own, the functions keep theirs
        return f"under torch.compile the Hopper kernels take no {of} whose scores or masks captured tensors"
    return None


def find(
    product: Scores, x: Inputs, looks: int, level: Tensor, ends: Tensor | None = None, powers: Tensor | None = None,
    count: int | None = None, power: int = 0,
) -> None:  # fmt: skip
    """Fills level, float32 [batch, heads, q_len]; others as in kernels/levels.py. product: what gives the scores."""
    keys, stages, _ = forward.tiling_of(product, x)
    operands = position_operands(product, x)
    source = source_of(product, x, ("mask", "score"))
    arguments = source.arguments(x.q.device, **operands)
    table = table_of(product.program, x, (forward.QUERIES, keys), operands)
    kind, values, _ = table or Table(EVERY, level)
    shape = x.batch, x.heads, cdiv(x.q_len, forward.QUERIES)
    ahead = torch.empty(math.prod(shape), 2, dtype=torch.int32, device=x.q.device)
    at, starts, steps = places((x.q_positions, x.kv_positions), x.q_len, x.kv_len, x.q.device)
    own = (
        descriptor(x.q, forward.QUERIES // 2), descriptor(x.k, keys), level, ends, ahead, powers, *at, values,
        *steps_of(table, shape), x.heads, x.heads // x.kv_heads, x.q_len, x.kv_len, *starts, *steps, float(x.scale),
        count, stages, kind, masked(table, x.kv_len % keys != 0, at[0]), at[0] is not None,
    )  # fmt: skip
    with torch.cuda.device_of(x.q):
        for look in range(looks):
            LEVELS.run(math.prod(shape), (*own, look == 0, power), source, arguments)


def with_rows(x: Inputs, rows: dict[str, Tensor]) -> Inputs:
    """With numbers of the queries, as operands."""
    return x.with_(operands={**x.operands, **rows})
