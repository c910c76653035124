"""Lists of past blocks by the products of a vector for each, a few query blocks at a time.

A program multiplies, leaves the scores in a place of its own, which the cache holds, and reads them again, a few whole
rows at a time: so rows may be long, and the scores of all blocks are never in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import columns_of, heaviest, ordered, store_lists, total

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # of what is seen, the least that a mass is taken for


@triton.jit
def _part(x, row, last, step, d, D: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """float32 [ROWS, DIMS]: the numbers from d on of the rows from `row` on, of x [last, D], 0 where there is none."""
    rows, dims = row + tl.arange(0, ROWS), d + tl.arange(0, DIMS)
    given = (rows < last)[:, None] & (dims < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * step + dims[None, :], mask=given, other=0.0).to(tl.float32)


@triton.jit
def _cut(x):
    """float32 as tf32 has it, cut off and not rounded, which takes one instruction for seven."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def scores(
    q, k, own, m, queries, n, limit, q_m, D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own float32 [ROWS, COLUMNS] = q.k of the query blocks from m on, for the first `limit` key blocks at least. As
    tf32x3, products of what is cut off and of the rest: off by some 2^-21 of the factors."""
    place = own + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, PART)[None, :]
    for first in range(0, limit, PART):
        found = tl.zeros([ROWS, PART], tl.float32)
        rest = tl.zeros([ROWS, PART], tl.float32)
        for d in range(0, D, DIMS):
            a = _part(q, m, queries, q_m, d, D, ROWS, DIMS)
            b = tl.trans(_part(k, first, n, D, d, D, PART, DIMS))
            if PRECISION == "tf32x3":
                high_a = _cut(a)
                high_b = _cut(b)
                rest = tl.dot(a - high_a, high_b, rest, input_precision="tf32")
                rest = tl.dot(high_a, b - high_b, rest, input_precision="tf32")
                found = tl.dot(high_a, high_b, found, input_precision="tf32")
            else:
                found = tl.dot(a, b, found, input_precision=PRECISION)
        tl.store(place + first, found + tl.where(rest == rest, rest, 0.0))  # what has no end has no rest


@triton.jit(
    do_not_specialize=[
        "tiles", "heads", "group", "queries", "n", "width", "scale", "share", "least", "query_block", "key_block", "at",
        "first", "local",
    ]
)  # fmt: skip
def past(
    q, k, space, indices, counts, tiles, heads, group, queries, n, width, q_b, q_h, q_m, scale, share, least,
    query_block, key_block, at, first, local, SHARE: tl.constexpr, COUNTED: tl.constexpr, D: tl.constexpr,
    DIMS: tl.constexpr, ROWS: tl.constexpr, SOME: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    LINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads, queries, width] and counts int32 [batch, heads, queries] for q [batch, heads,
    queries, D] with these strides and k float32 [batch, heads / group, n, D].

    SHARE: the fewest key blocks that hold `share` of softmax(scale q.k), at least so many if COUNTED, and what is taken
    in any case; else the best `least`, with that first. at: the number of the first query block; first, local: as
    core/choosing.py has them. space: float32 [programs, ROWS, COLUMNS]. A program does every so many of
    batch * heads * queries / ROWS tiles, the longest first.
    """
    own = space + tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
    of_heads = tiles // tl.cdiv(queries, ROWS)
    line = tl.arange(0, COLUMNS // LINE) * LINE
    columns = columns_of(COLUMNS // LINE, LINE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = tiles - 1 - number
        head = (tile % of_heads).to(tl.int64)
        m = tile // of_heads * ROWS
        last = tl.cdiv((at + tl.minimum(m + ROWS, queries)).to(tl.int64) * query_block, key_block)
        limit = tl.minimum(last, n).to(tl.int32)
        k_head = k + (head // heads * (heads // group) + head % heads // group) * n * D
        q_head = q + head // heads * q_b + head % heads * q_h
        scores(q_head, k_head, own, m, queries, n, limit, q_m, D, DIMS, ROWS, PART, COLUMNS, PRECISION)
        tl.debug_barrier()
        for some in range(0, ROWS, SOME):
            row = some + tl.arange(0, SOME)
            begin = (at + m + row).to(tl.int64) * query_block
            there = row < queries - m
            end = tl.minimum(tl.cdiv(begin + query_block, key_block), n).to(tl.int32)
            end = tl.where(there, end, 0)[:, None, None]
            near = (begin // key_block - local).to(tl.int32)[:, None, None]
            s = tl.load(own + row[:, None, None] * COLUMNS + columns, mask=(line < limit)[None, :, None], other=0.0)
            if SHARE:
                s = tl.where(columns < end, s * (scale * LOG2E), float("-inf"))
                top = tl.max(tl.max(s, 1), 1)
                mass = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None, None])
                whole = total(mass)
                wanted = tl.where(whole == whole, share * whole, 0.0)  # no weight is a number: none is more
                wanted = tl.where((share < 1) & there, wanted, float("inf"))
                able = mass > TINY  # not what is no number
                if COUNTED:
                    able = able & (whole == whole)[:, None, None]
                mass = tl.where(columns < end, tl.where(able, mass, TINY), 0.0)
                order = mass.to(tl.uint32, bitcast=True)
                kept = heaviest(order, mass, columns, wanted, least, True, COUNTED, 30)
                kept = kept | ((order != 0) & ((columns >= near) | (columns < first)))
            else:
                seen = columns < end
                order = tl.where(seen & (s != float("-inf")), ordered(s), 0).to(tl.uint32)
                order = tl.where(seen & ((columns >= near) | (columns < first)), 0xFFFFFFFF, order).to(tl.uint32)
                kept = heaviest(order, s, columns, 0.0, least, False, True, 32)
            store_lists(kept, indices, counts, head * queries + m + row, there, columns, width)
        tl.debug_barrier()
