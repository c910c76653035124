"""Lists of key blocks turned round, in plain Triton: from the bits of uniting.py, 32 query blocks to a word."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "there", "chunks", "key_blocks", "per_row", "tiles", "per_block", "shift", "last",
        "states_batch", "states_head",
    ]
)  # fmt: skip
def turning(
    out, free, bits, states, heads, rows, there, chunks, key_blocks, per_row, tiles, per_block, shift, last,
    states_batch, states_head, WORDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The tiles of queries of one row of tiles of keys: how many, then 2 * tile + partial for each, ascending. They lie
    from `free` int32 [1] on, and in any order, as who asks first has the first place. Grid: rows * heads * batch.

    Row r is part of key block r // per_row; rows from `there` on are empty. A query block is per_block tiles, from
    block * per_block - shift on; of them 0 to tiles - 1 exist, and tile `last` sticks out. states: uint8 [batch | 1,
    heads | 1, there, tiles], what the mask makes of them; None if it allows all. bits: int32 [batch, heads, chunks,
    key_blocks]. out: JUMPS.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid % rows
    head = pid // rows
    bits += head * chunks * key_blocks + row // per_row
    if states is not None:
        states += head // heads * states_batch + head % heads * states_head + row * tiles
    blocks = tl.full([], 0, tl.int32)
    for first in range(0, tl.where(row < there, chunks, 0), WORDS):
        chunk = first + tl.arange(0, WORDS)
        word = tl.load(bits + chunk.to(tl.int64) * key_blocks, mask=chunk < chunks, other=0)
        blocks += tl.sum(tl.sum((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1), 0)
    line = tl.atomic_add(free, 1 + blocks * per_block, sem="relaxed").to(tl.int64)
    tl.store(out + pid, (line - pid).to(tl.int32))
    number = tl.full([], 0, tl.int32)
    for step in range(0, tl.where(blocks > 0, tiles, 0), SLOTS):
        tile = step + tl.arange(0, SLOTS)
        block = (tile + shift) // per_block
        inside = tile < tiles
        word = tl.load(bits + (block // 32).to(tl.int64) * key_blocks, mask=inside, other=0)
        kept = ((word >> (block % 32)) & 1) != 0
        partial = tile == last
        if states is not None:
            state = tl.load(states + tile, mask=inside, other=0)
            kept = kept & (state != 0)  # EMPTY
            partial = partial | (state == 1)  # PARTIAL
        place = line + number + tl.cumsum(kept.to(tl.int32), 0)
        tl.store(out + place, 2 * tile + partial.to(tl.int32), mask=kept)
        number += tl.sum(kept.to(tl.int32), 0)
    tl.store(out + line, number)
