"""The backward pass of kernels/keys.py and kernels/queries.py, for what the forward pass gave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import position_operands
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import tables
from manyheads.engines.triton.hopper.forward import SHARES, shares
from manyheads.engines.triton.hopper.kernels import keys, queries, rows
from manyheads.engines.triton.hopper.launching import (
    BLOCK_SIZES,
    DROPOUT,
    NORMALISERS,
    SIZES,
    STEPS,
    Kernel,
    descriptor,
    dropping,
    kind_of,
    masked,
    places,
    source_of,
    wide,
)
from manyheads.engines.triton.hopper.selected import Tiles, bits_of, cut, parts_of
from manyheads.engines.triton.hopper.tables import EVERY, Table, steps_of

FUNCTIONS = ("mask", "score", "dscore")
ROWS = 128  # keys in a tile of `keys`, queries in one of `queries`: two warp groups of 64


class KeysTiling(NamedTuple):
    """How `keys` runs. queries: in a tile. q, do: tiles in shared memory. late: the last product of a tile goes with
    the first ones of the next. apart: dK and dV are two launches, as their sums together do not fit the registers.
    halves: 64 keys have a list of their own, and q and do are slots for each of the two."""

    queries: int
    q: int
    do: int
    late: bool = True
    apart: bool = False
    halves: bool = False


class QueriesTiling(NamedTuple):
    """How `queries` runs. keys: in a tile. k, v: tiles in shared memory. held: dO stays in registers."""

    keys: int
    k: int
    v: int
    held: bool


# By the wider of head_dim and v_head_dim, and whether there is a score function.
KEYS_TILINGS = {
    (64, False): KeysTiling(128, 3, 2, late=False),
    (64, True): KeysTiling(64, 4, 3),
    (128, False): KeysTiling(64, 4, 2),
    (128, True): KeysTiling(64, 4, 2, late=False),
    (256, False): KeysTiling(32, 2, 2, late=False, apart=True),
    (256, True): KeysTiling(32, 2, 2, late=False, apart=True),
}
HALVES_TILINGS = {
    (64, False): KeysTiling(128, 3, 2, late=False, halves=True),
    (64, True): KeysTiling(64, 3, 3, late=False, halves=True),
    (128, False): KeysTiling(64, 2, 2, late=False, halves=True),
    (128, True): KeysTiling(64, 2, 2, late=False, halves=True),
    (256, False): KeysTiling(32, 1, 1, late=False, apart=True, halves=True),
    (256, True): KeysTiling(32, 1, 1, late=False, apart=True, halves=True),
}
QUERIES_TILINGS = {
    64: QueriesTiling(64, 4, 4, held=True),
    128: QueriesTiling(64, 4, 2, held=True),
    256: QueriesTiling(32, 3, 2, held=False),
}


def keys_tiling_of(form: Scores, x: Inputs, chosen: Tiles | None = None) -> KeysTiling:
    """With a score function, a sign to keep, dropout, or bits of blocks, fewer registers are left."""
    scored = form.program.has_score or form.normaliser == "signed" or x.dropout is not None
    scored = scored or bits_of(chosen)[0] is not None
    tilings = HALVES_TILINGS if chosen is not None and chosen.halves else KEYS_TILINGS
    return tilings[wide(max(x.q.shape[3], x.v_head_dim)), scored]


def queries_tiling_of(x: Inputs) -> QueriesTiling:
    return QUERIES_TILINGS[wide(max(x.q.shape[3], x.v_head_dim))]


COUNTS = (*STEPS, *SIZES, "padded")
KEYS = Kernel(
    keys, "keys",
    (
        "q_desc", "do_desc", "k_desc", "v_desc", "top_desc", "delta_desc", "dk_desc", "dv_desc", "q_at", "kv_at",
        "table", *COUNTS, "scale", *DROPOUT, "bits", "Q_STAGES: tl.constexpr", "DO_STAGES: tl.constexpr",
        "KIND: tl.constexpr", "MASKED: tl.constexpr", "POSITIONS: tl.constexpr", "NORMALISER: tl.constexpr",
        "DK: tl.constexpr", "DV: tl.constexpr", "LATE: tl.constexpr", "HALVES: tl.constexpr", *BLOCK_SIZES,
    ),
    (*COUNTS, "threshold"), FUNCTIONS,
)  # fmt: skip
QUERIES = Kernel(
    queries, "queries",
    (
        "q_desc", "do_desc", "k_desc", "v_desc", "dq_desc", "top", "delta", "q_at", "kv_at", "table", *COUNTS, "scale",
        *DROPOUT, "bits", *SHARES, "Q_STAGES: tl.constexpr", "K_STAGES: tl.constexpr", "V_STAGES: tl.constexpr",
        "KIND: tl.constexpr", "MASKED: tl.constexpr", "POSITIONS: tl.constexpr", "NORMALISER: tl.constexpr",
        "HELD: tl.constexpr", *BLOCK_SIZES, "PARTS: tl.constexpr",
    ),
    (*COUNTS, "threshold", *SHARES), FUNCTIONS,
)  # fmt: skip


def run(
    form: Scores, x: Inputs, o: Tensor | None, lse: Tensor, do: Tensor, dlse: Tensor | None,
    needed: tuple[bool, bool, bool] = (True, True, True),
    keys_tiling: KeysTiling | None = None, queries_tiling: QueriesTiling | None = None, chosen: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k and v; None for those that are not needed. o, lse: what the forward pass gave;
    chosen: as in the forward pass. do, dlse: their gradients. Where nothing divides the weights o is None, as a row's
    gradients have nothing in common."""
    do = do if do.stride(3) == 1 else do.contiguous()
    with torch.cuda.device_of(x.q):
        top, delta = prepared(o, lse, do, dlse)
    return products(form, x, do, top, delta, needed, keys_tiling, queries_tiling, chosen)


def products(
    form: Scores, x: Inputs, do: Tensor, top: Tensor, delta: Tensor, needed: tuple[bool, bool, bool],
    keys_tiling: KeysTiling | None = None, queries_tiling: QueriesTiling | None = None, chosen: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same from what `prepared` gave. do: its rows' numbers lie side by side."""
    with torch.cuda.device_of(x.q):
        call = _Call(form, x, do, top, delta, chosen)
        dq = _queries(call, queries_tiling or queries_tiling_of(x)) if needed[0] else None
        dk, dv = _keys(call, keys_tiling or keys_tiling_of(form, x, chosen), needed[1], needed[2])
    return dq, dk, dv


class _Call:
    """What both kernels take."""

    def __init__(self, form: Scores, x: Inputs, do: Tensor, top: Tensor, delta: Tensor, chosen: Tiles | None):
        self.chosen, self.form, self.x, self.do, self.top, self.delta = chosen, form, x, do, top, delta
        self.operands = position_operands(form, x)
        plain = not (form.program.has_mask or form.program.has_score or x.ragged)
        self.source = None if plain else source_of(form, x, FUNCTIONS)
        self.arguments = () if self.source is None else self.source.arguments(x.q.device, **self.operands)
        self.at, starts, steps = places((x.q_positions, x.kv_positions), x.q_len, x.kv_len, x.q.device)
        sizes = x.heads, x.heads // x.kv_heads, x.q_len, x.kv_len, *starts, *steps, top.shape[2]
        self.numbers = *sizes, float(x.scale), *dropping(x)
        self.bits, *self.block_sizes = bits_of(chosen)

    def table(self, tile: tuple[int, int], turned: bool = False) -> Table | None:
        return (self.chosen or tables).table_of(self.form.program, self.x, tile, self.operands, turned)

    def steps(self, table: Table | None, tiles: int) -> tuple[Any, ...]:
        """A table's values and strides."""
        return self.top if table is None else table.values, *steps_of(table, (self.x.batch, self.x.heads, tiles))

    def kinds(self, table: Table | None, sticks_out: bool, parts: int = 1) -> tuple[Any, ...]:
        """What the compiler must know: the kind of table, and whether there are tiles to mask."""
        kind = EVERY if table is None else table.kind
        found = masked(table, sticks_out, self.at[0], cut(self.chosen, parts))
        return kind, found, self.at[0] is not None, NORMALISERS[self.form.normaliser]


def _keys(call: _Call, tiling: KeysTiling, needs_dk: bool, needs_dv: bool) -> tuple[Tensor | None, Tensor | None]:
    x, (queries, q_stages, do_stages, late, apart, halves) = call.x, tiling
    dk, dv = (quick.empty(t.shape, t.dtype, t.device) for t in (x.k, x.v))
    tiles, parts = cdiv(x.kv_len, ROWS), 2 if halves else 1
    table = call.table((queries, ROWS // parts), turned=True)
    for which in ((needs_dk, False), (False, needs_dv)) if apart else ((needs_dk, needs_dv),):
        if any(which):
            own = (
                descriptor(x.q, queries), descriptor(call.do, queries), descriptor(x.k, ROWS // 2),
                descriptor(x.v, ROWS // 2), _lines(call.top, queries), _lines(call.delta, queries),
                descriptor(dk, ROWS // 2), descriptor(dv, ROWS // 2), *call.at,
                *call.steps(table, parts * tiles), *call.numbers, call.bits, q_stages, do_stages,
                *call.kinds(table, x.q_len % queries != 0), *which, late, halves, *call.block_sizes,
            )  # fmt: skip
            KEYS.run(x.batch * x.kv_heads * tiles, own, call.source, call.arguments)
    return dk if needs_dk else None, dv if needs_dv else None


def _queries(call: _Call, tiling: QueriesTiling) -> Tensor:
    x, (keys, k_stages, v_stages, held) = call.x, tiling
    dq = quick.empty(x.q.shape, x.q.dtype, x.q.device)
    parts = parts_of(call.chosen, x, keys)
    tiles, table = cdiv(x.q_len, ROWS), call.table((ROWS, keys // parts))
    bits, *sizes = bits_of(call.chosen, parts)
    kind, *kinds = call.kinds(table, x.kv_len % keys != 0, parts)
    programs, *share = shares(x.batch * x.heads * tiles, kind, wide(max(x.q.shape[3], x.v_head_dim)))
    own = (
        descriptor(x.q, ROWS // 2), descriptor(call.do, ROWS // 2), descriptor(x.k, keys, parts),
        descriptor(x.v, keys, parts), descriptor(dq, ROWS // 2), call.top, call.delta, *call.at,
        *call.steps(table, tiles), *call.numbers, bits, *share, 1 + (share[1] > 0), k_stages, v_stages,
        kind, *kinds, held, *sizes, parts,
    )  # fmt: skip
    QUERIES.run(programs, own, call.source, call.arguments)
    return dq


def prepared(o: Tensor | None, lse: Tensor, do: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each query its lse in base two and delta, float32 [batch, heads, q_len up to a multiple of ROWS]."""
    batch, heads, q_len, head_dim = do.shape
    padded, tile = cdiv(q_len, ROWS) * ROWS, 64
    if o is None:
        nothing = torch.zeros(batch, heads, padded, dtype=torch.float32, device=do.device)
        return nothing, nothing
    top, delta = (quick.empty((batch, heads, padded), torch.float32, o.device) for _ in range(2))
    own = (
        o, do, lse, lse if dlse is None else dlse, top, delta, *o.stride()[:3], *do.stride()[:3],
        *(lse if dlse is None else dlse).stride(), q_len, padded, heads, head_dim, wide(head_dim), tile,
        dlse is not None,
    )  # fmt: skip
    quick.launch(rows.rows, padded // tile * heads * batch, own, num_warps=4)
    return top, delta


def _lines(x: Tensor, size: int) -> quick.Box:
    """Numbers of queries in boxes of one tile."""
    return quick.Box(x, (x.numel() // size, size), (size, 1), kind_of((1, size), torch.float32))
