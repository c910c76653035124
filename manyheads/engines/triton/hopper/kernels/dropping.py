"""Which weights stay under dropout: the hash of core/dropout.py, the same bits."""

from __future__ import annotations

from manyheads.core import dropout
from manyheads.engines.triton.hopper.names import gl, gluon

FIRST, SECOND = gl.constexpr(dropout.FIRST), gl.constexpr(dropout.SECOND)
QUERY, KEY, START = gl.constexpr(dropout.QUERY), gl.constexpr(dropout.KEY), gl.constexpr(dropout.START)
ROW, HEAD = gl.constexpr(dropout.ROW), gl.constexpr(dropout.HEAD)


@gluon.jit
def key_of(seed, b, h):
    """The two words of a head."""
    both = gl.load(seed) + b.to(gl.int64) * ROW + h.to(gl.int64) * HEAD
    low = both.to(gl.uint32)
    high = (both >> 32).to(gl.uint32) ^ _mixed(low + START)
    return low ^ _mixed(high + START), high


@gluon.jit
def kept(low, high, i, j, threshold):
    """Of queries i and keys j, one of them in a row and the other in a column, (near, far) each."""
    query = (i[0] + i[1]).to(gl.uint32)
    key = (j[0] + j[1]).to(gl.uint32)
    x = _folded(query * QUERY + low) ^ _folded(key * KEY)
    x = x * FIRST + high
    return (x ^ (x >> 15)) * SECOND >= threshold.to(gl.uint32)


@gluon.jit
def dropped(weight, keep, inflation):
    """The weights that stay, and 0. It is a zero that the compiler does not know: one that it knew it would put in
    behind the rounding to 16 bits, number by number, and then pack the numbers again."""
    return gl.where(keep, weight, inflation - inflation)


@gluon.jit
def _folded(x):
    return x ^ (x >> 16)


@gluon.jit
def _mixed(x):
    x = _folded(x) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 15)
