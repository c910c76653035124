"""Steps to the k-th largest score of each query, and how many scores reach a level.

The first look finds the largest and the smallest score, and how many there are; up to k of them are kept all. Between
these two lies a bracket [lo, hi): k scores or more reach lo, fewer reach hi. Each later look counts how many reach the
three levels that cut the bracket into quarters, and keeps one of them. A level that k scores reach is what was looked
for. Where scores are equal there may be none: a bracket no wider than NEAR is left, with a level as much below it, so
that another kernel's rounding does not change what reaches it.

A bracket begins REACH below the largest score at most: what is still below has a weight of 0 in float32. So after some
looks what is left is NEAR, or, for scores near 0, less than makes a difference to a weight.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.names import gl, gluon

REACH = gl.constexpr(88.0)  # exp of minus that is no normal number of float32
NEAR = gl.constexpr(2.0**-19)  # of a score: 16 steps of float32 or more


@gluon.jit
def nothing_counted(rows: gl.constexpr, layout: gl.constexpr, FIRST: gl.constexpr):
    """The largest and smallest score and the number of scores, or the three counts, of no keys."""
    none = gl.full([rows], 0, gl.int32, layout)
    if FIRST:
        top = gl.full([rows], float("-inf"), gl.float32, layout)
        return top, gl.full([rows], float("inf"), gl.float32, layout), none
    else:
        return none, none, none


@gluon.jit
def _quarters(lo, hi):
    """The same bits wherever it stands, as a fused multiplication by a power of two rounds no differently."""
    quarter = 0.25 * (hi - lo)
    a = lo + quarter
    b = a + quarter
    return a, b, b + quarter


@gluon.jit
def counted(z, lo, hi, first, second, third, FIRST: gl.constexpr):
    """One tile more."""
    if FIRST:
        seen = z > float("-inf")
        least = gl.min(gl.where(seen, z, float("inf")), 1)
        return (
            gl.maximum(first, gl.max(z, 1)), gl.minimum(second, least), third + gl.sum(gl.where(seen, 1, 0), 1),
        )  # fmt: skip
    else:
        a, b, c = _quarters(lo, hi)
        # One sum for three counts, of ten bits each: a tile has fewer keys than they hold.
        reached = gl.where(z >= b[:, None], 1 + 2**10, gl.where(z >= a[:, None], 1, 0))
        counts = gl.sum(gl.where(z >= c[:, None], 1 + 2**10 + 2**20, reached), 1)
        return first + (counts & 1023), second + ((counts >> 10) & 1023), third + (counts >> 20)


@gluon.jit
def narrowed(lo, hi, first, second, third, k, FIRST: gl.constexpr):
    """The next bracket, and which rows have not arrived. One that has is empty, and its lo the level."""
    if FIRST:
        lo = gl.maximum(second, first - REACH)
        waiting = (third > k) & (first - lo > _near(lo, first))
        return gl.where(waiting, lo, float("-inf")), gl.where(waiting, first, float("-inf")), waiting
    else:
        a, b, c = _quarters(lo, hi)
        left = gl.where(third >= k, c, gl.where(second >= k, b, gl.where(first >= k, a, lo)))
        right = gl.where(first < k, a, gl.where(second < k, b, gl.where(third < k, c, hi)))
        found = (first == k) | (second == k) | (third == k)
        near = _near(left, right)
        close = right - left <= near
        moving = lo < hi
        waiting = moving & ~(found | close)
        level = gl.where(moving, gl.where(close & ~found, left - near, left), lo)
        return level, gl.where(waiting, right, level), waiting


@gluon.jit
def _near(lo, hi):
    return NEAR * gl.maximum(gl.abs(lo), gl.abs(hi))
