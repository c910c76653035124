"""A bit for each query block and key block, and, where these are no tiles, the tiles that have one, in plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["front", "query_blocks", "width", "chunks", "columns"])
def mark(
    bits, free, indices, counts, front, query_blocks, width, chunks, columns, SLOTS: tl.constexpr,
    ZEROS: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """bits: int32 [heads, chunks, columns], bit m % 32 of word m // 32 says that query block m lists the key block; or,
    ALONG the lists, [heads, 32 chunks, columns], bit n % 32 of word n // 32 that it lists key block n. indices: lists
    [heads, query_blocks, width]. free: int32 [1] that becomes `front`, or None. Grid: heads * chunks, each program has
    32 query blocks."""
    ROWS: tl.constexpr = 32 if ALONG else 1
    pid = tl.program_id(0).to(tl.int64)
    own = bits + pid * ROWS * columns
    for first in range(0, ROWS * columns, ZEROS):
        word = first + tl.arange(0, ZEROS)
        tl.store(own + word, tl.full([ZEROS], 0, tl.int32), mask=word < ROWS * columns)
    if free is not None:
        tl.store(free, front, mask=pid == 0)
    tl.debug_barrier()
    place = tl.arange(0, 32)
    block = pid % chunks * 32 + place
    row = pid // chunks * query_blocks + block
    number = tl.load(counts + row, mask=block < query_blocks, other=0)
    for first in range(0, tl.max(number, 0), SLOTS):
        slot = first + tl.arange(0, SLOTS)
        meant = slot[None, :] < number[:, None]
        listed = tl.load(indices + row[:, None] * width + slot[None, :], mask=meant, other=0)
        if ALONG:
            word = place[:, None] * columns + listed // 32
            bit = listed % 32
        else:
            word = listed
            bit = tl.full([32, SLOTS], 0, tl.int32) + place[:, None]
        tl.atomic_or(own + word, tl.full([32, SLOTS], 1, tl.int32) << bit, mask=meant, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "columns", "q_len", "kv_len", "first", "chunks", "key_blocks", "size", "last", "states_batch",
        "states_head",
    ]
)  # fmt: skip
def uniting(
    out, bits, states, heads, rows, columns, q_len, kv_len, first, chunks, key_blocks, size, last, states_batch,
    states_head, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SLOTS: tl.constexpr, ALONG: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The tiles of one row in which some query lists some key: how many, then 2 * tile + partial for each, ascending.
    Partial are those with a pair that is not listed, or that the mask must look at. Grid: rows * heads * batch.

    first: the place of the first query in its block, a multiple of 32, so that 32 queries have one word. Tile `last`
    of the columns sticks out. states: uint8 [batch | 1, heads | 1, rows, columns], as in listing. size: of a row of
    `out`. TURNED: rows are keys.
    """
    PARTS: tl.constexpr = KEYS // KEY_BLOCK if KEYS > KEY_BLOCK else 1
    pid = tl.program_id(0).to(tl.int64)
    row = pid % rows
    head = pid // rows
    bits += head * chunks * key_blocks
    if states is not None:
        states += head // heads * states_batch + head % heads * states_head + row * columns
    number = tl.full([], 0, tl.int32)
    for step in range(0, columns, SLOTS):
        tile = step + tl.arange(0, SLOTS)
        if TURNED:
            query = tile * QUERIES
            key = row * KEYS
        else:
            query = row * QUERIES
            key = tile * KEYS
        inside = (tile < columns) & (key < kv_len)
        some = tl.full([SLOTS], 0, tl.int64)
        others = tl.full([SLOTS], 0, tl.int64)
        if ALONG:
            begin = (query + first) // QUERY_BLOCK
            end = (tl.minimum(query + QUERIES, q_len) - 1 + first) // QUERY_BLOCK
            parts = tl.maximum(tl.minimum(PARTS, (kv_len + KEY_BLOCK - 1) // KEY_BLOCK - key // KEY_BLOCK), 0)
            own = ((tl.full([SLOTS], 1, tl.int64) << parts) - 1) << (key // KEY_BLOCK % 32)
            for block in range(0, (QUERIES - 1) // QUERY_BLOCK + 2):
                exists = inside & (begin + block <= end)
                at = bits + (begin + block) * key_blocks + key // (32 * KEY_BLOCK)
                word = tl.load(at, mask=exists, other=0).to(tl.int64)
                some = some | (word & own)
                others = others | tl.where(exists, ~word & own, 0)
        for part in tl.static_range(0 if ALONG else PARTS):
            block = key // KEY_BLOCK + part
            for group in tl.static_range(QUERIES // 32):
                low = query + 32 * group
                exists = inside & (low < q_len) & (block < key_blocks)
                begin = (low + first) // QUERY_BLOCK
                end = (tl.minimum(low + 31, q_len - 1) + first) // QUERY_BLOCK
                word = tl.load(bits + begin // 32 * key_blocks + block, mask=exists, other=0).to(tl.int64)
                own = tl.where(exists, (tl.full([SLOTS], 2, tl.int64) << (end - begin)) - 1, 0) << (begin % 32)
                some = some | (word & own)
                others = others | (~word & own)
        kept = some != 0
        partial = (others != 0) | (tile == last)
        if states is not None:
            state = tl.load(states + tile, mask=kept, other=0)
            kept = kept & (state != 0)  # EMPTY
            partial = partial | (state == 1)  # PARTIAL
        place = pid * size + number + tl.cumsum(kept.to(tl.int32), 0)
        tl.store(out + place, (2 * tile + partial.to(tl.int32)).to(tl.int32), mask=kept)
        number += tl.sum(kept.to(tl.int32), 0)
    tl.store(out + pid * size, number)
    tl.store(out + pid * size + 1, 1, mask=number == 0)  # which a kernel reads in any case
