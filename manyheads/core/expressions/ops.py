"""The operations of traced expressions: one row each, and the spellings that are lowered onto them.

A row says what an operation's operands and result are (type rule), what it does to tensors (run), what is known of its
result when only bounds of its operands are known (interval), how a kernel spells it (text) and what its derivatives are
(slopes). Kinds are "b" (boolean), "i" (integer), "f" (float).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import manyheads.core.expressions.intervals as intervals
from manyheads.core.expressions.intervals import FAR, INF, Bounds, outward, rising

KINDS = "bif"  # each kind promotes to the ones behind it
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


# ---- slopes ----


def _one(*_: Any) -> int:
    return 1


def _minus_one(*_: Any) -> int:
    return -1


def _sign_of(_: Any, a: Any) -> Any:
    return torch.where(a < 0, -1.0, torch.where(a > 0, 1.0, 0.0))


OPS: dict[str, Op] = {
    "add": Op(2, "number", operator.add, intervals.add, "{0} + {1}", (_one, _one)),
    "sub": Op(2, "number", operator.sub, intervals.sub, "{0} - {1}", (_one, _minus_one)),
    "mul": Op(
        2, "number", operator.mul, intervals.mul, "{0} * {1}", (lambda n, a, b: b, lambda n, a, b: a)
    ),
    "div": Op(
        2, "real", operator.truediv, intervals.div, "{0} / {1}",
        (lambda n, a, b: 1 / b, lambda n, a, b: -n / b),
    ),
    "floordiv": Op(2, "number", operator.floordiv, intervals.floordiv, "floordiv({0}, {1})"),
    "mod": Op(2, "number", operator.mod, intervals.mod, "floormod({0}, {1})", (_one, lambda n, a, b: -(a // b))),
    "neg": Op(1, "number", operator.neg, intervals.neg, "-{0}", (_minus_one,)),
    "abs": Op(1, "number", operator.abs, intervals.absolute, "tl.abs({0})", (_sign_of,)),
    "square": Op(1, "number", _square, intervals.square, "{0} * {0}", (lambda n, a: 2 * a,)),
    "min": Op(
        2, "number", _minimum, intervals.smaller, "tl.minimum({0}, {1}, propagate_nan=NAN)",
        (lambda n, a, b: a <= b, lambda n, a, b: b < a),
    ),
    "max": Op(
        2, "number", _maximum, intervals.larger, "tl.maximum({0}, {1}, propagate_nan=NAN)",
        (lambda n, a, b: a >= b, lambda n, a, b: b > a),
    ),
    "lt": Op(2, "test", operator.lt, intervals.lt, "{0} < {1}"),
    "le": Op(2, "test", operator.le, intervals.le, "{0} <= {1}"),
    "eq": Op(2, "test", operator.eq, intervals.eq, "{0} == {1}"),
    "and": Op(2, "bits", operator.and_, intervals.and_, "{0} & {1}"),
    "or": Op(2, "bits", operator.or_, intervals.or_, "{0} | {1}"),
    "xor": Op(2, "bits", operator.xor, intervals.xor, "{0} ^ {1}"),
    "not": Op(1, "bits", operator.invert, intervals.not_, "~{0}"),
    "shl": Op(2, "shift", operator.lshift, intervals.shl, "{0} << {1}"),
    "shr": Op(2, "shift", operator.rshift, intervals.shr, "{0} >> {1}"),
    "where": Op(
        3, "choice", _where, intervals.where, "tl.where({0}, {1}, {2})",
        (None, lambda n, test, a, b: test, lambda n, test, a, b: ~test), sized=True,
    ),
    "exp": Op(1, "real", torch.exp, rising(torch.exp), "tl.exp({0})", (lambda n, a: n,)),
    "exp2": Op(1, "real", torch.exp2, rising(torch.exp2), "tl.exp2({0})", (lambda n, a: n * LN2,)),
    "log": Op(1, "real", torch.log, rising(torch.log), "tl.log({0})", (lambda n, a: 1 / a,)),
    "log2": Op(1, "real", torch.log2, rising(torch.log2), "tl.log2({0})", (lambda n, a: (1 / LN2) / a,)),
    "sqrt": Op(1, "real", torch.sqrt, rising(torch.sqrt), "tl.sqrt({0})", (lambda n, a: 0.5 / n,)),
    "tanh": Op(1, "real", torch.tanh, rising(torch.tanh), "tanh({0})", (lambda n, a: 1 - n * n,)),
    "sigmoid": Op(
        1, "real", torch.sigmoid, rising(torch.sigmoid), "1.0 / (1.0 + tl.exp(-{0}))", (lambda n, a: n * (1 - n),)
    ),
    "erf": Op(
        1, "real", torch.erf, rising(torch.erf), "tl.erf({0})", (lambda n, a: 2 / math.pi**0.5 * torch.exp(-a * a),)
    ),
    "sin": Op(1, "real", torch.sin, intervals.wave, "tl.sin({0})", (lambda n, a: torch.cos(a),)),
    "cos": Op(1, "real", torch.cos, intervals.wave, "tl.cos({0})", (lambda n, a: -torch.sin(a),)),
    "floor": Op(1, "real", torch.floor, rising(torch.floor), "tl.floor({0})"),
    "to_int": Op(1, "int", Tensor.long, intervals.to_int, "{0}.to(tl.int32)"),
    "to_float": Op(1, "float", Tensor.to, intervals.to_float, "{0}.to(tl.float32)", sized=True),
}  # fmt: skip


def fold(name: str, values: list[Any]) -> bool | int | float:
    """An operation on Python numbers, in double precision."""
    doubles = [torch.tensor(v, dtype=torch.float64 if isinstance(v, float) else None) for v in values]
    op = OPS[name]
    return op.run(*doubles, torch.float64).item() if op.sized else op.run(*doubles).item()


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
