"""Cells of a map of blocks: their weights, and lists of what columns, diagonals and cells are kept."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import columns_of, heaviest, ordered, total

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _terms(x, middle):
    """x log2(x / middle), and 0 where x is."""
    some = x > 0
    return tl.where(some, x * (tl.log2(tl.where(some, x, 1.0)) - tl.log2(tl.where(some, middle, 1.0))), 0.0)


@triton.jit(do_not_specialize=["heads", "group", "queries", "n", "scale", "wanted", "near", "least"])
def stripes(
    q, k, mass, space, kept, share, heads, group, queries, n, q_b, q_h, q_m, scale, wanted, near, least,
    D: tl.constexpr, PD: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """kept uint8 [2, heads, n] and share float32 [heads] as core/crossing.py has them: of q [batch, heads, queries, D]
    with these strides, k float32 [batch, heads / group, n, D], mass float32 [2, heads, n]. space: float32 [heads,
    COLUMNS]. Grid: the heads of all rows."""
    head, of_all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part, dims = tl.arange(0, PART), tl.arange(0, PD)
    inside = (dims < D)[None, :]
    at = q + head // heads * q_b + head % heads * q_h + dims[None, :]
    mean = tl.zeros([PART, PD], tl.float32)
    for first in range(0, queries, PART):
        row = (first + part)[:, None]
        mean += tl.load(at + row.to(tl.int64) * q_m, mask=(row < queries) & inside, other=0.0).to(tl.float32)
    x = tl.sum(mean, 0)[None, :] * (scale * LOG2E / tl.maximum(queries, 1))
    k += (head // heads * (heads // group) + head % heads // group) * n * D
    for first in range(0, n, PART):
        column = (first + part)[:, None]
        y = tl.load(k + column * D + dims[None, :], mask=(column < n) & inside, other=0.0)
        tl.store(space + head * COLUMNS + first + part, tl.sum(y * x, 1), mask=first + part < n)
    tl.debug_barrier()
    columns = columns_of(COLUMNS // LINE, LINE)
    there = columns < n
    s = tl.load(space + head * COLUMNS + columns, mask=there, other=float("-inf"))
    p = tl.exp2(s - tl.max(tl.max(s, 1), 1)[:, None, None])
    p = p / total(p)[:, None, None]
    shown = tl.load(mass + head * n + columns, mask=there, other=0.0)
    middle = (p + shown) / 2
    divergence = tl.sum(total(_terms(p, middle) + _terms(shown, middle)), 0) / (2 * LOG2E)
    alike = tl.sqrt(tl.where(divergence < 0, 0.0, divergence)) < near
    tl.store(share + head, tl.where(alike, wanted, 0.0))

    both = (tl.arange(0, 2)[:, None, None] * of_all + head) * n + columns
    x = tl.load(mass + both, mask=there, other=0.0)
    order = tl.where(columns == 0, 0xFFFFFFFF, tl.where(there, ordered(x), 0)).to(tl.uint32)
    needed = tl.where(alike, 0.0, tl.where(wanted < 1, wanted, float("inf")))  # a share of 1 is all
    chosen = heaviest(order, x, columns, tl.zeros([2], tl.float32) + needed, least, True, True, 32)
    tl.store(kept + both, chosen.to(tl.uint8), mask=there)


@triton.jit
def _scores(a, k, row, column, n, first, factor, D: tl.constexpr, PD: tl.constexpr, PRECISION: tl.constexpr):
    """factor q.k [R, N] of columns up to a row's own, -inf behind."""
    dims = tl.arange(0, PD)
    given = (dims < D)[:, None] & (column < n)[None, :]
    b = tl.load(k + dims[:, None] + column[None, :].to(tl.int64) * D, mask=given, other=0.0)
    s = tl.dot(a, b, input_precision=PRECISION) * factor
    return tl.where((column[None, :] <= first + row[:, None]) & (column < n)[None, :], s, float("-inf"))


@triton.jit(do_not_specialize=["heads", "group", "queries", "n", "first", "scale"])
def masses(
    q, k, share, out, heads, group, queries, n, first, scale, D: tl.constexpr, PD: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out float32 [batch, heads, queries, n]: softmax(scale q.k) / queries of q float32 [batch, heads, queries, D] and
    k float32 [batch, heads / group, n, D] up to column first + row, 0 behind; nothing where share float32 [batch,
    heads] is 0. Grid: batch * heads * queries / ROWS."""
    tiles = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    if tl.load(share + head) > 0:
        m = tl.program_id(0) % tiles * ROWS
        row = m + tl.arange(0, ROWS)
        dims = tl.arange(0, PD)
        given = (row < queries)[:, None] & (dims < D)[None, :]
        a = tl.load(q + (head * queries + row)[:, None] * D + dims[None, :], mask=given, other=0.0)
        k += (head // heads * (heads // group) + head % heads // group) * n * D
        limit = tl.minimum(first + m + ROWS, n)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for begin in range(0, limit, PART):
            s = _scores(a, k, row, begin + tl.arange(0, PART), n, first, scale * LOG2E, D, PD, PRECISION)
            higher = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            top = higher
        weight = 1.0 / (total * queries)
        for begin in range(0, n, PART):
            column = begin + tl.arange(0, PART)
            p = tl.zeros([ROWS, PART], tl.float32)
            if begin < limit:
                s = _scores(a, k, row, column, n, first, scale * LOG2E, D, PD, PRECISION)
                p = tl.exp2(s - top[:, None]) * weight[:, None]
            at = out + (head * queries + row)[:, None] * n + column[None, :]
            tl.store(at, p, mask=(row < queries)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["rows", "queries", "n", "first"])
def crossed(
    columns, diagonals, cells, share, indices, counts, rows, queries, n, first, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """indices int32 [rows, n] and counts int32 [rows] as core/crossing.py has them, of uint8 maps; rows are those of
    all heads. Grid: rows / ROWS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    head = row // queries
    own = first + row % queries
    aware = tl.load(share + head, mask=there, other=0.0) > 0
    number = tl.zeros([ROWS], tl.int32)
    for begin in range(0, tl.minimum(tl.max(tl.where(there, own, 0), 0) + 1, n), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        seen = there[:, None] & (column < n)[None, :] & (column[None, :] <= own[:, None])
        kept = tl.load(columns + head[:, None] * n + column[None, :], mask=seen, other=0)
        kept |= tl.load(diagonals + head[:, None] * n + own[:, None] - column[None, :], mask=seen, other=0)
        kept |= tl.load(cells + row[:, None] * n + column[None, :], mask=seen & aware[:, None], other=0)
        one = (kept != 0).to(tl.int32)
        place = number[:, None] + tl.cumsum(one, 1) - 1
        listed = tl.zeros([ROWS, COLUMNS], tl.int32) + column[None, :]
        tl.store(indices + row[:, None] * n + place, listed, mask=one != 0)
        number += tl.sum(one, 1)
    tl.store(counts + row, number, mask=there)
