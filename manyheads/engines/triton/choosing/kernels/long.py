"""The heaviest entries of rows that fit in no program's registers: as rows.py finds them, a few bits at a time, each by
one look of many programs at a chunk of a row, of which the last one to end looks at what all found."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import ordered

BITS = 3
VALUES = tl.constexpr(2**BITS)  # of a digit
DIGITS = tl.constexpr(2 * 2**BITS)  # places for them and one more


@triton.jit
def _order(x, entry, n, FIRST: tl.constexpr, SHARED: tl.constexpr):
    """The order of rows.py, 0 for what is never taken."""
    order = ordered(x)
    if FIRST:
        order = tl.where(entry == 0, 0xFFFFFFFF, order).to(tl.uint32)
    able = entry < n
    if not SHARED:
        able = able & (x != float("-inf"))
    return tl.where(able, order, 0).to(tl.uint32)


@triton.jit
def _wanted(share, row, share_step):
    """The share of a row."""
    if share is None:
        wanted = tl.full([], 1.0, tl.float32)
    else:
        wanted = tl.load(share + row * share_step)
    return wanted


@triton.jit
def _narrow(
    limits, counts, masses, wanted, number_above, mass_above, before, row, chunks, shift, least, SHARED: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Adds to the limit of a row the greatest digit with which enough is no less. number_above int32 and mass_above
    float32 [rows]: of entries beyond it; before int32 [rows, chunks]: entries equal to it in earlier chunks; all three
    once shift is 0."""
    digit = tl.arange(0, DIGITS)
    number = tl.zeros([DIGITS], tl.int32)
    weight = tl.zeros([DIGITS], tl.float32)
    for first in range(0, chunks, PART):
        chunk = first + tl.arange(0, PART)
        at = (row * chunks + chunk)[:, None] * DIGITS + digit[None, :]
        there = (chunk < chunks)[:, None] & (digit <= VALUES)[None, :]
        number += tl.sum(tl.load(counts + at, mask=there, other=0), 0)
        weight += tl.sum(tl.load(masses + at, mask=there & (digit > 0)[None, :], other=0.0), 0)  # of 0 is none
    enough = (number >= least) & (digit > 0) & (digit < VALUES)
    if SHARED:
        enough = enough & (weight >= tl.where(wanted < 1, wanted, float("inf")))  # a share of 1 is all
    found = tl.sum(enough.to(tl.int32), 0)
    tl.store(limits + row, tl.load(limits + row) + (found.to(tl.uint32) << shift.to(tl.uint32)))
    if shift == 0:
        beyond = digit == found + 1
        tl.store(number_above + row, tl.sum(tl.where(beyond, number, 0), 0))
        tl.store(mass_above + row, tl.sum(tl.where(beyond, weight, 0.0), 0))
        total = tl.full([], 0, tl.int32)
        for first in range(0, chunks, PART):
            chunk = first + tl.arange(0, PART)
            at = counts + (row * chunks + chunk) * DIGITS + found
            there = chunk < chunks
            equal = tl.load(at, mask=there, other=0) - tl.load(at + 1, mask=there, other=0)
            tl.store(before + row * chunks + chunk, total + tl.cumsum(equal, 0) - equal, mask=there)
            total += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["n", "looked", "chunks", "last", "shift", "share_step", "least"])
def measure(
    mass, share, limits, ended, counts, masses, number_above, mass_above, before, n, looked, chunks, last, shift,
    share_step, least, FIRST: tl.constexpr, LINE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of each chunk, `looked` entries of mass [rows, n], how many, int32, and how much mass, float32 [rows, chunks,
    DIGITS], is no less than limits uint32 [rows] with each digit at bit `shift`, of 0 the number alone; then `_narrow`.
    ended: int32 [rows], `last` once all other programs of a row are done. share: as in rows.py. Grid: rows * chunks."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    wanted = _wanted(share, row, share_step)
    if (wanted > 0) | (least > 0):
        limit = tl.load(limits + row)
        digit = 1 + tl.arange(0, VALUES)
        able = tl.zeros([LINE], tl.int32)
        number = tl.zeros([VALUES, LINE], tl.int32)
        weight = tl.zeros([VALUES, LINE], tl.float32)
        begin = pid % chunks * looked
        for first in range(begin, tl.minimum(begin + looked, n), LINE):
            entry = first + tl.arange(0, LINE)
            x = tl.load(mass + row * n + entry, mask=entry < n, other=0.0).to(tl.float32)
            order = _order(x, entry, n, FIRST, share is not None)
            own = tl.minimum((order - limit) >> shift.to(tl.uint32), VALUES).to(tl.int32)
            own = tl.where((order >= limit) & (order != 0), own, -1)
            able += (own >= 0).to(tl.int32)
            above = own[None, :] >= digit[:, None]
            number += above.to(tl.int32)
            weight += tl.where(above, x[None, :], 0.0)
        at = pid * DIGITS + digit
        tl.store(counts + pid * DIGITS, tl.sum(able, 0))
        tl.store(counts + at, tl.sum(number, 1))
        tl.store(masses + at, tl.sum(weight, 1))
        tl.debug_barrier()  # what all threads have left is there before this program counts as done
        if tl.atomic_add(ended + row, 1) == last:
            _narrow(
                limits, counts, masses, wanted, number_above, mass_above, before, row, chunks, shift, least,
                share is not None, PART,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "looked", "chunks", "share_step", "least"])
def keep(
    mass, kept, limits, share, number_above, mass_above, before, n, looked, chunks, share_step, least,
    FIRST: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """kept uint8 [rows, n]: what is beyond the limits, and of what equals them the first ones. Grid: rows * chunks."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    wanted = _wanted(share, row, share_step)
    some = (wanted > 0) | (least > 0)
    begin = pid % chunks * looked
    ahead = tl.full([], 0, tl.int32)
    for first in range(begin, tl.minimum(begin + looked, n), LINE):
        entry = first + tl.arange(0, LINE)
        chosen = tl.zeros([LINE], tl.int1)
        if some:
            x = tl.load(mass + row * n + entry, mask=entry < n, other=0.0).to(tl.float32)
            order = _order(x, entry, n, FIRST, share is not None)
            limit = tl.load(limits + row)
            tied = ((order == limit) & (order != 0)).to(tl.int32)
            place = tl.zeros([LINE], tl.int32) + tl.load(before + pid) + ahead
            number = tl.sum(tied, 0)
            if number > 1:
                place += tl.cumsum(tied, 0) - 1
            ahead += number
            needed = tl.load(number_above + row) + place < least
            if share is not None:
                needed = needed | (tl.load(mass_above + row) + place.to(tl.float32) * x < wanted)
            chosen = (order > limit) | ((tied != 0) & needed)
        tl.store(kept + row * n + entry, chosen.to(tl.uint8), mask=entry < n)
