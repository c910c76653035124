"""The operations of traced expressions: one row each, and the spellings that are lowered onto them.

A row says what an operation's operands and result are (type rule), what it does to tensors (run), what is known of its
result when only bounds of its operands are known (interval), how a kernel spells it (text) and what its derivatives are
(slopes). Kinds are "b" (boolean), "i" (integer), "f" (float).

Bounds are pairs (low, high) of tensors: bool for "b" (certainly true, possibly true), int64 for "i", float64 for "f".
A float that may be NaN has the bounds (-inf, inf), and only such a float. Integers beyond FAR are unknown; products and
sums of a mask are taken to stay within int64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

Bounds = tuple[Tensor, Tensor]

KINDS = "bif"  # each kind promotes to the ones behind it
FAR = 2**61
INF = math.inf
TINY, HUGE = 2e-38, 3.4e38  # float32 flushes to zero below, overflows above
ROUNDING = 1e-6  # relative; more than one float32 operation loses
LN2 = math.log(2)


class Op(NamedTuple):
    """One operation. `rule` is its type rule:

    number: operands are promoted, booleans to integers; the result is of their kind.
    real: operands become floats, the result is one.
    bits: operands are promoted, floats refused; the result is of their kind.
    shift: operands are integers, the result is one.
    test: operands are promoted, the result is boolean.
    choice: the first operand becomes boolean, the others are promoted; the result is of their kind.
    int, float: a cast.

    run(*operands) takes tensors and Python numbers, at least one of them a tensor. If `sized`, it takes the float
    dtype of the evaluation as its last argument. interval(*bounds) returns bounds.

    text: Triton's and Gluon's expression, in which {0}, {1} and {2} are names or numbers.
    slopes: for each operand a function (result, *operands) -> the derivative by it; none where that is zero. A boolean
        slope means: where it is true the operand's own derivative, elsewhere nothing, not even a NaN.
    """

    arity: int
    rule: str
    run: Callable[..., Any]
    interval: Callable[..., Bounds]
    text: str
    slopes: tuple[Callable[..., Any] | None, ...] = ()
    sized: bool = False


# ---- run ----


def _minimum(a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor):
        a, b = b, a
    return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)


def _maximum(a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor):
        a, b = b, a
    return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)


def _where(test: Any, a: Any, b: Any, real: torch.dtype) -> Tensor:
    if not isinstance(test, Tensor):
        device = next(x.device for x in (a, b) if isinstance(x, Tensor))
        test = torch.full((), test, dtype=torch.bool, device=device)
    if isinstance(a, float) and isinstance(b, float):  # torch would give its default dtype
        a = torch.full((), a, dtype=real, device=test.device)
    return torch.where(test, a, b)


def _square(a: Tensor) -> Tensor:
    return a * a


# ---- reading tensors ----


def wrapped(index: Tensor, size: int) -> Tensor:
    return torch.where(index < 0, index + size, index).clamp(0, size - 1)


def gather(table: Tensor, indices: list[Any]) -> Tensor:
    """table[indices] with each index wrapped once if negative, then clamped into range."""
    places = []
    for index, size in zip(indices, table.shape, strict=True):
        if isinstance(index, Tensor):
            places.append(wrapped(index, size).long())
        else:
            place = min(max(index + size if index < 0 else index, 0), size - 1)
            table = table.select(len(places), place)
    # Not table[places]: with 0-d indices that asks for their values, which neither vmap nor a compiler can give.
    return torch.ops.aten.index.Tensor(table, places) if places else table


def widened(value: Tensor, real: torch.dtype) -> Tensor:
    """Integers as int64, floats at least as wide as the evaluation, so that narrow tables do not round or overflow."""
    if value.dtype == torch.bool:
        return value
    return value.to(torch.promote_types(value.dtype, real)) if value.is_floating_point() else value.long()


# ---- intervals: helpers ----


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


def interval_of(name: str, kind: str, operands: list[Bounds]) -> Bounds:
    """Bounds of an operation's result from bounds of its operands."""
    low, high = OPS[name].interval(*operands)
    if kind == "i":
        return low.clamp(-FAR, FAR), high.clamp(-FAR, FAR)
    if kind == "b":
        return low, high
    unknown = low.isnan() | high.isnan()
    if name != "where":  # which does not compute with what it picks from
        for a, b in operands:
            if a.is_floating_point():
                unknown = unknown | ((a == -INF) & (b == INF))
    low, high = outward(low, high)
    return torch.where(unknown, -INF, low), torch.where(unknown, INF, high)


def _unknown(like: Tensor) -> Bounds:
    far = INF if like.is_floating_point() else FAR
    return torch.full_like(like, -far), torch.full_like(like, far)


def _if(sure: Tensor, bounds: Bounds) -> Bounds:
    """bounds where sure, unknown elsewhere."""
    low, high = _unknown(bounds[0])
    return torch.where(sure, bounds[0], low), torch.where(sure, bounds[1], high)


def _rising(function: Callable[[Tensor], Tensor]) -> Callable[[Bounds], Bounds]:
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


# ---- intervals: rules ----


def _add(a: Bounds, b: Bounds) -> Bounds:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Bounds, b: Bounds) -> Bounds:
    return a[0] - b[1], a[1] - b[0]


def _neg(a: Bounds) -> Bounds:
    return -a[1], -a[0]


def _floordiv(a: Bounds, b: Bounds) -> Bounds:
    if not a[0].is_floating_point():
        return _divided(operator.floordiv)(a, b)
    low, high = outward(*_divided(operator.truediv)(a, b))  # a rounded quotient may reach the next integer
    return low.floor(), high.floor()


def _mod(a: Bounds, b: Bounds) -> Bounds:
    positive = b[0] > 0
    divisor = torch.where(positive, b[0], 1)
    one_period = (b[0] == b[1]) & (a[0] // divisor == a[1] // divisor)
    high = b[1] if b[1].is_floating_point() else b[1] - 1
    if b[1].is_floating_point():
        positive = positive & a[0].isfinite() & a[1].isfinite()
    low, high = torch.where(one_period, a[0] % divisor, 0), torch.where(one_period, a[1] % divisor, high)
    return _if(positive, (low, high))


def _abs(a: Bounds) -> Bounds:
    x, y = a[0].abs(), a[1].abs()
    return torch.where((a[0] <= 0) & (a[1] >= 0), 0, torch.minimum(x, y)), torch.maximum(x, y)


def _square_interval(a: Bounds) -> Bounds:
    x, y = _product(a[0], a[0]), _product(a[1], a[1])
    return torch.where((a[0] <= 0) & (a[1] >= 0), 0, torch.minimum(x, y)), torch.maximum(x, y)


def _smaller(a: Bounds, b: Bounds) -> Bounds:
    return torch.minimum(a[0], b[0]), torch.minimum(a[1], b[1])


def _larger(a: Bounds, b: Bounds) -> Bounds:
    return torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])


def _lt(a: Bounds, b: Bounds) -> Bounds:
    return a[1] < b[0], a[0] < b[1]


def _le(a: Bounds, b: Bounds) -> Bounds:
    sure = a[1] <= b[0]
    if a[1].is_floating_point():  # infinite bounds may stand for a NaN, which compares false
        sure = sure & ((a[1] < b[0]) | a[1].isfinite())
    return sure, a[0] <= b[1]


def _eq(a: Bounds, b: Bounds) -> Bounds:
    same = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return same, (a[0] <= b[1]) & (b[0] <= a[1])


def _and(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        return a[0] & b[0], a[1] & b[1]
    # One operand that is not negative bounds the result by itself.
    high_a, high_b = torch.where(a[0] >= 0, a[1], FAR), torch.where(b[0] >= 0, b[1], FAR)
    high = torch.minimum(high_a, high_b)
    return _if((a[0] >= 0) | (b[0] >= 0), (torch.zeros_like(high), high))


def _or(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        return a[0] | b[0], a[1] | b[1]
    return _all_bits(a, b)


def _xor(a: Bounds, b: Bounds) -> Bounds:
    if a[0].dtype == torch.bool:
        sure, value = (a[0] == a[1]) & (b[0] == b[1]), a[0] ^ b[0]
        return value & sure, value | ~sure
    return _all_bits(a, b)


def _all_bits(a: Bounds, b: Bounds) -> Bounds:
    """For two that are not negative: at most all the bits below the highest one set."""
    top = torch.maximum(a[1], b[1]).clamp(min=1).double().log2().floor().long() + 1
    high = (torch.ones_like(top) << top) - 1
    return _if((a[0] >= 0) & (b[0] >= 0), (torch.zeros_like(high), high))


def _not(a: Bounds) -> Bounds:
    return ~a[1], ~a[0]


def _shl(a: Bounds, b: Bounds) -> Bounds:
    one = torch.ones_like(b[0])
    return _corners(_product)(a, (one << b[0].clamp(0, 62), one << b[1].clamp(0, 62)))


def _shr(a: Bounds, b: Bounds) -> Bounds:
    return _corners(operator.rshift)(a, (b[0].clamp(0, 63), b[1].clamp(0, 63)))


def _where_interval(test: Bounds, a: Bounds, b: Bounds) -> Bounds:
    low = torch.where(test[0], a[0], torch.where(test[1], torch.minimum(a[0], b[0]), b[0]))
    high = torch.where(test[0], a[1], torch.where(test[1], torch.maximum(a[1], b[1]), b[1]))
    return low, high


def _wave(a: Bounds) -> Bounds:
    return torch.full_like(a[0], -1), torch.full_like(a[0], 1)


def _to_int(a: Bounds) -> Bounds:
    return a[0].double().clamp(-FAR, FAR).long(), a[1].double().clamp(-FAR, FAR).long()


def _to_float(a: Bounds) -> Bounds:
    return a[0].double(), a[1].double()


# ---- slopes ----


def _one(*_: Any) -> int:
    return 1


def _minus_one(*_: Any) -> int:
    return -1


def _sign_of(_: Any, a: Any) -> Any:
    return torch.where(a < 0, -1.0, torch.where(a > 0, 1.0, 0.0))


OPS: dict[str, Op] = {
    "add": Op(2, "number", operator.add, _add, "{0} + {1}", (_one, _one)),
    "sub": Op(2, "number", operator.sub, _sub, "{0} - {1}", (_one, _minus_one)),
    "mul": Op(
        2, "number", operator.mul, _corners(_product), "{0} * {1}", (lambda n, a, b: b, lambda n, a, b: a)
    ),
    "div": Op(
        2, "real", operator.truediv, _divided(operator.truediv), "{0} / {1}",
        (lambda n, a, b: 1 / b, lambda n, a, b: -n / b),
    ),
    "floordiv": Op(2, "number", operator.floordiv, _floordiv, "floordiv({0}, {1})"),
    "mod": Op(2, "number", operator.mod, _mod, "floormod({0}, {1})", (_one, lambda n, a, b: -(a // b))),
    "neg": Op(1, "number", operator.neg, _neg, "-{0}", (_minus_one,)),
    "abs": Op(1, "number", operator.abs, _abs, "tl.abs({0})", (_sign_of,)),
    "square": Op(1, "number", _square, _square_interval, "{0} * {0}", (lambda n, a: 2 * a,)),
    "min": Op(
        2, "number", _minimum, _smaller, "tl.minimum({0}, {1}, propagate_nan=NAN)",
        (lambda n, a, b: a <= b, lambda n, a, b: b < a),
    ),
    "max": Op(
        2, "number", _maximum, _larger, "tl.maximum({0}, {1}, propagate_nan=NAN)",
        (lambda n, a, b: a >= b, lambda n, a, b: b > a),
    ),
    "lt": Op(2, "test", operator.lt, _lt, "{0} < {1}"),
    "le": Op(2, "test", operator.le, _le, "{0} <= {1}"),
    "eq": Op(2, "test", operator.eq, _eq, "{0} == {1}"),
    "and": Op(2, "bits", operator.and_, _and, "{0} & {1}"),
    "or": Op(2, "bits", operator.or_, _or, "{0} | {1}"),
    "xor": Op(2, "bits", operator.xor, _xor, "{0} ^ {1}"),
    "not": Op(1, "bits", operator.invert, _not, "~{0}"),
    "shl": Op(2, "shift", operator.lshift, _shl, "{0} << {1}"),
    "shr": Op(2, "shift", operator.rshift, _shr, "{0} >> {1}"),
    "where": Op(
        3, "choice", _where, _where_interval, "tl.where({0}, {1}, {2})",
        (None, lambda n, test, a, b: test, lambda n, test, a, b: ~test), sized=True,
    ),
    "exp": Op(1, "real", torch.exp, _rising(torch.exp), "tl.exp({0})", (lambda n, a: n,)),
    "exp2": Op(1, "real", torch.exp2, _rising(torch.exp2), "tl.exp2({0})", (lambda n, a: n * LN2,)),
    "log": Op(1, "real", torch.log, _rising(torch.log), "tl.log({0})", (lambda n, a: 1 / a,)),
    "log2": Op(1, "real", torch.log2, _rising(torch.log2), "tl.log2({0})", (lambda n, a: (1 / LN2) / a,)),
    "sqrt": Op(1, "real", torch.sqrt, _rising(torch.sqrt), "tl.sqrt({0})", (lambda n, a: 0.5 / n,)),
    "tanh": Op(1, "real", torch.tanh, _rising(torch.tanh), "tanh({0})", (lambda n, a: 1 - n * n,)),
    "sigmoid": Op(
        1, "real", torch.sigmoid, _rising(torch.sigmoid), "1.0 / (1.0 + tl.exp(-{0}))", (lambda n, a: n * (1 - n),)
    ),
    "sin": Op(1, "real", torch.sin, _wave, "tl.sin({0})", (lambda n, a: torch.cos(a),)),
    "cos": Op(1, "real", torch.cos, _wave, "tl.cos({0})", (lambda n, a: -torch.sin(a),)),
    "floor": Op(1, "real", torch.floor, _rising(torch.floor), "tl.floor({0})"),
    "to_int": Op(1, "int", Tensor.long, _to_int, "{0}.to(tl.int32)"),
    "to_float": Op(1, "float", Tensor.to, _to_float, "{0}.to(tl.float32)", sized=True),
}  # fmt: skip


# ---- spellings: what users also write, in terms of the rows; t is the tracer ----


def _clamp(t: Any, a: Any, min: Any = None, max: Any = None) -> Any:
    if min is not None:
        a = t.apply("max", a, min)
    return a if max is None else t.apply("min", a, max)


def _sign(t: Any, a: Any) -> Any:
    negative = t.apply("where", t.apply("lt", a, 0), -1, 0)
    return t.cast(t.apply("where", t.apply("lt", 0, a), 1, negative), a._kind)


def _pow(t: Any, a: Any, exponent: Any) -> Any:
    k, base = t.value_of(exponent), t.value_of(a)
    if k is None:
        if base is None or base <= 0:
            raise t.error(
                "the exponent or the base of ** must be a Python number (a base above 0)",
                "torch.exp2(exponent * rate), with rate the base's logarithm to base 2",
            )
        return t.apply("exp2", t.apply("mul", exponent, t.apply("log2", a)))
    if k == 0.5:
        return t.apply("sqrt", a)
    if isinstance(k, float):
        a = t.cast(a, "f")
    if k != int(k) or abs(k) > 64:
        return t.apply("exp2", t.apply("mul", t.apply("log2", a), k))
    power = _repeated(t, a, abs(int(k)))
    return power if k >= 0 else t.apply("div", 1, power)


def _repeated(t: Any, a: Any, k: int) -> Any:
    if k < 2:
        return a if k else t.cast(t.wrap(1), a._kind)
    half = _repeated(t, a, k // 2)
    even = t.apply("mul", half, half)
    return t.apply("mul", even, a) if k % 2 else even


SPELLINGS: dict[str, Callable[..., Any]] = {
    "ne": lambda t, a, b: t.apply("not", t.apply("eq", a, b)),
    "gt": lambda t, a, b: t.apply("lt", b, a),
    "ge": lambda t, a, b: t.apply("le", b, a),
    "rsub": lambda t, a, b: t.apply("sub", b, a),
    "pos": lambda t, a: a,
    "relu": lambda t, a: t.apply("max", a, 0),
    "reciprocal": lambda t, a: t.apply("div", 1, a),
    "rsqrt": lambda t, a: t.apply("div", 1, t.apply("sqrt", a)),
    "log1p": lambda t, a: t.apply("log", t.apply("add", a, 1)),
    "ceil": lambda t, a: t.apply("neg", t.apply("floor", t.apply("neg", a))),
    "sign": _sign,
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": lambda t, a, min: t.apply("max", a, min),
    "clamp_max": lambda t, a, max: t.apply("min", a, max),
    "logical_and": lambda t, a, b: t.apply("and", t.cast(a, "b"), t.cast(b, "b")),
    "logical_or": lambda t, a, b: t.apply("or", t.cast(a, "b"), t.cast(b, "b")),
    "logical_xor": lambda t, a, b: t.apply("xor", t.cast(a, "b"), t.cast(b, "b")),
    "logical_not": lambda t, a: t.apply("not", t.cast(a, "b")),
    "bool": lambda t, a: t.cast(a, "b"),
    "long": lambda t, a: t.cast(a, "i"),
    "float": lambda t, a: t.cast(a, "f"),
}

_OTHER_NAMES = {
    "sub": "subtract", "mul": "multiply", "div": "divide truediv true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "neg": "negative", "pos": "positive", "abs": "absolute", "min": "minimum", "max": "maximum",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "ne": "not_equal",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "bitwise_not invert",
    "shl": "lshift bitwise_left_shift", "shr": "rshift bitwise_right_shift", "clamp": "clip", "long": "int",
}  # fmt: skip
ALIASES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
