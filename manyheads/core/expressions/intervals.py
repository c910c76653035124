"""Interval rules: what is known of an operation's result when only bounds of its operands are known.

Bounds are pairs (low, high) of tensors: bool for "b" (certainly true, possibly true), int64 for "i", float64 for "f".
A float that may be NaN has the bounds (-inf, inf), and only such a float. Integers beyond FAR are unknown; products and
sums of a mask are taken to stay within int64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Bounds = tuple[Tensor, Tensor]

FAR = 2**61
INF = math.inf
TINY, HUGE = 2e-38, 3.4e38  # float32 flushes to zero below, overflows above
ROUNDING = 1e-6  # relative; more than one float32 operation loses


def outward(low: Tensor, high: Tensor) -> Bounds:
    """Float bounds made wide enough for a result that was rounded, flushed to zero or overflowed in float32."""
    low = low - ROUNDING * low.abs().nan_to_num(0, 0, 0)
    high = high + ROUNDING * high.abs().nan_to_num(0, 0, 0)
    low = torch.where((low > 0) & (low < TINY), 0.0, torch.where(low < -HUGE, -INF, low))
    high = torch.where((high < 0) & (high > -TINY), 0.0, torch.where(high > HUGE, INF, high))
    return low, high


def known(low: Tensor, high: Tensor) -> Bounds:
    """Bounds of values that were computed; a NaN among floats makes the tile's value unknown."""
    if not low.is_floating_point():
        return low, high
    unknown = low.isnan() | high.isnan()
    return torch.where(unknown, -INF, low.double()), torch.where(unknown, INF, high.double())


def _unknown(like: Tensor) -> Bounds:
    far = INF if like.is_floating_point() else FAR
    return torch.full_like(like, -far), torch.full_like(like, far)


def _if(sure: Tensor, bounds: Bounds) -> Bounds:
    """bounds where sure, unknown elsewhere."""
    low, high = _unknown(bounds[0])
    return torch.where(sure, bounds[0], low), torch.where(sure, bounds[1], high)


def rising(function: Callable[[Tensor], Tensor]) -> Callable[[Bounds], Bounds]:
    def interval(a: Bounds) -> Bounds:
        return function(a[0]), function(a[1])

    return interval


def _corners(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bounds, Bounds], Bounds]:
    """For functions that rise or fall in each operand: the extremes are at the ends."""

    def interval(a: Bounds, b: Bounds) -> Bounds:
        ends = [function(x, y) for x in a for y in b]
        return reduce(torch.minimum, ends), reduce(torch.maximum, ends)

    return interval


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x * y; integers saturate at FAR instead of wrapping around."""
    product = x * y
    if product.is_floating_point():
        return product
    far = torch.where((x < 0) == (y < 0), FAR, -FAR)
    return torch.where((x.double() * y.double()).abs() > FAR, far, product)


def _divided(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Bounds, Bounds], Bounds]:
    """A quotient is unknown if the divisor may be zero."""

    def interval(a: Bounds, b: Bounds) -> Bounds:
        safe = (b[0] > 0) | (b[1] < 0)
        divisor = torch.where(safe, b[0], 1), torch.where(safe, b[1], 1)
        return _if(safe, _corners(function)(a, divisor))

    return interval


# ---- rules ----


def add(a: Bounds, b: Bounds) -> Bounds:
    return a[0] + b[0], a[1] + b[1]


def sub(a: Bounds, b: Bounds) -> Bounds:
    return a[0] - b[1], a[1] - b[0]


mul = _corners(_product)
div = _divided(operator.truediv)


def neg(a: Bounds) -> Bounds:
    return -a[1], -a[0]


def floordiv(a: Bounds, b: Bounds) -> Bounds:
    if not a[0].is_floating_point():
        return _divided(operator.floordiv)(a, b)
    low, high = outward(*div(a, b))  # a rounded quotient may reach the next integer
    return low.floor(), high.floor()


def mod(a: Bounds, b: Bounds) -> Bounds:
    positive = b[0] > 0
    divisor = torch.where(positive, b[0], 1)
    one_period = (b[0] == b[1]) & (a[0] // divisor == a[1] // divisor)
    high = b[1] if b[1].is_floating_point() else b[1] - 1
    if b[1].is_floating_point():
        positive = positive & a[0].isfinite() & a[1].isfinite()
    low, high = torch.where(one_period, a[0] % divisor, 0), torch.where(one_period, a[1] % divisor, high)
    return _if(positive, (low, high))


def absolute(a: Bounds) -> Bounds:
    x, y = a[0].abs(), a[1].abs()
    return torch.where((a[0] <= 0) & (a[1] >= 0), 0, torch.minimum(x, y)), torch.maximum(x, y)


def square(a: Bounds) -> Bounds:
    x, y = _product(a[0], a[0]), _product(a[1], a[1])
    return torch.where((a[0] <= 0) & (a[1] >= 0), 0, torch.minimum(x, y)), torch.maximum(x, y)


def smaller(a: Bounds, b: Bounds) -> Bounds:
    return torch.minimum(a[0], b[0]), torch.minimum(a[1], b[1])


def larger(a: Bounds, b: Bounds) -> Bounds:
    return torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])


def lt(a: Bounds, b: Bounds) -> Bounds:
    return a[1] < b[0], a[0] < b[1]


def le(a: Bounds, b: Bounds) -> Bounds:
    sure = a[1] <= b[0]
    if a[1].is_floating_point():  # infinite bounds may stand for a NaN, which compares false
        sure = sure & ((a[1] < b[0]) | a[1].isfinite())
    return sure, a[0] <= b[1]


def eq(a: Bounds, b: Bounds) -> Bounds:
    same = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return same, (a[0] <= b[1]) & (b[0] <= a[1])


def and_(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        return a[0] & b[0], a[1] & b[1]
    # One operand that is not negative bounds the result by itself.
    high_a, high_b = torch.where(a[0] >= 0, a[1], FAR), torch.where(b[0] >= 0, b[1], FAR)
    high = torch.minimum(high_a, high_b)
    return _if((a[0] >= 0) | (b[0] >= 0), (torch.zeros_like(high), high))


def or_(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        return a[0] | b[0], a[1] | b[1]
    return _all_bits(a, b)


def xor(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        sure, value = (a[0] == a[1]) & (b[0] == b[1]), a[0] ^ b[0]
        return value & sure, value | ~sure
    return _all_bits(a, b)


def _all_bits(a: Bounds, b: Bounds) -> Bounds:
    """For two that are not negative: at most all the bits below the highest one set."""
    high = torch.maximum(a[1], b[1])
    for step in (1, 2, 4, 8, 16, 32):
        high = high | (high >> step)
    return _if((a[0] >= 0) & (b[0] >= 0), (torch.zeros_like(high), high))


def not_(a: Bounds) -> Bounds:
    return ~a[1], ~a[0]


def shl(a: Bounds, b: Bounds) -> Bounds:
    one = torch.ones_like(b[0])
    return _corners(_product)(a, (one << b[0].clamp(0, 62), one << b[1].clamp(0, 62)))


def shr(a: Bounds, b: Bounds) -> Bounds:
    return _corners(operator.rshift)(a, (b[0].clamp(0, 63), b[1].clamp(0, 63)))


def where(test: Bounds, a: Bounds, b: Bounds) -> Bounds:
    low = torch.where(test[0], a[0], torch.where(test[1], torch.minimum(a[0], b[0]), b[0]))
    high = torch.where(test[0], a[1], torch.where(test[1], torch.maximum(a[1], b[1]), b[1]))
    return low, high


def wave(a: Bounds) -> Bounds:
    return torch.full_like(a[0], -1), torch.full_like(a[0], 1)


def to_int(a: Bounds) -> Bounds:
    return a[0].double().clamp(-FAR, FAR).long(), a[1].double().clamp(-FAR, FAR).long()


def to_float(a: Bounds) -> Bounds:
    return a[0].double(), a[1].double()
