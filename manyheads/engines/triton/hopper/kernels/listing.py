"""From lists of blocks, or from maps, to lists of tiles, in plain Triton: one program for each row of tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "row_blocks", "per_row", "row_shift", "tiles", "per_block", "last", "width", "states_batch",
        "states_head",
    ]
)  # fmt: skip
def listing(
    out, listed, counts, states, heads, rows, row_blocks, per_row, row_shift, tiles, per_block, last, width,
    states_batch, states_head, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The tiles of one row: how many, then 2 * tile + partial for each, ascending. Grid: rows * heads * batch.

    Row r is part of query block (r + row_shift) // per_row of row_blocks. A listed key block is per_block tiles, of
    which 0 to tiles - 1 exist, and tile `last` sticks out. states: uint8 [batch | 1, heads | 1, rows, tiles], what the
    mask makes of them; None if it allows all. listed, counts: the lists [batch, heads, row_blocks, width] and how many
    of each are meant. out: LISTS, with entries for a tile behind the last one, where there is nothing, up to the next
    multiple of STEP.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid % rows
    head = pid // rows
    block = (row + row_shift) // per_row
    at = head * row_blocks + block
    first = at * width
    size = tl.load(counts + at).to(tl.int64) * per_block
    line = pid * (1 + (tl.maximum(width, 1) * per_block + STEP - 1) // STEP * STEP)
    if states is not None:
        states += head // heads * states_batch + head % heads * states_head + row * tiles
    number = tl.full([], 0, tl.int32)
    for step in range(0, size, SLOTS):
        slot = step + tl.arange(0, SLOTS)
        inside = slot < size
        found = tl.load(listed + first + slot // per_block, mask=inside, other=0).to(tl.int64)
        tile = found * per_block + slot % per_block
        kept = inside & (tile < tiles)
        partial = tile == last
        if states is not None:
            state = tl.load(states + tile, mask=kept, other=0)
            kept = kept & (state != 0)  # EMPTY
            partial = partial | (state == 1)  # PARTIAL
        place = line + number + tl.cumsum(kept.to(tl.int32), 0)
        tl.store(out + place, (2 * tile + partial.to(tl.int64)).to(tl.int32), mask=kept)
        number += tl.sum(kept.to(tl.int32), 0)
    tl.store(out + line, number)
    rest = tl.arange(0, STEP)  # a kernel reads whole steps, and one in any case
    missing = (tl.maximum(number, 1) + STEP - 1) // STEP * STEP - number
    tl.store(out + line + 1 + number + rest, 2 * tiles + 1, mask=rest < missing)


@triton.jit(do_not_specialize=["rows", "columns", "row_step", "column_step", "last"])
def tiles_needed(out, states, rows, columns, row_step, column_step, last, SLOTS: tl.constexpr):
    """The tiles of one row of a map: how many, then 2 * tile + partial for each, ascending, and one 1 more if there is
    room. Grid: rows * heads * batch.

    states: uint8 [batch, heads, rows, columns], or turned; the steps are those of rows and columns. Tile `last` of the
    columns sticks out: the mask must look at it. out: int32 [batch, heads, rows, 1 + columns].
    """
    pid = tl.program_id(0).to(tl.int64)
    states += pid // rows * rows * columns + pid % rows * row_step
    line = out + pid * (1 + columns)
    number = tl.full([], 0, tl.int32)
    for step in range(0, columns, SLOTS):
        tile = step + tl.arange(0, SLOTS)
        state = tl.load(states + tile.to(tl.int64) * column_step, mask=tile < columns, other=0)
        kept = state != 0  # EMPTY
        partial = (state == 1) | (tile == last)  # PARTIAL
        tl.store(line + number + tl.cumsum(kept.to(tl.int32), 0), 2 * tile + partial.to(tl.int32), mask=kept)
        number += tl.sum(kept.to(tl.int32), 0)
    tl.store(line, number)
    tl.store(line + 1 + number, 1, mask=number < columns)  # which a kernel reads in any case
