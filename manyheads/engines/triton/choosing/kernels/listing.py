"""From a map of blocks to lists: one program for a few rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "n"])
def listing(keep, indices, counts, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """indices int32 [rows, n] and counts int32 [rows] of the map keep uint8 [rows, n]. Grid: rows / ROWS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    number = tl.zeros([ROWS], tl.int32)
    for first in range(0, n, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < n)[None, :]
        kept = (tl.load(keep + row[:, None] * n + column[None, :], mask=inside, other=0) != 0).to(tl.int32)
        place = number[:, None] + tl.cumsum(kept, 1) - 1
        listed = tl.zeros([ROWS, COLUMNS], tl.int32) + column[None, :]
        tl.store(indices + row[:, None] * n + place, listed, mask=kept != 0)
        number += tl.sum(kept, 1)
    tl.store(counts + row, number, mask=there)
