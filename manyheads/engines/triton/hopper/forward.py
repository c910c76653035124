"""The forward pass of kernels/attend.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.expressions.source import Source
from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, Positions
from manyheads.core.tiling import position_operands
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import attend
from manyheads.engines.triton.hopper.launching import (
    NORMALISERS,
    SIZES,
    STEPS,
    Kernel,
    descriptor,
    places,
    source_of,
    wide,
)
from manyheads.engines.triton.hopper.tables import EVERY, Table, steps_of, table_of

QUERIES = 128  # in a tile: two warp groups of 64


class Tiling(NamedTuple):
    """keys: in a tile. stages: tiles of keys, and of values, that are in shared memory at a time."""

    keys: int
    stages: int


# By the wider of head_dim and v_head_dim, both rounded up to one of WIDTHS.
TILINGS = {64: Tiling(128, 3), 128: Tiling(128, 2), 256: Tiling(64, 2)}


def tiling_of(x: Inputs) -> Tiling:
    return TILINGS[wide(max(x.q.shape[3], x.v_head_dim))]


ATTEND = Kernel(
    attend, "attend",
    (
        "q_desc", "k_desc", "v_desc", "o_desc", "lse", "sink", "q_at", "kv_at", "table", *STEPS, *SIZES, "scale",
        "STAGES: tl.constexpr", "KIND: tl.constexpr", "MASKED: tl.constexpr",
        "POSITIONS: tl.constexpr", "NORMALISER: tl.constexpr",
    ),
    (*STEPS, *SIZES), ("mask", "score"),
)  # fmt: skip


def run(form: Scores, x: Inputs, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse), without gradients."""
    tiling = tiling or tiling_of(x)
    own = {"normaliser": form.normaliser, "tiling": tiling, "sink": form.sink and x.operands[form.sink]}
    if not (form.program.has_mask or form.program.has_score or x.ragged):
        return forward(x.q, x.k, x.v, scale=x.scale, **own)
    operands = position_operands(form, x)
    source = source_of(form, x, ("mask", "score"))
    return forward(
        x.q, x.k, x.v, scale=x.scale, source=source, arguments=source.arguments(x.q.device, **operands),
        table=table_of(form.program, x, (QUERIES, tiling.keys), operands),
        positions=(x.q_positions, x.kv_positions), **own,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    source: Source | None = None,
    arguments: tuple[Any, ...] = (),
    table: Table | None = None,
    positions: tuple[Positions, Positions] = (range(0), range(0)),
    normaliser: str = "softmax",
    sink: Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """o [batch, heads, q_len, v_head_dim] in q's dtype and the natural lse in float32: 0 and -inf for a query that sees
    nothing.

    source: Gluon functions mask and score; arguments: what they read, from source.arguments(device, ...).
    table: which tiles the mask needs, for tiles of QUERIES by tiling.keys; None if there is no mask.
    positions: of the queries and of the keys; of ranges the starts count. sink: float [heads].
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
    o = torch.empty(batch, heads, q_len, v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if not (q.numel() and k.numel() and v.numel()):
        nothing = {"softmax": -math.inf, "signed": -math.inf, "none": 0.0}[normaliser]
        return o.zero_(), lse.fill_(nothing) if sink is None else lse.copy_(sink.detach()[None, :, None].expand_as(lse))
    names = source.names if source is not None else ()
    if "mask" in names and table is None:
        raise ValueError("a mask needs a table of its tiles")
    if scale <= 0 and "score" not in names:  # a masked score is -inf, and must be after scaling
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    keys, stages = tiling or TILINGS[wide(max(head_dim, v_head_dim))]
    kind, values = table or (EVERY, lse)
    shape = batch, heads, cdiv(q_len, QUERIES)
    (q_at, kv_at), starts, steps = places(positions, q_len, kv_len, q.device)
    own = (
        descriptor(q, QUERIES // 2), descriptor(k, keys), descriptor(v, keys), descriptor(o, QUERIES // 2), lse,
        None if sink is None else sink.detach().float().contiguous(), q_at, kv_at, values, *steps_of(table, shape),
        heads, heads // kv_heads, q_len, kv_len, *starts, *steps, float(scale),
        stages, kind, table is not None or kv_len % keys != 0, q_at is not None, NORMALISERS[normaliser],
    )  # fmt: skip
    with torch.cuda.device_of(q):
        ATTEND.run(math.prod(shape), own, source, arguments)
    return o, lse
