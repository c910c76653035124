"""Stand-ins for bounds: the rules of intervals.py and ops.py, called on them, write themselves down as kernel text.

So the rules are there once, for tensors and for kernels, as masks and scores are. A term knows torch's names for what
the rules do, no more. Its text computes with the same 64 bits that the rules have on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Let = Callable[[str], str]  # takes a text, gives the name of the variable that holds its value

TYPES = {torch.bool: "tl.int1", torch.int64: "tl.int64", torch.float64: "tl.float64"}
REAL = torch.float64
# In the type of the operands.
SAME = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "truediv": "{0} / {1}",
    "floordiv": "floordiv({0}, {1})", "floordiv_real": "floordiv_real({0}, {1})",
    "mod": "floormod({0}, {1})", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "lshift": "{0} << {1}", "rshift": "{0} >> {1}", "neg": "-{0}", "invert": "~{0}",
    "abs": "tl.abs({0})", "floor": "tl.floor({0})",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=NAN)", "maximum": "tl.maximum({0}, {1}, propagate_nan=NAN)",
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})", "sqrt": "tl.sqrt({0})",
    "tanh": "1.0 - 2.0 / (tl.exp(2.0 * {0}) + 1.0)", "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))", "erf": "tl.erf({0})",
}  # fmt: skip
OTHERWISE = {
    ("minimum", torch.bool): "and", ("maximum", torch.bool): "or", ("floordiv", REAL): "floordiv_real",
}  # fmt: skip
TESTS = {
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}",
    "isnan": "{0} != {0}", "isfinite": 'tl.abs({0}) < float("inf")',
}  # fmt: skip
REFLECTED = ("add", "sub", "mul", "and", "or")


class Term:
    """A value in a kernel: text, which is a name or a literal, of one of TYPES."""

    def __init__(self, let: Let, text: str, dtype: torch.dtype):
        self.let, self.text, self.dtype = let, text, dtype

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = next(a for a in args if isinstance(a, Term))
        name = function.__name__
        return (getattr(own, f"_{name}") if hasattr(own, f"_{name}") else own._named(name))(*args, **(kwargs or {}))

    def _named(self, name: str) -> Callable[..., Term]:
        name = OTHERWISE.get((name, self.dtype), name)
        text, dtype = (TESTS[name], torch.bool) if name in TESTS else (SAME[name], None)
        return lambda *operands: self._written(text, operands, dtype)

    def _written(self, text: str, operands: tuple[Any, ...], dtype: torch.dtype | None = None) -> Term:
        common = next(x.dtype for x in operands if isinstance(x, Term))
        texts = [self._like(x, common).text for x in operands]
        return Term(self.let, self.let(text.format(*texts)), dtype or common)

    def _like(self, x: Any, dtype: torch.dtype) -> Term:
        if isinstance(x, Term):
            assert x.dtype == dtype, f"rules mix no {x.dtype} with {dtype}"
            return x
        return Term(self.let, self.let(constant(number(x, dtype), dtype)), dtype)

    def _cast(self, dtype: torch.dtype) -> Term:
        return self if self.dtype == dtype else Term(self.let, self.let(f"{self.text}.to({TYPES[dtype]})"), dtype)

    # ---- what the rules ask for by name ----

    def is_floating_point(self) -> bool:
        return self.dtype == REAL

    def double(self) -> Term:
        return self._cast(REAL)

    def long(self) -> Term:
        return self._cast(torch.int64)

    def isnan(self) -> Term:
        return self._named("isnan")(self)

    def isfinite(self) -> Term:
        return self._named("isfinite")(self)

    def abs(self) -> Term:
        return self._named("abs")(self)

    def floor(self) -> Term:
        return self._named("floor")(self)

    def clamp(self, min: Any = None, max: Any = None) -> Term:
        found = self if min is None else self._named("maximum")(self, min)
        return found if max is None else self._named("minimum")(found, max)

    def nan_to_num(self, *others: float) -> Term:
        assert others == (0, 0, 0), "rules want zeros"
        return self._where(self.isfinite(), self, 0)

    def _where(self, test: Term, a: Any, b: Any) -> Term:
        common = next((x.dtype for x in (a, b) if isinstance(x, Term)), torch.int64)
        texts = [test.text, self._like(a, common).text, self._like(b, common).text]
        return Term(self.let, self.let("tl.where({}, {}, {})".format(*texts)), common)

    def _full_like(self, other: Term, value: Any) -> Term:
        return self._like(value, other.dtype)

    def _zeros_like(self, other: Term) -> Term:
        return self._like(0, other.dtype)

    def _ones_like(self, other: Term) -> Term:
        return self._like(1, other.dtype)


def constant(text: str, dtype: torch.dtype) -> str:
    """A scalar as what all tiles have in common. It has two dimensions: the interpreter takes the comparison of two
    floats without any for a float."""
    return f"tl.full([1, 1], {text}, {TYPES[dtype]})"


def number(value: Any, dtype: torch.dtype) -> str:
    """A Python number as a kernel's literal of one of TYPES."""
    if dtype != REAL:
        return repr(bool(value) if dtype == torch.bool else int(value))
    return repr(float(value)) if math.isfinite(value) else f'float("{value}")'


def _define_operator(name: str) -> None:
    def operator(self: Term, *others: Any) -> Term:
        return self._named(name)(self, *others)

    def reflected(self: Term, other: Any) -> Term:
        return self._named(name)(other, self)

    setattr(Term, f"__{name}__", operator)
    if name in REFLECTED:
        setattr(Term, f"__r{name}__", reflected)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "neg",
              "invert", "lt", "le", "gt", "ge", "eq"):  # fmt: skip
    _define_operator(_name)
