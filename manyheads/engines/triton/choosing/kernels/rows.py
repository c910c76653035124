"""The heaviest entries of rows that fit in registers, by bisection: a row is never sorted.

Floats are compared as integers of the same order (`ordered`). Bit by bit, the greatest of them is found of which those
that are no less are enough; what is above it is kept, and of what equals it the first ones. Rows are done once so few
are left that there is nothing to tell apart.

Rows are tiles [R, C, L], each cut into C lines: so a row lies in few lanes of one warp, and sums of rows need neither
shared memory nor many moves between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

EACH = tl.constexpr(4)  # bits, until it is asked whether all rows are done
OFF = tl.constexpr(2.0**-15)  # that a sum of float32 is off by, at most, as a share of all


@triton.jit
def columns_of(C: tl.constexpr, L: tl.constexpr):
    """int32 [1, C, L]: the place of each entry in its row."""
    return (tl.arange(0, C) * L)[None, :, None] + tl.arange(0, L)[None, None, :]


@triton.jit
def total(x):
    """[R] of x [R, C, L]."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def ahead(x):
    """[R, C, L]: the sum of what is before each entry of its row."""
    whole = tl.sum(x, 2)
    return tl.cumsum(x, 2) - x + (tl.cumsum(whole, 1) - whole)[:, :, None]


@triton.jit
def ordered(x):
    """uint32 in the order of float32; NaN the greatest, -inf the smallest, and nothing is 0."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 is no less
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, bits).to(tl.uint32)


@triton.jit
def heaviest(order, mass, columns, share, least, MASS: tl.constexpr, COUNTED: tl.constexpr, BITS: tl.constexpr):
    """bool [R, C, L]: the greatest in `order` uint32 [R, C, L] less than 2^BITS, `least` of them if COUNTED, and so
    many that their mass float32 [R, C, L] reaches share [R] if MASS. Those of order 0 are never taken.

    If not COUNTED, `order` is the bits of a mass that is no less than 0.
    """
    limit = tl.zeros([order.shape[0]], tl.uint32)  # as many as there are, or enough, are no less
    span = tl.full([], 2**BITS - 1, tl.uint32)  # and fewer than are enough are beyond limit + span
    done = limit != limit
    wanted = limit != limit  # something
    if MASS:
        mass_low = total(mass)
        mass_high = tl.zeros_like(mass_low)
        off = mass_low * OFF
        done = share == float("inf")
        wanted = share > 0
    if COUNTED:
        low = total((order != 0).to(tl.int32))
        high = tl.zeros_like(low)
        done = done | (low <= least)
        wanted = wanted | (least > 0)
    going = tl.max((~done).to(tl.int32), 0)
    for _ in range(0, BITS, EACH):
        if going > 0:
            for _step in tl.static_range(EACH):
                half = span >> 1
                higher = limit + (span - half)
                above = order >= higher[:, None, None]
                enough = higher == higher
                if MASS:
                    weight = total(tl.where(above, mass, 0.0))
                    enough = weight >= share
                if COUNTED:
                    number = total(above.to(tl.int32))
                    enough = enough & (number >= least)
                    low, high = tl.where(enough, number, low), tl.where(enough, high, number)
                else:
                    mass_low, mass_high = tl.where(enough, weight, mass_low), tl.where(enough, mass_high, weight)
                limit = tl.where(enough, higher, limit)
                span = half
            if COUNTED:
                done = (low - high <= 1) | (low <= least)
            else:  # two would weigh more
                done = mass_low - mass_high + off < 2 * limit.to(tl.float32, bitcast=True)
            if MASS:
                done = done | (share == float("inf"))
            going = tl.where(span == 0, -tl.max((~done).to(tl.int32), 0), tl.max((~done).to(tl.int32), 0))
    below = tl.where(wanted, tl.maximum(limit, 1) - 1, 2**32 - 1).to(tl.uint32)
    end = tl.zeros(limit.shape, tl.int32)  # of what equals it and is kept
    if going < 0:  # of equal ones the first
        above = order > limit[:, None, None]
        tied = (order == limit[:, None, None]) & (order != 0)
        place = ahead(tied.to(tl.int32))
        needed = tied != tied
        if COUNTED:
            needed = total(above.to(tl.int32))[:, None, None] + place < least
        if MASS:
            before = total(tl.where(above, mass, 0.0))[:, None, None] + place.to(tl.float32) * mass
            needed = needed | (before < share[:, None, None])
        below = limit
        end = tl.max(tl.max(tl.where(tied & needed, columns + 1, 0), 1), 1)
    return (order > below[:, None, None]) | ((order == below[:, None, None]) & (columns < end[:, None, None]))


@triton.jit
def store_lists(kept, indices, counts, row, there, columns, width):
    """The numbers of what is kept, ascending, and how many there are, of rows that are there; others keep nothing."""
    number = kept.to(tl.int32)
    own = indices + row * width
    listed = tl.zeros(kept.shape, tl.int32) + columns
    # What is said of the places is true where four in a row are kept; so threads keep the entries that they have.
    place = tl.max_contiguous(own[:, None, None] + ahead(number), [1, 1, 4])
    tl.store(place, listed, mask=kept)
    tl.store(counts + row, total(number), mask=there)


@triton.jit(do_not_specialize=["rows", "n", "width", "share_step", "least"])
def heaviest_of_rows(
    mass, share, kept, indices, counts, rows, n, width, share_step, least, FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Of each row of mass [rows, n], as a map `kept` uint8 [rows, n], or as lists, with None for the map.

    share: float32 of each row, share_step apart; None: -inf is never taken. FIRST: entry 0 before all others.
    Grid: rows / ROWS.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = columns_of(COLUMNS // LINE, LINE)
    there = row < rows
    inside = there[:, None, None] & (columns < n)
    x = tl.load(mass + row[:, None, None] * n + columns, mask=inside, other=0.0).to(tl.float32)
    able = inside if share is not None else inside & (x != float("-inf"))
    order = ordered(x)
    if FIRST:
        order = tl.where(columns == 0, 0xFFFFFFFF, order).to(tl.uint32)
    order = tl.where(able, order, 0).to(tl.uint32)
    if share is None:
        chosen = heaviest(order, x, columns, 0.0, least, False, True, 32)
    else:
        wanted = tl.load(share + row * share_step, mask=there, other=1.0)
        wanted = tl.where(wanted < 1, wanted, float("inf"))  # a share of 1 is all
        chosen = heaviest(order, x, columns, wanted, least, True, True, 32)
    if kept is None:
        store_lists(chosen, indices, counts, row, there, columns, width)
    else:
        tl.store(kept + row[:, None, None] * n + columns, chosen.to(tl.uint8), mask=inside)
