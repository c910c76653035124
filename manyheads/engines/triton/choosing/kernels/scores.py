"""Products of queries and keys, as exact as float32 has them, at the speed of 16 bits.

A float32 is two float16, 11 bits each, if it is scaled so that neither is too small for them: keys come in such parts.
Queries that have 16 bits are one, once they are scaled row by row. Both scales are powers of two, so that nothing is
rounded but what float32 rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_halves(x):
    """float16 [R, D] of x [R, D], whose numbers have 11 bits at most, and what its rows are to be multiplied by,
    float32 [R]. Numbers of 2^-14 of their row's largest one, or less, lose bits that hardly count beside it."""
    x = x.to(tl.float32)
    exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    size = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (x * inverse[:, None]).to(tl.float16), size


@triton.jit(do_not_specialize=["each"])
def halved(k, largest, high, low, sizes, each, N: tl.constexpr):
    """high and low float16 [heads, each], which times sizes float32 [heads], a power of 2, are k float32 [heads,
    each] to 22 bits. largest: of what k has without a sign, float32 [heads]. Grid: heads * each / N."""
    parts = tl.cdiv(each, N)
    head = (tl.program_id(0) // parts).to(tl.int64)
    place = tl.program_id(0) % parts * N + tl.arange(0, N)
    exponent = (tl.load(largest + head).to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    scale = (127 + 15 - exponent << 23).to(tl.float32, bitcast=True)  # with which the largest is below 2^15
    x = tl.load(k + head * each + place, mask=place < each, other=0.0) * scale
    first = x.to(tl.float16)
    tl.store(high + head * each + place, first, mask=place < each)
    tl.store(low + head * each + place, (x - first.to(tl.float32)).to(tl.float16), mask=place < each)
    tl.store(sizes + head, (127 - 15 + exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def products(q, k, low, columns, n, k_n, D: tl.constexpr, PD: tl.constexpr, PRECISION: tl.constexpr):
    """q.k float32 [R, N] of a tile q [R, PD] and the rows `columns` of k, k_n apart, of q's dtype. low: the second part
    of k, or None."""
    dims = tl.arange(0, PD)
    there = (dims < D)[:, None] & (columns < n)[None, :]
    at = columns[None, :].to(tl.int64) * k_n + dims[:, None]
    if low is None:
        found = tl.dot(q, tl.load(k + at, mask=there, other=0.0), input_precision=PRECISION)
    else:
        found = tl.dot(q, tl.load(low + at, mask=there, other=0.0))
        found = tl.dot(q, tl.load(k + at, mask=there, other=0.0), found)
    return found
