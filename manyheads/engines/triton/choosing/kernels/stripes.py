"""How the softmax of a few queries spreads over key blocks and over block diagonals.

Each program multiplies some queries and keys once, and leaves for each query what its weights among these keys sum up
to, all of them and by block and diagonal, against the greatest one. What sums they are parts of is known afterwards.
Nothing is larger than a few numbers for each query and block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.scores import products

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(q, query, queries, q_m, D: tl.constexpr, PD: tl.constexpr):
    """[R, PD] of the rows `query`, q_m apart."""
    dims = tl.arange(0, PD)
    given = (query < queries)[:, None] & (dims < D)[None, :]
    return tl.load(q + query[:, None].to(tl.int64) * q_m + dims[None, :], mask=given, other=0.0)


@triton.jit
def _first(m, tile, queries, n, size, PART: tl.constexpr):
    """The first diagonal that queries from m on may share with a tile of keys."""
    return tl.maximum(n - queries + m - tile * PART - PART + 1, 0) // size


@triton.jit(do_not_specialize=["heads", "group", "queries", "n", "tiles", "size", "columns", "diagonals", "scale"])
def parts(
    q, k, tops, totals, sums, heads, group, queries, n, tiles, size, columns, diagonals, scale, q_b, q_h, q_m, k_b,
    k_h, k_n, D: tl.constexpr, PD: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each tile of PART keys and each query its greatest score, log2 of the sum of its weights, float32 [batch,
    heads, tiles, queries], and the sums of its weights, e^(score - greatest), over so many `columns` and `diagonals`
    that they may be in, float32 [batch, heads, tiles, columns + diagonals, queries]. Queries [batch, heads, queries, D]
    are the last ones of the keys [batch, heads / group, n, D], with these strides. Grid: batch * heads * tiles *
    queries / ROWS."""
    pid = tl.program_id(0)
    per_tile = tl.cdiv(queries, ROWS)
    m = pid % per_tile * ROWS
    tile = pid // per_tile % tiles
    head = (pid // (per_tile * tiles)).to(tl.int64)
    query = m + tl.arange(0, ROWS)
    key = tile * PART + tl.arange(0, PART)
    x = _rows(q + head // heads * q_b + head % heads * q_h, query, queries, q_m, D, PD)
    k += head // heads * k_b + head % heads // group * k_h
    s = products(x, k, None, key, n, k_n, D, PD, PRECISION) * (scale * LOG2E)
    own = n - queries + query  # the keys that they stand at
    if tile * PART + PART > n - queries + m:
        seen = (query < queries)[:, None] & (key[None, :] <= own[:, None]) & (key < n)[None, :]
        s = tl.where(seen, s, float("-inf"))
    best = tl.max(s, 1)
    top = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(s - top[:, None])
    there = query < queries
    at = head * tiles + tile
    # -inf where nothing is seen: 0 there would be infinitely more than what is far below it.
    tl.store(tops + at * queries + query, best, mask=there)
    total = tl.sum(weights, 1)
    found = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(totals + at * queries + query, found, mask=there)
    sums += at * (columns + diagonals) * queries + query
    if columns == 1:
        tl.store(sums, total, mask=there)
    else:
        for column in range(0, columns):
            inside = (key // size == tile * PART // size + column)[None, :]
            tl.store(sums + column * queries, tl.sum(tl.where(inside, weights, 0.0), 1), mask=there)
    first = _first(m, tile, queries, n, size, PART)
    highest = n - queries + m + ROWS - 1 - tile * PART
    for diagonal in range(0, diagonals):
        begin = (first + diagonal) * size
        if begin <= highest:
            inside = (key[None, :] <= (own - begin)[:, None]) & (key[None, :] > (own - begin - size)[:, None])
            tl.store(sums + (columns + diagonal) * queries, tl.sum(tl.where(inside, weights, 0.0), 1), mask=there)


@triton.jit(do_not_specialize=["queries", "tiles"])
def divisors(totals, out, queries, tiles, TILES: tl.constexpr, ROWS: tl.constexpr):
    """out float32 [heads, queries]: log2 of the sums over tiles of 2^totals [heads, tiles, queries]; 0 where nothing is
    seen. Grid: heads * queries / ROWS."""
    parts = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // parts).to(tl.int64)
    query = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    top = tl.full([TILES, ROWS], float("-inf"), tl.float32)
    whole = tl.zeros([TILES, ROWS], tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        there = (tile < tiles)[:, None] & (query < queries)[None, :]
        x = tl.load(totals + (head * tiles + tile)[:, None] * queries + query[None, :], mask=there, other=float("-inf"))
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        whole = whole * tl.exp2(top - safe) + tl.exp2(x - safe)
        top = higher
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    whole = tl.sum(whole * tl.exp2(top - highest[None, :]), 0)
    found = highest + tl.log2(tl.where(whole > 0, whole, 1.0))
    tl.store(out + head * queries + query, found, mask=query < queries)


@triton.jit(do_not_specialize=["queries", "n", "tiles", "blocks", "size", "columns", "diagonals"])
def stripes(
    tops, divisor, sums, out, queries, n, tiles, blocks, size, columns, diagonals, ROWS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """out float32 [2, batch * heads, blocks]: the mean over the queries of the weights of keys that stand in a block of
    `size`, and of those that are so many blocks apart. divisor: float32 [batch, heads, queries], log2; else as above.
    Grid: 2 * batch * heads * blocks."""
    pid = tl.program_id(0)
    block = pid % blocks
    of_all = tl.num_programs(0) // (2 * blocks)
    head = (pid // blocks % of_all).to(tl.int64)
    diagonal = pid // blocks >= of_all
    total = tl.zeros([ROWS], tl.float32)
    for m in range(0, queries, ROWS):
        query = m + tl.arange(0, ROWS)
        there = query < queries
        own = tl.load(divisor + head * queries + query, mask=there, other=0.0)
        last = n - queries + tl.minimum(m + ROWS, queries) - 1
        begin = tl.where(diagonal, n - queries + m - (block + 1) * size + 1, block * size)
        end = tl.where(diagonal, last - block * size, (block + 1) * size - 1)
        for tile in range(tl.maximum(begin, 0) // PART, tl.minimum((end + PART) // PART, tiles)):
            slot = tl.where(
                diagonal, columns + block - _first(m, tile, queries, n, size, PART), block - tile * PART // size
            )
            at = head * tiles + tile
            part = tl.load(sums + (at * (columns + diagonals) + slot) * queries + query, mask=there, other=0.0)
            total += part * tl.exp2(tl.load(tops + at * queries + query, mask=there, other=0.0) - own)
    tl.store(out + pid, tl.sum(total, 0) / tl.maximum(queries, 1))
