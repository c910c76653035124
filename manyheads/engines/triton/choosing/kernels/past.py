"""Lists of past blocks by the products of a vector for each, a few query blocks at a time.

A program multiplies, leaves the scores in a place of its own, which the cache holds, and reads them again, a few whole
rows at a time: so rows may be long, and the scores of all blocks are never in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import heaviest, ordered, store_lists


@triton.jit
def scores(
    q, k, own, m, queries, n, limit, q_m, D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own float32 [ROWS, COLUMNS] = q.k of the query blocks from m on, for the first `limit` key blocks at least."""
    rows = tl.arange(0, ROWS)
    for first in range(0, limit, PART):
        columns = first + tl.arange(0, PART)
        found = tl.zeros([ROWS, PART], tl.float32)
        for d in range(0, D, DIMS):
            dims = d + tl.arange(0, DIMS)
            given = (rows < queries - m)[:, None] & (dims < D)[None, :]
            a = tl.load(q + (m + rows).to(tl.int64)[:, None] * q_m + dims[None, :], mask=given, other=0.0)
            given = (dims < D)[:, None] & (columns < n)[None, :]
            b = tl.load(k + dims[:, None] + columns[None, :].to(tl.int64) * D, mask=given, other=0.0)
            found = tl.dot(a.to(tl.float32), b, found, input_precision=PRECISION)
        tl.store(own + rows[:, None] * COLUMNS + columns[None, :], found)


@triton.jit(
    do_not_specialize=[
        "tiles", "heads", "group", "queries", "n", "width", "scale", "share", "least", "query_block", "key_block", "at",
        "first", "local",
    ]
)  # fmt: skip
def past(
    q, k, space, indices, counts, tiles, heads, group, queries, n, width, q_b, q_h, q_m, scale, share, least,
    query_block, key_block, at, first, local, SHARE: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, SOME: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads, queries, width] and counts int32 [batch, heads, queries] for q [batch, heads,
    queries, D] with these strides and k float32 [batch, heads / group, n, D].

    SHARE: the fewest key blocks that hold `share` of softmax(scale q.k), and what is taken in any case; else the best
    `least`, with that first. at: the number of the first query block; first, local: as core/choosing.py has them.
    space: float32 [programs, ROWS, COLUMNS]. A program does every so many of batch * heads * queries / ROWS tiles.
    """
    own = space + tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
    per_head = tl.cdiv(queries, ROWS)
    columns = tl.arange(0, COLUMNS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        head = (tile // per_head).to(tl.int64)
        m = tile % per_head * ROWS
        last = tl.cdiv((at + tl.minimum(m + ROWS, queries)).to(tl.int64) * query_block, key_block)
        limit = tl.minimum(last, n).to(tl.int32)
        k_head = k + (head // heads * (heads // group) + head % heads // group) * n * D
        q_head = q + head // heads * q_b + head % heads * q_h
        scores(q_head, k_head, own, m, queries, n, limit, q_m, D, DIMS, ROWS, PART, COLUMNS, PRECISION)
        tl.debug_barrier()
        for some in range(0, ROWS, SOME):
            row = some + tl.arange(0, SOME)
            begin = (at + m + row).to(tl.int64) * query_block
            end = tl.minimum(tl.cdiv(begin + query_block, key_block), n).to(tl.int32)
            near = (begin // key_block - local).to(tl.int32)
            seen = columns[None, :] < end[:, None]
            taken = seen & ((columns[None, :] >= near[:, None]) | (columns < first)[None, :])
            s = tl.load(own + row[:, None] * COLUMNS + columns[None, :], mask=seen, other=float("-inf"))
            if SHARE:
                s = tl.where(seen, s * scale, float("-inf"))
                mass = tl.exp(s - tl.max(s, 1)[:, None])
                order = tl.where(seen, ordered(mass), 0).to(tl.uint32)
                whole = tl.where(share < 1, share * tl.sum(mass, 1), float("inf"))
                kept = (heaviest(order, mass, whole, least, True) & seen) | taken
            else:
                order = tl.where(seen & (s != float("-inf")), ordered(s), 0).to(tl.uint32)
                order = tl.where(taken, 0xFFFFFFFF, order).to(tl.uint32)
                kept = heaviest(order, s, 0.0, least, False) & (order != 0)
            there = row < queries - m
            store_lists(kept, indices, counts, head * queries + m + row, there, columns, width)
        tl.debug_barrier()
