"""Queries in the order of the blocks that they chose, by counting, in plain Triton: a bit for each row and block says
that the row lists it, and a row's place among those of its block is the number of bits before its own.

An entry is one listed block of one query: entries are [batch, heads, size, width], and the rows of one key head are
those of its group of heads, [group, size]. A bit: int32 words [batch * kv_heads, blocks, chunks], 32 rows to a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def entry_of(
    indices, counts, entry, entries, width, size, group, heads, start, before, batch_step, head_step,
    QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some entries, int32: the key head, int64, the row of it, the query's position, the block, and whether it is
    meant. counts: None if all are."""
    line = entry // width
    head = line // size
    i = start + line % size
    at = (head // heads).to(tl.int64) * batch_step + head % heads * head_step + i // QUERY_BLOCK - before
    meant = entry < entries
    if counts is not None:
        meant = meant & (entry % width < tl.load(counts + at, mask=meant, other=0))
    block = tl.load(indices + at * width + entry % width, mask=meant, other=0)
    return (head // group).to(tl.int64), head % group * size + line % size, i, block, meant


@triton.jit(
    do_not_specialize=[
        "entries", "width", "size", "group", "heads", "start", "before", "batch_step", "head_step", "blocks", "chunks",
    ]
)  # fmt: skip
def mark(
    words, own, indices, counts, entries, width, size, group, heads, start, before, batch_step, head_step, blocks,
    chunks, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """words: all 0 before. own: uint8 [batch, heads, size], all 0 before, 1 for queries that list the block they stand
    in; these entries, and those of later blocks, have no bits then. None: all entries have. Grid: entries / SLOTS.

    indices, counts: lists [.., .., query blocks, width], batch_step and head_step of them apart; the first query stands
    at position `start`, and the first list is of query block `before`."""
    entry = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    key_head, row, i, block, meant = entry_of(
        indices, counts, entry, entries, width, size, group, heads, start, before, batch_step, head_step, QUERY_BLOCK
    )
    if own is not None:
        tl.store(own + entry // width, 1, mask=meant & (block == i // KEY_BLOCK))
        meant = meant & (block < i // KEY_BLOCK)
    bit = tl.full([SLOTS], 1, tl.int32) << row % 32
    tl.atomic_or(words + (key_head * blocks + block) * chunks + row // 32, bit, mask=meant, sem="relaxed")


@triton.jit
def ones_of(word):
    """How many bits are 1 of numbers that are not negative."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit(do_not_specialize=["number"])
def count(words, numbers, number, SLOTS: tl.constexpr):
    """numbers: 0, then how many bits each word has. Grid: number / SLOTS."""
    at = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    word = tl.load(words + at, mask=at < number, other=0)
    tl.store(numbers + 1 + at, ones_of(word & 0x7FFFFFFF) + tl.where(word < 0, 1, 0), mask=at < number)
    tl.store(numbers + at, 0, mask=at == 0)


@triton.jit(
    do_not_specialize=[
        "entries", "width", "size", "group", "heads", "start", "before", "batch_step", "head_step", "blocks", "chunks",
        "places",
    ]
)  # fmt: skip
def place(
    rows, slots, words, sums, shifts, indices, counts, entries, width, size, group, heads, start, before, batch_step,
    head_step, blocks, chunks, places, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    PAST: tl.constexpr,
):  # fmt: skip
    """rows: int32 [batch * kv_heads, places], which row stands at a place, -1 before. slots: int32, the place of each
    entry, -1 for those without a bit. sums: of the numbers of bits before each word. shifts: int32 [batch * kv_heads,
    blocks], what a place is more than its sum; None if all places of a head have a row. PAST: only blocks before a
    query's own have bits. Grid: entries / SLOTS.
    """
    entry = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    key_head, row, i, block, meant = entry_of(
        indices, counts, entry, entries, width, size, group, heads, start, before, batch_step, head_step, QUERY_BLOCK
    )
    if PAST:
        meant = meant & (block < i // KEY_BLOCK)
    line = key_head * blocks + block
    at = line * chunks + row // 32
    bit = tl.full([SLOTS], 1, tl.int32) << row % 32
    lower = tl.load(words + at, mask=meant, other=0) & (bit - 1)
    found = tl.load(sums + at, mask=meant, other=0) + ones_of(lower)
    if shifts is None:
        found -= (key_head * places).to(tl.int32)
    else:
        found += tl.load(shifts + line, mask=meant, other=0)
    tl.store(slots + entry, tl.where(meant, found, -1), mask=entry < entries)
    tl.store(rows + key_head * places + found, row, mask=meant)
