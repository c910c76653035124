"""The heaviest entries of rows that fit in no program's registers: as rows.py finds them, four bits at a time, each by
one look of many programs at a chunk of a row, and one of a program at what they found."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import ordered

BITS = 4
VALUES = tl.constexpr(2**BITS)  # of a digit
DIGITS = tl.constexpr(2 * 2**BITS)  # places for them and one more


@triton.jit
def _place(x, entry, n, FIRST: tl.constexpr, SHARED: tl.constexpr):
    """Where the entries of a row stand in the order of rows.py, int64; 0 for what is never taken."""
    order = ordered(x)
    if FIRST:
        order = tl.where(entry == 0, 0xFFFFFFFF, order)
    able = entry < n
    if not SHARED:
        able = able & (x != float("-inf"))
    return tl.where(able, order.to(tl.int64), 0)


@triton.jit(do_not_specialize=["n", "chunks", "shift"])
def measure(
    mass, limits, counts, masses, n, chunks, shift, FIRST: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Of each chunk of mass [rows, n] how many entries, int32, and how much mass, float32 [rows, chunks, DIGITS], is no
    less than limits int64 [rows] with each digit at bit `shift`. Grid: rows * chunks."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    entry = pid % chunks * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(mass + row * n + entry, mask=entry < n, other=0.0).to(tl.float32)
    order = _place(x, entry, n, FIRST, SHARED)
    limit = tl.load(limits + row) >> shift
    for digit in range(0, VALUES + 1):
        above = (order >> shift) >= limit + digit
        above = above & (order != 0)
        tl.store(counts + pid * DIGITS + digit, tl.sum(above.to(tl.int32), 0))
        tl.store(masses + pid * DIGITS + digit, tl.sum(tl.where(above, x, 0.0), 0))


@triton.jit(do_not_specialize=["chunks", "shift", "share_step", "least"])
def narrow(
    limits, counts, masses, share, number_above, mass_above, before, chunks, shift, share_step, least,
    PART: tl.constexpr,
):  # fmt: skip
    """Adds to each of limits the greatest digit with which enough is no less. number_above int32 and mass_above
    float32 [rows]: of entries beyond it; before int32 [rows, chunks]: entries equal to it in earlier chunks; all three
    once shift is 0. share: as in rows.py. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, DIGITS)
    number = tl.zeros([DIGITS], tl.int32)
    weight = tl.zeros([DIGITS], tl.float32)
    for first in range(0, chunks, PART):
        chunk = first + tl.arange(0, PART)
        at = (row * chunks + chunk)[:, None] * DIGITS + digit[None, :]
        there = (chunk < chunks)[:, None] & (digit <= VALUES)[None, :]
        number += tl.sum(tl.load(counts + at, mask=there, other=0), 0)
        weight += tl.sum(tl.load(masses + at, mask=there, other=0.0), 0)
    enough = (number >= least) & (digit > 0) & (digit < VALUES)
    if share is not None:
        wanted = tl.load(share + row * share_step)
        enough = enough & (weight >= tl.where(wanted < 1, wanted, float("inf")))  # a share of 1 is all
    found = tl.sum(enough.to(tl.int32), 0)
    tl.store(limits + row, tl.load(limits + row) + (found.to(tl.int64) << shift))
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


@triton.jit(do_not_specialize=["n", "chunks", "share_step", "least"])
def keep(
    mass, kept, limits, share, number_above, mass_above, before, n, chunks, share_step, least, FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """kept uint8 [rows, n]: what is beyond the limits, and of what equals them the first ones. Grid: rows * chunks."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    entry = pid % chunks * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(mass + row * n + entry, mask=entry < n, other=0.0).to(tl.float32)
    order = _place(x, entry, n, FIRST, share is not None)
    limit = tl.load(limits + row)
    tied = (order == limit) & (order != 0)
    ahead = tl.load(before + pid) + tl.cumsum(tied.to(tl.int32), 0) - 1
    needed = tl.load(number_above + row) + ahead < least
    if share is not None:
        mass_ahead = tl.load(mass_above + row) + ahead.to(tl.float32) * x
        needed = needed | (mass_ahead < tl.load(share + row * share_step))
    chosen = (order > limit) | (tied & needed)
    tl.store(kept + row * n + entry, chosen.to(tl.uint8), mask=entry < n)
