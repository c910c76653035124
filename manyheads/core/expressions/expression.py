"""Stand-ins: what a function is called on in place of its arguments while it is traced.

Operators, methods and torch functions on an Expression, and its truth value, are passed to the tracer that owns it.
What else Python asks of it (a number, an iterator, an unknown method) is refused with a TraceError, which says what was
met, where, and what to write instead.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch

from manyheads.core.expressions.ops import ALIASES, OPS, SPELLINGS

TORCH_TYPES = {"b": torch.bool, "i": torch.int64, "f": torch.float32}
_REFLECTED = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
_OPERATORS = [*_REFLECTED, "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "getitem"]
_LIBRARY_PATHS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)
_INSTEAD = {
    "item": "the expression itself: it has no value yet",
    "size": "a number: every expression is one (i, j) element",
    "softmax": "the score before normalisation: a score sees one element",
    "isin": "any(x == value for value in ...), or a boolean tensor indexed by x",
    "setitem": "torch.where, or a tensor changed before tracing",
}


class TraceError(TypeError):
    """A function that cannot be traced: what was met, where, and what to write instead."""

    def __init__(self, what: str, instead: str = "", function: Callable | None = None):
        code = getattr(function, "__code__", None)
        place = f" [{code.co_filename}:{code.co_firstlineno}]" if code else _user_line()
        super().__init__(what + (f"; write {instead}" if instead else "") + place)


def _user_line() -> str:
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_LIBRARY_PATHS):
        frame = frame.f_back
    return f" [{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}]" if frame else ""


def known_name(name: str) -> str:
    """The name in OPS or SPELLINGS of what the user calls name."""
    name = ALIASES.get(name, name)
    if name in OPS or name in SPELLINGS or name in ("getitem", "to", "type_as"):
        return name
    instead = _INSTEAD.get(name)
    if name.endswith("_"):
        instead = "x = x + ... in place of an in-place operation"
    raise TraceError(
        f"{name} is not supported on s, b, h, i, j",
        instead or "it with: " + ", ".join(sorted({*OPS, *SPELLINGS} - {"to_int", "to_float"})),
    )


class Owner(Protocol):
    """What an expression needs of the tracer that it belongs to."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> Expression: ...

    def branch(self, test: Expression) -> bool: ...

    def describe(self, index: int) -> str: ...


class Expression:
    """Stands for one element's value while a function is traced. Behaves as a 0-d tensor, as far as OPS go.

    Its own attributes begin with an underscore: all other names belong to what users write, and are those of OPS.
    """

    __slots__ = ("_index", "_kind", "_tracer", "_value")

    def __init__(self, tracer: Owner, index: int, kind: str, value: bool | int | float | None):
        self._tracer, self._index, self._kind = tracer, index, kind
        self._value = value  # of an expression of numbers alone, as they were when traced

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.__name__
        tracer = _tracer_of((*args, *(kwargs or {}).values()))
        assert tracer is not None, "torch calls this for an Expression among the arguments"
        if name.startswith("__r") and name[3:-2] in _REFLECTED:
            return tracer.call(name[3:-2], args[1], args[0])
        return tracer.call(name.removeprefix("__").removesuffix("__"), *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # protocols that Python, torch and numpy look for
            raise AttributeError(name)
        known_name(name)
        return functools.partial(self._tracer.call, name, self)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_TYPES[self._kind]

    def __bool__(self) -> bool:
        return bool(self._value) if self._value is not None else self._tracer.branch(self)

    def __index__(self) -> int:
        return self._number("a Python index, range() or shape").__index__()

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __float__(self) -> float:
        return float(self._number("float() or a function of math", "the torch function of that name"))

    def _number(self, what: str, instead: str = "a tensor in place of a list, and torch.* in place of Python's") -> Any:
        if self._value is None:
            raise TraceError(f"{what} needs a Python number, not an expression of s, b, h, i or j", instead)
        return self._value

    def __iter__(self, *_: Any) -> Any:
        raise TraceError("an expression is one element and cannot be iterated or unpacked", "t[h, i] to read a tensor")

    __contains__ = __iter__  # Python would hide the message

    def __setitem__(self, *_: Any) -> Any:
        raise TraceError("writing into a tensor is not supported", _INSTEAD["setitem"])

    def __repr__(self) -> str:
        return self._tracer.describe(self._index)


def _define_operator(name: str) -> None:
    def operator(self: Expression, *others: Any) -> Any:
        return self._tracer.call(name, self, *others)

    def reflected(self: Expression, other: Any) -> Any:
        return self._tracer.call(name, other, self)

    setattr(Expression, f"__{name}__", operator)
    if name in _REFLECTED:
        setattr(Expression, f"__r{name}__", reflected)


for _name in _OPERATORS:
    _define_operator(_name)


def _tracer_of(values: Any) -> Owner | None:
    for value in values:
        if isinstance(value, Expression):
            return value._tracer
        if isinstance(value, (tuple, list)) and (inner := _tracer_of(value)):
            return inner
    return None
