"""Tournaments between chunks of keys: a program for a query block, with all rounds. Chunks and scores lie in a place of
the program's own, which the cache holds; keys are picked up from where they lie, those of a few halves at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import ordered


@triton.jit
def score(
    x, there, k, centres, likes, number, k_n, key_block, key_stride, D: tl.constexpr, PD: tl.constexpr,
    KEYS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """likes float32 [number, KEYS]: the greatest q.k of the rows x [R, PD] that are `there` and each sampled key of the
    blocks `centres`, -inf where there is none."""
    part = tl.arange(0, PART)
    dims = tl.arange(0, PD)
    for first in range(0, number * KEYS, PART):
        centre = tl.load(centres + (first + part) // KEYS, mask=first + part < number * KEYS, other=-1)
        place = key_stride - 1 + (first + part) % KEYS * key_stride
        able = (centre >= 0) & (place < key_block)
        key = tl.where(able, centre * key_block + place, 0).to(tl.int64) * k_n
        if D == PD:
            y = tl.load(k + key[:, None] + dims[None, :])
        else:
            y = tl.load(k + key[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0.0)
        s = tl.dot(y, tl.trans(x), input_precision=PRECISION)
        s = tl.max(tl.where(there[None, :], s, float("-inf")), 1)
        tl.store(likes + first + part, tl.where(able, s, float("-inf")))


@triton.jit
def greatest(order, able, count):
    """bool [N]: the `count` greatest in `order` uint32 [N], of equal ones the first; 0 where not able, then the first
    ones as well. Bit by bit as in rows.py, but from the first bit that differs on, and only until `count` are told."""
    high = tl.max(order, 0)
    low = tl.min(tl.where(able, order, 0xFFFFFFFF).to(tl.uint32), 0)
    bit = tl.full([], 0x80000000, tl.uint32)
    more = tl.sum(able.to(tl.int32), 0) > count
    differ = tl.where(more, high ^ low, 0).to(tl.uint32)
    while ((bit & differ) == 0) & (bit != 0):
        bit = bit >> 1
    limit = tl.where(more, tl.where(bit != 0, high & ((bit | (bit - 1)) ^ 0xFFFFFFFF), high), 0).to(tl.uint32)
    number = count + 1
    while (bit != 0) & (number != count):
        higher = limit | bit
        enough = tl.sum((order >= higher).to(tl.int32), 0)
        limit = tl.where(enough >= count, higher, limit).to(tl.uint32)
        number = tl.where(enough >= count, enough, number)
        bit = bit >> 1
    above = order > limit
    tied = order == limit
    ahead = tl.sum(above.to(tl.int32), 0) + tl.cumsum(tied.to(tl.int32), 0) - 1
    return above | (tied & (ahead < count))


@triton.jit(
    do_not_specialize=[
        "tiles", "heads", "group", "queries", "n", "blocks", "width", "count", "query_stride", "key_stride",
        "query_block", "key_block", "offset",
    ]
)  # fmt: skip
def tournaments(
    q, k, chunks, likes, indices, counts, tiles, heads, group, queries, n, blocks, width, q_b, q_h, q_m, k_b, k_h, k_n,
    count, query_stride, key_stride, query_block, key_block, offset, D: tl.constexpr, PD: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads, blocks, width] and counts int32 [batch, heads, blocks] for q [batch, heads, queries,
    D] and k [batch, heads / group, n, D] with these strides. A program does every so many of the batch * heads * blocks
    query blocks, the last ones first.

    ROWS, OWN, CHUNKS, KEYS: powers of 2 that the sampled rows, the key blocks of a query block, count and the sampled
    keys of a block fit in. chunks: int32 [programs, 4, CHUNKS]. likes: float32 [programs, 2 CHUNKS KEYS or PART].
    """
    SPACE: tl.constexpr = max(2 * CHUNKS * KEYS, PART)
    chunks += tl.program_id(0).to(tl.int64) * (4 * CHUNKS)
    centres = chunks + 2 * CHUNKS
    likes += tl.program_id(0).to(tl.int64) * SPACE
    chunk = tl.arange(0, CHUNKS)
    half = tl.arange(0, 2 * CHUNKS)
    dims = tl.arange(0, PD)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        k_head = number // (blocks * group)  # one after the other: the cache may hold one
        head = (k_head * group + number % group).to(tl.int64)
        m = blocks - 1 - number // group % blocks
        begin = (offset // query_block + m) * query_block
        end = tl.minimum(begin + query_block, n)
        i = tl.maximum(begin, offset) + tl.arange(0, ROWS) * query_stride
        there = i < end
        at = q + head // heads * q_b + head % heads * q_h + (i - offset)[:, None].to(tl.int64) * q_m
        x = tl.load(at + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
        keys = k + head // heads * k_b + head % heads // group * k_h
        past = begin // key_block
        cut = chunk.to(tl.int64) * past // count
        next_cut = (chunk + 1).to(tl.int64) * past // count
        tl.store(chunks + chunk, cut.to(tl.int32))
        tl.store(chunks + CHUNKS + chunk, tl.where(chunk < count, next_cut, cut).to(tl.int32))
        tl.debug_barrier()
        longest = tl.cdiv(past, count)
        while longest > 1:
            low = tl.load(chunks + half // 2)
            high = tl.load(chunks + CHUNKS + half // 2)
            middle = (low + high) // 2
            low, high = tl.where(half % 2 == 0, low, middle), tl.where(half % 2 == 0, middle, high)
            able = (half < 2 * count) & (low < high)
            tl.store(centres + half, tl.where(able, (low + high) // 2, -1))
            tl.debug_barrier()
            score(
                x, there, keys, centres, likes, 2 * count, k_n, key_block, key_stride, D, PD, KEYS, PART, PRECISION
            )  # fmt: skip
            tl.debug_barrier()
            own = half[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
            s = tl.max(tl.load(likes + own, mask=able[:, None], other=float("-inf")), 1)
            kept = greatest(tl.where(able, ordered(s), 0).to(tl.uint32), able, count)
            place = tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(chunks + place, low, mask=kept)
            tl.store(chunks + CHUNKS + place, high, mask=kept)
            tl.debug_barrier()
            longest = (longest + 1) // 2
        low = tl.load(chunks + chunk)
        there_is = low < tl.load(chunks + CHUNKS + chunk)
        row = indices + (head * blocks + m) * width
        tl.store(row + tl.cumsum(there_is.to(tl.int32), 0) - 1, low, mask=there_is)
        found = tl.sum(there_is.to(tl.int32), 0)
        number_own = tl.cdiv(end, key_block) - past
        own_block = tl.arange(0, OWN)
        tl.store(row + found + own_block, past + own_block, mask=own_block < number_own)
        tl.store(counts + head * blocks + m, found + number_own)
        tl.debug_barrier()
