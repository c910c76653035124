"""The heaviest entries of rows that fit in registers, by bisection: a row is never sorted.

Floats are compared as integers of the same order (`ordered`). Bit by bit, the greatest of them is found of which those
that are no less are enough; what is above it is kept, and of what equals it the first ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """uint32 in the order of float32; NaN the greatest, -inf the smallest, and nothing is 0."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 is no less
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, bits).to(tl.uint32)


@triton.jit
def heaviest(order, mass, share, least, MASS: tl.constexpr):
    """bool [R, N]: the greatest in `order` uint32 [R, N], `least` of them, and so many that their mass [R, N] reaches
    share [R] if MASS. Those of order 0 come last."""
    bit = tl.full([order.shape[0]], 0x80000000, tl.uint32)
    limit = bit ^ bit
    for _ in range(32):
        higher = limit | bit
        above = order >= higher[:, None]
        enough = tl.sum(above.to(tl.int32), 1) >= least
        if MASS:
            enough = enough & (tl.sum(tl.where(above, mass, 0.0), 1) >= share)
        limit = tl.where(enough, higher, limit)
        bit = bit >> 1
    above = order > limit[:, None]
    tied = order == limit[:, None]
    ahead = tl.sum(above.to(tl.int32), 1)[:, None] + tl.cumsum(tied.to(tl.int32), 1) - 1
    kept = tied & (ahead < least)
    if MASS:
        own = tl.where(tied, mass, 0.0)
        before = tl.sum(tl.where(above, mass, 0.0), 1)[:, None] + tl.cumsum(own, 1) - own
        kept = kept | (tied & (before < share[:, None]))
    return above | kept


@triton.jit
def store_lists(kept, indices, counts, row, there, columns, width):
    """The numbers of what is kept, ascending, and how many there are, of rows that are there."""
    number = kept.to(tl.int32)
    own = indices + row * width
    listed = tl.zeros(kept.shape, tl.int32) + columns[None, :]
    tl.store(own[:, None] + tl.cumsum(number, 1) - 1, listed, mask=kept & there[:, None])
    tl.store(counts + row, tl.sum(number, 1), mask=there)


@triton.jit(do_not_specialize=["rows", "n", "width", "share_step", "least"])
def heaviest_of_rows(
    mass, share, kept, indices, counts, rows, n, width, share_step, least, FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each row of mass [rows, n], as a map `kept` uint8 [rows, n], or as lists, with None for the map.

    share: float32 of each row, share_step apart; None: -inf is never taken. FIRST: entry 0 before all others.
    Grid: rows / ROWS.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = row < rows
    inside = there[:, None] & (columns < n)[None, :]
    x = tl.load(mass + row[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    able = inside if share is not None else inside & (x != float("-inf"))
    order = ordered(x)
    if FIRST:
        order = tl.where(columns[None, :] == 0, 0xFFFFFFFF, order).to(tl.uint32)
    order = tl.where(able, order, 0).to(tl.uint32)
    if share is None:
        chosen = heaviest(order, x, 0.0, least, False) & able
    else:
        wanted = tl.load(share + row * share_step, mask=there, other=1.0)
        chosen = (heaviest(order, x, wanted, least, True) | (wanted >= 1)[:, None]) & able
    if kept is None:
        store_lists(chosen, indices, counts, row, there, columns, width)
    else:
        tl.store(kept + row[:, None] * n + columns[None, :], chosen.to(tl.uint8), mask=inside)
