"""Cells of a map of blocks: their weights, and lists of what columns, diagonals and cells are kept."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
