"""The forward pass of kernels/attend.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.core.rows import unseen
from manyheads.core.tiling import position_operands
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import tables
from manyheads.engines.triton.hopper.kernels import attend
from manyheads.engines.triton.hopper.launching import (
    BLOCK_SIZES,
    DROPOUT,
    NORMALISERS,
    SIZES,
    STEPS,
    Kernel,
    descriptor,
    dropping,
    masked,
    places,
    source_of,
    wide,
)
from manyheads.engines.triton.hopper.selected import Tiles, bits_of, cut, parts_of
from manyheads.engines.triton.hopper.tables import EVERY, LISTS, Table, steps_of

QUERIES = 128  # in a tile: two warp groups of 64


class Tiling(NamedTuple):
    """keys: in a tile. stages: tiles of keys, and of values, that are in shared memory at a time. deep: see attend.py;
    which is faster where, docs/log.md has."""

    keys: int
    stages: int
    deep: bool = False


# By the wider of head_dim and v_head_dim, both rounded up to one of WIDTHS.
TILINGS = {64: Tiling(128, 3, deep=True), 128: Tiling(128, 2), 256: Tiling(64, 2)}
HALVES = Tiling(64, 4, deep=True)  # where blocks of keys are no multiples of 128, or a score takes long
LONG = {"exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf"}


def tiling_of(form: Scores, x: Inputs, chosen: Tiles | None = None) -> Tiling:
    found = tiling_for(form, wide(max(x.q.shape[3], x.v_head_dim)))
    united = chosen is not None and chosen.halves and parts_of(chosen, x, found.keys) == 1
    return HALVES if united and found.keys > HALVES.keys else found


def tiling_for(form: Scores, width: int) -> Tiling:
    takes_long = any(node.op in LONG for node in form.program.graph.nodes)
    return HALVES if takes_long and width == 128 else TILINGS[width]


SHARES = ("several", "halvings", "halved")
ATTEND = Kernel(
    attend, "attend",
    (
        "q_desc", "k_desc", "v_desc", "o_desc", "lse", "sink", "q_at", "kv_at", "table", *STEPS, *SIZES, "scale",
        *DROPOUT, "bits", *SHARES, "Q_STAGES: tl.constexpr", "STAGES: tl.constexpr", "KIND: tl.constexpr",
        "MASKED: tl.constexpr", "POSITIONS: tl.constexpr", "NORMALISER: tl.constexpr", "DEEP: tl.constexpr",
        *BLOCK_SIZES, "PARTS: tl.constexpr",
    ),
    (*STEPS, *SIZES, "threshold", *SHARES), ("mask", "score"),
)  # fmt: skip


# Rows of tiles of one program, as a power of two; programs of each smaller number, but for those of one row; rows that
# are left for these: one and a half, and two, for each processor.
HALVINGS, HALVED, LEFT = 4, 198, 264


def shares(rows: int, kind: int, width: int) -> tuple[int, int, int, int]:
    """Programs for so many rows of tiles, and SHARES, as kernels/several.py has them. Where nothing is listed rows are
    long, and wide ones leave no room for the next row's queries: programs have one."""
    halvings = max(p for p in range(HALVINGS + 1) if not p or rows >= HALVED * (2**p - 2) + LEFT)
    if kind < LISTS or width > 128 or not halvings:
        return rows, 0, 0, HALVED
    smaller = HALVED * (2**halvings - 2)
    several = (rows - smaller - LEFT) >> halvings
    return rows - several * (2**halvings - 1) - smaller + HALVED * (halvings - 1), several, halvings, HALVED


def run(form: Scores, x: Inputs, tiling: Tiling | None = None, chosen: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """o [batch, heads, q_len, v_head_dim] in q's dtype and the natural lse in float32, without gradients. chosen: the
    blocks that the mask is about, if not all."""
    batch, heads, q_len, _ = x.q.shape
    o = quick.empty((batch, heads, q_len, x.v_head_dim), x.q.dtype, x.q.device)
    if not (x.q.numel() and x.k.numel() and x.v.numel()):
        return o.zero_(), unseen(form, x).float().detach()
    lse = quick.empty((batch, heads, q_len), torch.float32, x.q.device)
    keys, stages, deep = tiling or tiling_of(form, x, chosen)
    operands = position_operands(form, x)
    plain = not (form.program.has_mask or form.program.has_score or x.ragged)
    source = None if plain else source_of(form, x, ("mask", "score"))
    parts = parts_of(chosen, x, keys)
    table = (chosen or tables).table_of(form.program, x, (QUERIES, keys // parts), operands)
    q, scale = x.q, float(x.scale)
    if scale <= 0 and not form.program.has_score:  # a masked score is -inf, and must be after scaling
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    kind, values, _ = table or Table(EVERY, lse)
    bits, *sizes = bits_of(chosen, parts)
    shape = batch, heads, cdiv(q_len, QUERIES)
    at, starts, steps = places((x.q_positions, x.kv_positions), q_len, x.kv_len, q.device)
    programs, *share = shares(math.prod(shape), kind, wide(max(x.q.shape[3], x.v_head_dim)))
    own = (
        descriptor(q, QUERIES // 2), descriptor(x.k, keys, parts), descriptor(x.v, keys, parts),
        descriptor(o, QUERIES // 2), lse,
        None if form.sink is None else x.operands[form.sink].detach().float().contiguous(), *at, values,
        *steps_of(table, shape), heads, heads // x.kv_heads, q_len, x.kv_len, *starts, *steps, scale,
        *dropping(x), bits, *share, 1 + (share[1] > 0), stages, kind,
        masked(table, x.kv_len % keys != 0, at[0], cut(chosen, parts)), at[0] is not None,
        NORMALISERS[form.normaliser], deep, *sizes, parts,
    )  # fmt: skip
    arguments = () if source is None else source.arguments(x.q.device, **operands)
    with torch.cuda.device_of(q):
        ATTEND.run(programs, own, source, arguments)
    return o, lse
