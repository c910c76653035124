"""Key blocks that hold a weight that counts, as products of the numbers of kernels/rounding.py estimate it.

Whole numbers up to 7 are exact in 8 bits, and so are sums of their products.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUN = tl.constexpr(32)  # tiles of keys whose finds a word has bits for
TWO, FOUR = tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(
    do_not_specialize=["heads", "group", "queries", "room", "blocks", "near", "query_block", "key_block", "offset"]
)  # fmt: skip
def outweighing(
    q, q_sizes, k, k_sizes, shared, least, words, heads, group, queries, room, blocks, near, query_block, key_block,
    offset, PD: tl.constexpr, SETS: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """words int32 [batch, heads, blocks, room / (RUN BLOCKS), BLOCKS]: bit t for whether key block RUN BLOCKS chunk +
    BLOCKS t + place holds a j with q_i.k_j sizes_i sizes_j + shared_j > least_i for an i of the query block. Of key
    blocks that reach into its last `near` keys or beyond, bits mean nothing.

    q, k: whole numbers [batch, heads, queries, PD] and [batch, heads / group, room KEYS, PD]; of k sizes [batch,
    heads / group, room KEYS] and shared [batch, heads, room KEYS] float32, of q sizes and least [batch, heads,
    queries]. A program has SETS query blocks, of up to QUERIES queries, and looks at BLOCKS key blocks at a time, of up
    to KEYS keys, of all of them if WHOLE. Grid: batch * heads * blocks / SETS.
    """
    ROWS: tl.constexpr = SETS * QUERIES
    # Of a row, a thread of Hopper's matrix units has every LANES-th PAIR of numbers: it compares these on its own.
    PAIR: tl.constexpr = min(TWO, KEYS)
    LANES: tl.constexpr = min(FOUR, KEYS // PAIR)
    sets = tl.cdiv(blocks, SETS)
    k_head = (tl.program_id(0) // (sets * group)).to(tl.int64)  # one after the other: the cache may hold one
    head = k_head * group + tl.program_id(0) % group
    first = (sets - 1 - tl.program_id(0) // group % sets) * SETS
    dims = tl.arange(0, PD)
    rows = tl.arange(0, ROWS)
    row = (offset // query_block + first + rows // QUERIES) * query_block + rows % QUERIES - offset
    there = (rows % QUERIES < query_block) & (row >= 0) & (row < queries)
    own = head * queries + row
    x = tl.load(q + own[:, None] * PD + dims[None, :], mask=there[:, None], other=0.0)
    factor = tl.load(q_sizes + own, mask=there, other=0.0)
    limit = tl.load(least + own, mask=there, other=float("inf"))
    last = tl.minimum(first + SETS, blocks)
    window = tl.maximum((offset // query_block + last) * query_block - near, 0) // key_block
    column = tl.arange(0, BLOCKS * KEYS)
    m = first + tl.arange(0, SETS)
    place = tl.arange(0, BLOCKS)
    k += k_head * room * KEYS * PD
    k_sizes += k_head * room * KEYS
    shared += head * room * KEYS
    words += (head * blocks + m)[:, None] * (room // RUN) + place[None, :]
    for begin in range(0, window, RUN * BLOCKS):
        found = tl.zeros([ROWS, BLOCKS, LANES], tl.int32)
        for part in range(0, tl.minimum(tl.cdiv(window - begin, BLOCKS), RUN)):
            j = (begin + part * BLOCKS) * KEYS + column
            size = tl.load(k_sizes + j)
            own_shared = tl.load(shared + j)
            y = tl.load(k + j[:, None] * PD + dims[None, :])
            w = tl.dot(x, tl.trans(y)) * size[None, :] * factor[:, None] + own_shared[None, :]
            if not WHOLE:
                w = tl.where((column % KEYS < key_block)[None, :], w, float("-inf"))
            greatest = tl.max(tl.max(tl.reshape(w, [ROWS, BLOCKS, KEYS // (PAIR * LANES), LANES, PAIR]), 4), 2)
            found = tl.where(greatest > limit[:, None, None], found | (1 << part), found)
        either = tl.reduce(tl.reshape(found, [SETS, QUERIES, BLOCKS, LANES]), 3, _either)
        either = tl.reduce(either, 1, _either)
        tl.store(words + begin // RUN, either, mask=(m < blocks)[:, None])


@triton.jit(
    do_not_specialize=["rows", "n", "room", "blocks", "width", "sinks", "near", "query_block", "key_block", "first"]
)
def listing(
    words, indices, counts, rows, n, room, blocks, width, sinks, near, query_block, key_block, first,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads, blocks, width] and counts int32 [batch, heads, blocks]: the first `sinks` key
    blocks, those that reach into the last `near` keys of a query block, and those between that have a bit in words, as
    above. first: the number of the first query block. Grid: rows / ROWS, rows being batch * heads * blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    after = (first + row % blocks + 1) * query_block
    window = tl.maximum(after - near, 0) // key_block
    end = tl.cdiv(tl.minimum(after, n), key_block)
    end = tl.where(row < rows, end, 0)
    place = tl.arange(0, CHUNKS * RUN * BLOCKS)
    number = tl.zeros([ROWS], tl.int32)
    for begin in range(0, tl.max(end, 0).to(tl.int32), CHUNKS * RUN * BLOCKS):
        block = (begin + place)[None, :]
        at = block // (RUN * BLOCKS) * BLOCKS + block % BLOCKS
        word = tl.load(words + row[:, None] * (room // RUN) + at, mask=block < window[:, None], other=0)
        kept = ((word >> (block // BLOCKS % RUN)) & 1) != 0
        kept = ((kept | (block < sinks) | (block >= window[:, None])) & (block < end[:, None])).to(tl.int32)
        to = indices + (row * width + number)[:, None] + tl.cumsum(kept, 1) - 1
        tl.store(to, tl.zeros(kept.shape, tl.int32) + block, mask=kept != 0)
        number += tl.sum(kept, 1)
    tl.store(counts + row, number, mask=row < rows)
