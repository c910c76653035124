"""Blocks that are no tiles: a bit for each query block and key block, and the tiles that have one, in plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries", "width", "query_blocks", "chunks", "key_blocks"])
def mark(
    bits, indices, counts, entries, width, query_blocks, chunks, key_blocks, SLOTS: tl.constexpr
):  # fmt: skip
    """bits: int32 [heads, chunks, key_blocks], all 0 before; bit m % 32 of word m // 32 says that query block m lists
    the key block. Whoever sets a bit first, the words are the same. indices: the lists [heads, query_blocks, width],
    entries in all. Grid: entries / SLOTS."""
    entry = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    row = entry // width
    meant = entry < entries
    meant = meant & (entry % width < tl.load(counts + row, mask=meant, other=0))
    listed = tl.load(indices + entry, mask=meant, other=0)
    block = row % query_blocks
    word = (row // query_blocks * chunks + block // 32) * key_blocks + listed
    bit = tl.full([SLOTS], 1, tl.int32) << (block % 32).to(tl.int32)
    tl.atomic_or(bits + word, bit, mask=meant, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "columns", "q_len", "kv_len", "first", "chunks", "key_blocks", "size", "last", "states_batch",
        "states_head",
    ]
)  # fmt: skip
def uniting(
    out, bits, states, heads, rows, columns, q_len, kv_len, first, chunks, key_blocks, size, last, states_batch,
    states_head, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SLOTS: tl.constexpr, TURNED: tl.constexpr,
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
        for part in tl.static_range(PARTS):
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
