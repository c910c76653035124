"""How the softmax of a few queries spreads over key blocks and over block diagonals.

The keys are shared out twice: for the divisors, of which each program finds a part, and for the masses, where a program
has one key block or one diagonal of a head. Nothing is larger than a number for each query and CHUNK keys.
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
def _scores(x, k, query, key, queries, n, factor, k_n, D: tl.constexpr, PD: tl.constexpr, PRECISION: tl.constexpr):
    """factor q.k [R, N] of the last queries and the keys up to them, -inf elsewhere; and how far they are apart."""
    apart = (n - queries + query)[:, None] - key[None, :]
    s = products(x, k, None, key, n, k_n, D, PD, PRECISION) * factor
    return tl.where((query < queries)[:, None] & (apart >= 0), s, float("-inf")), apart


@triton.jit(do_not_specialize=["heads", "group", "queries", "n", "chunks", "scale"])
def divisors(
    q, k, out, heads, group, queries, n, chunks, scale, q_b, q_h, q_m, k_b, k_h, k_n, D: tl.constexpr, PD: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out float32 [batch, heads, chunks, queries]: log2 of the sum of e^(scale q.k) over CHUNK keys each, up to the
    query. Queries [batch, heads, queries, D] are the last ones of the keys [batch, heads / group, n, D], with these
    strides. Grid: batch * heads * tiles of ROWS * chunks."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(queries, ROWS)
    head = (pid // (tiles * chunks)).to(tl.int64)
    query = pid // chunks % tiles * ROWS + tl.arange(0, ROWS)
    begin = pid % chunks * CHUNK
    q += head // heads * q_b + head % heads * q_h
    k += head // heads * k_b + head % heads // group * k_h
    x = _rows(q, query, queries, q_m, D, PD)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, tl.minimum(begin + CHUNK, n), PART):
        key = first + tl.arange(0, PART)
        s, _ = _scores(x, k, query, key, queries, n, scale * LOG2E, k_n, D, PD, PRECISION)
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = higher
    found = top + tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(out + (head * chunks + pid % chunks) * queries + query, found, mask=query < queries)


@triton.jit(do_not_specialize=["heads", "group", "queries", "n", "blocks", "size", "scale"])
def stripes(
    q, k, divisor, out, heads, group, queries, n, blocks, size, scale, q_b, q_h, q_m, k_b, k_h, k_n, D: tl.constexpr,
    PD: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out float32 [2, batch * heads, blocks]: the mean over the queries of the weights of keys that stand in a block of
    `size`, and of those that are so many blocks apart. divisor: float32 [batch, heads, queries], log2; else as above.
    Grid: 2 * batch * heads * blocks."""
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks % (tl.num_programs(0) // (2 * blocks))).to(tl.int64)
    diagonal = pid // blocks >= tl.num_programs(0) // (2 * blocks)
    q += head // heads * q_b + head % heads * q_h
    k += head // heads * k_b + head % heads // group * k_h
    low = block * size
    total = tl.zeros([ROWS], tl.float32)
    for m in range(0, queries, ROWS):
        query = m + tl.arange(0, ROWS)
        x = _rows(q, query, queries, q_m, D, PD)
        own = tl.load(divisor + head * queries + query, mask=query < queries, other=0.0)
        # Of these queries those on the diagonal are size + ROWS - 1 keys, at most.
        begin = tl.where(diagonal, n - queries + m - low - size + 1, low)
        end = tl.where(diagonal, tl.minimum(n - queries + m + ROWS - low, n), tl.minimum(low + size, n))
        for first in range(tl.maximum(begin, 0), end, PART):
            key = first + tl.arange(0, PART)
            s, apart = _scores(x, k, query, key, queries, n, scale * LOG2E, k_n, D, PD, PRECISION)
            place = tl.where(diagonal, apart, tl.zeros([ROWS, PART], tl.int32) + key[None, :])
            inside = (place >= low) & (place < low + size) & (key < n)[None, :]
            total += tl.sum(tl.where(inside, tl.exp2(s - own[:, None]), 0.0), 1)
    tl.store(out + pid, tl.sum(total, 0) / tl.maximum(queries, 1))
