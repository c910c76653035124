"""Tracing: a mask or score function is called once on stand-ins for its arguments and leaves a graph behind.

Three things make ordinary Python functions traceable. Operators, methods and torch functions on an Expression add a
node to the graph. `bool(expression)` answers True on one call of the function and False on the next, and the results of
both are merged, so that `if`, `and`, `or`, `not`, chained comparisons, `min`, `max`, `any` and `in` work. And the
function is rebuilt with the Python numbers that it captured replaced by nodes, so that they become arguments.

The graph under construction belongs to a Tracer, and every Expression knows its own: nothing is global. Expressions are
in expression.py, the rebuilding of functions in lift.py, the typing and simplification of operations in simplify.py,
and what is left behind in graph.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.core.expressions.expression import Expression, TraceError, known_name
from manyheads.core.expressions.graph import Graph, Node, canonical, kind_of
from manyheads.core.expressions.lift import Lifter
from manyheads.core.expressions.ops import KINDS, OPS, SPELLINGS, fold
from manyheads.core.expressions.simplify import BAKED, COMMUTE, is_const, simplified, typed

MAX_PATHS = 64
INPUTS = {"mask": "bhij", "score": "sbhij"}


class Tracer:
    """A graph under construction. Equal nodes are the same node, and what is known without operands is simplified."""

    error = TraceError

    def __init__(self, operands: Mapping[str, tuple[int, str]]):
        self.operands = dict(operands)
        self.nodes: list[Node] = []
        self.numbers: list[int | float] = []
        self.tensors: list[Tensor] = []
        self.expressions: list[Expression] = []
        self._known: dict[Any, Expression] = {}
        self._paths = 0
        self._plan: tuple[bool, ...] = ()
        self._taken: list[tuple[Expression, bool]] = []

    # ---- nodes ----

    def node(
        self, op: str, args: Sequence[Expression], kind: str, payload: Any = None, value: Any = None
    ) -> Expression:
        indices = tuple(a._index for a in args)
        identity = op, indices, kind, repr(payload)  # repr tells 1 from 1.0 and 0.0 from -0.0
        if identity not in self._known:
            letters = frozenset(payload if op == "input" else "")
            depends = letters.union(*(self.nodes[index].depends for index in indices))
            self._known[identity] = Expression(self, len(self.nodes), kind, value)
            self.expressions.append(self._known[identity])
            self.nodes.append(Node(op, indices, kind, payload, depends))
        return self._known[identity]

    def input(self, letter: str) -> Expression:
        return self.node("input", (), "f" if letter == "s" else "i", letter)

    def const(self, value: bool | int | float) -> Expression:
        kind = "b" if isinstance(value, bool) else "f" if isinstance(value, float) else "i"
        return self.node("const", (), kind, value, value)

    def number(self, value: int | float) -> Expression:
        self.numbers.append(value)
        return self.node("number", (), "f" if isinstance(value, float) else "i", len(self.numbers) - 1, value)

    def operand(self, name: str) -> Expression:
        return self.node("load", (), self.operands[name][1], name)

    def tensor(self, tensor: Tensor) -> Expression:
        slot = next((k for k, known in enumerate(self.tensors) if known is tensor), len(self.tensors))
        if slot == len(self.tensors):
            self.tensors.append(tensor)
        return self.node("load", (), kind_of(tensor), slot)

    def wrap(self, x: Any) -> Expression:
        if isinstance(x, Expression):
            if x._tracer is not self:
                raise TraceError("an expression of another trace was used", "a function of its own arguments only")
            return x
        if isinstance(x, Tensor):
            return self.tensor(x)
        if isinstance(x, (bool, int, float)):
            return self.const(x)
        raise TraceError(f"a {type(x).__name__} cannot be used with s, b, h, i or j", "a Python number or a tensor")

    def load(self, table: Any, at: Any) -> Expression:
        table = self.wrap(table)
        at = at if isinstance(at, tuple) else (at,)
        source = self.nodes[table._index]
        if source.op != "load":
            raise TraceError("only tensors can be indexed, not expressions", "tensor[i] with a captured tensor")
        if any(isinstance(x, slice) or x is None or x is Ellipsis for x in at):
            raise TraceError("a tensor was read with a slice, None or ...", "one integer index for each dimension")
        indices = (*(self.expressions[a] for a in source.args), *map(self.wrap, at))
        ndim = self._ndim(source)
        if len(indices) > ndim or any(x._kind != "i" for x in indices):
            kinds = ", ".join({"b": "boolean", "i": "integer", "f": "float"}[x._kind] for x in indices)
            raise TraceError(f"a tensor of {ndim} dimensions was read with {kinds}", f"{ndim} integer indices (use //)")
        return self.node("load", indices, table._kind, source.payload)

    def _ndim(self, source: Node) -> int:
        k = source.payload
        return self.operands[k][0] if isinstance(k, str) else self.tensors[k].ndim

    def _complete(self, x: Any) -> Expression:
        x = self.wrap(x)
        node = self.nodes[x._index]
        if node.op == "load" and len(node.args) < self._ndim(node):
            raise TraceError(
                f"a tensor of {self._ndim(node)} dimensions was read with {len(node.args)} indices",
                "one integer index for each dimension, as t[h, i], before computing with it",
            )
        return x

    def value_of(self, x: Any) -> bool | int | float | None:
        """The Python number behind x, lifted or not; None if there is none."""
        return x._value if isinstance(x, Expression) else x if isinstance(x, (bool, int, float)) else None

    def describe(self, index: int) -> str:
        node = self.nodes[index]
        args = [self.describe(a) for a in node.args]
        return f"{node.op if node.payload is None else node.payload}" + (f"({', '.join(args)})" if args else "")

    # ---- operations ----

    def call(self, name: str, *args: Any, **kwargs: Any) -> Expression:
        """What an operator, a method or a torch function of that name gives."""
        name = known_name(name)
        if name == "getitem":
            return self.load(*args)
        if name in ("to", "type_as"):
            return self._to(*args, **kwargs)
        if name == "div" and kwargs.get("rounding_mode") == "floor":
            name, kwargs = "floordiv", {}
        if name in SPELLINGS:
            try:
                inspect.signature(SPELLINGS[name]).bind(self, *args, **kwargs)
            except TypeError as error:
                raise TraceError(f"{name}: {error}", "it with one element's operands") from None
            return SPELLINGS[name](self, self._complete(args[0]), *args[1:], **kwargs)
        if kwargs:
            raise TraceError(f"{name} was given {', '.join(kwargs)}", f"{name} of its operands alone")
        if len(args) != OPS[name].arity:
            raise TraceError(
                f"{name} takes {OPS[name].arity} operands here, not {len(args)}",
                "it with one element's operands: there are no reductions over i or j",
            )
        return self.apply(name, *args)

    def _to(self, x: Any, target: Any = None, *, dtype: Any = None) -> Expression:
        target = target if dtype is None else dtype
        target = target.dtype if isinstance(target, (Tensor, Expression)) else target
        kinds = {torch.bool: "b", torch.int32: "i", torch.int64: "i", torch.float32: "f", torch.float64: "f"}
        if target not in kinds:
            raise TraceError(f"{target} is no type of an expression", "torch.bool, torch.int64 or torch.float32")
        return self.cast(x, kinds[target])

    def cast(self, x: Any, kind: str) -> Expression:
        x = self._complete(x)
        if x._kind == kind:
            return x
        if kind == "b":
            return self.apply("not", self.apply("eq", x, 0))
        return self.apply("to_int" if kind == "i" else "to_float", x)

    def apply(self, name: str, *operands: Any) -> Expression:
        """A row of OPS on operands, typed and simplified."""
        args, kind = typed(self, name, [self._complete(x) for x in operands])
        if name == "not" and kind == "i":
            return self.apply("sub", self.apply("neg", args[0]), 1)
        if name in BAKED and (value := args[1]._value) is not None:
            args[1] = self.const(value)
        if name in ("floordiv", "mod") and args[1]._value == 0:
            raise TraceError("division by zero", "a divisor other than 0")
        if name in COMMUTE and is_const(self, args[0]) and not is_const(self, args[1]):
            args = args[::-1]
        if all(is_const(self, a) for a in args):
            return self.const(fold(name, [a._value for a in args]))
        simple = simplified(self, name, args, kind)
        if simple is not None:
            return simple
        value = fold(name, [a._value for a in args]) if all(a._value is not None for a in args) else None
        return self.node(name, args, kind, None, value)

    # ---- branches ----

    def branch(self, test: Expression) -> bool:
        """The truth of an expression on the path that is being followed."""
        test = self.cast(test, "b")
        node = self.nodes[test._index]
        if node.op == "const":
            return node.payload
        if node.op == "not":
            return not self.branch(self.expressions[node.args[0]])
        for known, answer in self._taken:
            if known is test:
                return answer
        if len(self._taken) >= MAX_PATHS:
            raise TraceError(
                f"a loop or chain of more than {MAX_PATHS} tests on expressions",
                "a loop bounded by a Python number, or torch.where, & and |",
            )
        answer = self._plan[len(self._taken)] if len(self._taken) < len(self._plan) else True
        self._taken.append((test, answer))
        return answer

    def explore(self, what: str, function: Callable, operands: dict[str, Expression]) -> Expression:
        """What the function returns, merged over all paths through it."""
        self._paths = 0
        inputs = [self.input(letter) for letter in INPUTS[what]]

        def follow(plan: tuple[bool, ...]) -> Expression:
            self._paths += 1
            if self._paths > MAX_PATHS:
                raise TraceError(
                    f"more than {MAX_PATHS} paths through if, and, or, while on expressions",
                    "torch.where, & and |, or a loop bounded by a Python number",
                )
            self._plan, self._taken = plan, []
            result = function(*inputs, **operands)
            if result is None:
                raise TraceError(f"{what} returned None", "a return on every path", function=function)
            result, taken = self._complete(result), self._taken
            for k in reversed(range(len(plan), len(taken))):
                other = follow((*(answer for _, answer in taken[:k]), False))
                result = self.apply("where", taken[k][0], result, other)
            return result

        return self.cast(follow(()), "b" if what == "mask" else "f")

    # ---- the result ----

    def graph(self, mask: Expression | None, score: Expression | None) -> tuple[Graph, tuple, tuple[Tensor, ...]]:
        """The graph of both, and its numbers and tensors: see canonical."""
        ends = None if mask is None else mask._index, None if score is None else score._index
        return canonical(self.nodes, ends, self.operands, self.numbers, self.tensors)


def _operand_names(what: str, function: Callable, operands: Mapping[str, Any]) -> list[str]:
    """The parameters behind the positions that are operands. Others must have a default."""
    letters = INPUTS[what]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise TraceError(f"{what} is no function of ({', '.join(letters)})", "a Python function") from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    starred = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if len(positional) < len(letters) and not starred:
        given = ", ".join(p.name for p in parameters)
        raise TraceError(f"{what} takes ({given})", f"it with ({', '.join(letters)}) first", function)
    names = []
    for p in parameters:
        if p in positional[: len(letters)] or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name in operands:
            names.append(p.name)
        elif p.default is p.empty:
            declared = ", ".join(operands) or "none"
            raise TraceError(
                f"{what} takes a parameter {p.name!r} that is no operand (declared: {declared})",
                "it as a declared operand, or give it a default",
                function,
            )
    return names


def trace_graph(
    mask: Callable | None, score: Callable | None, operands: Mapping[str, tuple[int, str]]
) -> tuple[Graph, tuple[int | float, ...], tuple[Tensor, ...]]:
    """The graph of both functions, and the numbers and tensors that they captured."""
    for name, (ndim, kind) in operands.items():
        if kind not in KINDS or ndim < 0:
            raise ValueError(f"operand {name!r} is declared ({ndim}, {kind!r}); declare (ndim, 'b', 'i' or 'f')")
    tracer = Tracer(operands)
    lifter = Lifter(tracer.number)
    results: dict[str, Expression | None] = {"mask": None, "score": None}
    for what, function in (("mask", mask), ("score", score)):
        if function is not None:
            names = _operand_names(what, function, operands)
            lifted = lifter.lift(function)
            results[what] = tracer.explore(what, lifted, {name: tracer.operand(name) for name in names})
    return tracer.graph(results["mask"], results["score"])
