"""Tracing: a mask or score function is called once on stand-ins for its arguments and leaves a graph behind.

Three things make ordinary Python functions traceable. Operators, methods and torch functions on an Expression add a
node to the graph. `bool(expression)` answers True on one call of the function and False on the next, and the results of
both are merged, so that `if`, `and`, `or`, `not`, chained comparisons, `min`, `max`, `any` and `in` work. And the
function is rebuilt with the Python numbers that it captured replaced by nodes, so that they become arguments.

The graph under construction belongs to a Tracer, and every Expression knows its own: nothing is global.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.expressions.ops import ALIASES, KINDS, OPS, SPELLINGS

MAX_PATHS = 64
INPUTS = {"mask": "bhij", "score": "sbhij"}
TORCH_TYPES = {"b": torch.bool, "i": torch.int64, "f": torch.float32}
_COMMUTE = {"add", "mul", "min", "max", "and", "or", "xor", "eq"}
_BAKED = {"floordiv", "mod", "shl", "shr"}
_REFLECTED = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
_OPERATORS = [*_REFLECTED, "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "getitem"]
_LIBRARY_PATHS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)
_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}
_INSTEAD = {
    "item": "the expression itself: it has no value yet",
    "size": "a number: every expression is one (i, j) element",
    "softmax": "the score before normalisation: a score sees one element",
    "isin": "any(x == value for value in ...), or a boolean tensor indexed by x",
    "erf": "torch.tanh",
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


# ---- the graph ----


class Node(NamedTuple):
    """One value. args are indices of earlier nodes; depends are the letters of the inputs behind it, "d" for i - j.

    op is a row of OPS, or: "input" (payload: its letter), "const" (payload: a Python number), "number" (payload: its
    place among the lifted numbers), "load" (a tensor read at args; payload: the captured tensor's place, or the
    operand's name).
    """

    op: str
    args: tuple[int, ...]
    kind: str
    payload: Any
    depends: frozenset[str]


class Gradient(NamedTuple):
    """A number that a score reads from a float tensor, and the derivative of the score by it.

    source: the captured tensor's place, or the operand's name. index: the nodes it is read at, not yet wrapped and
    clamped. factor: the node of the derivative.
    """

    source: int | str
    index: tuple[int, ...]
    factor: int


Schedule = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """What tracing leaves behind: immutable, in canonical order, free of the numbers and tensors it was traced with.

    mask, score: index of the result, or None. operands: the declared (ndim, kind) of each operand.
    numbers, tensors: kind of each lifted number, (ndim, kind) of each captured tensor. key: see Program.key.
    dscore, gradients: the score's derivatives, behind all other nodes, if they were asked for: see derive.
    """

    nodes: tuple[Node, ...]
    mask: int | None
    score: int | None
    operands: dict[str, tuple[int, str]]
    numbers: tuple[str, ...]
    tensors: tuple[tuple[int, str], ...]
    key: str
    schedules: dict[int, Schedule]
    dscore: int | None = None
    gradients: tuple[Gradient, ...] = ()


def schedule(nodes: tuple[Node, ...], root: int, leaves: frozenset[int] = frozenset()) -> Schedule:
    """What to compute for root, in order: (node, nodes that nobody needs after it). Stops at leaves."""
    reached, stack = set(), [root]
    while stack:
        index = stack.pop()
        if index not in reached:
            reached.add(index)
            stack.extend(() if index in leaves else nodes[index].args)
    last_use = {root: -1}
    dead: dict[int, list[int]] = {index: [] for index in reached}
    for index in sorted(reached, reverse=True):
        for arg in () if index in leaves else nodes[index].args:
            if arg not in last_use:
                last_use[arg] = index
                dead[index].append(arg)
    return tuple((index, tuple(dead[index])) for index in sorted(reached))


def kind_of(tensor: Tensor) -> str:
    return "b" if tensor.dtype == torch.bool else "f" if tensor.is_floating_point() else "i"


def fold(name: str, values: list[Any]) -> bool | int | float:
    """An operation on Python numbers, in double precision."""
    doubles = [torch.tensor(v, dtype=torch.float64 if isinstance(v, float) else None) for v in values]
    op = OPS[name]
    return op.run(*doubles, torch.float64).item() if op.sized else op.run(*doubles).item()


# ---- stand-ins ----


class Expression:
    """Stands for one element's value while a function is traced. Behaves as a 0-d tensor, as far as OPS go."""

    __slots__ = ("_index", "_kind", "_tracer", "_value")

    def __init__(self, tracer: Tracer, index: int, kind: str, value: bool | int | float | None):
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
        self._tracer.known_name(name)
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


def _tracer_of(values: Any) -> Tracer | None:
    for value in values:
        if isinstance(value, Expression):
            return value._tracer
        if isinstance(value, (tuple, list)) and (inner := _tracer_of(value)):
            return inner
    return None


class Tracer:
    """A graph under construction. Equal nodes are the same node, and what is known without operands is simplified."""

    error = TraceError

    def __init__(self, operands: Mapping[str, tuple[int, str]]):
        self.operands = dict(operands)
        self.nodes: list[Node] = []
        self.numbers: list[int | float] = []
        self.tensors: list[Tensor] = []
        self._expressions: list[Expression] = []
        self._known: dict[Any, Expression] = {}
        self._lifted: dict[int, tuple[Any, Any]] = {}
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
            self._expressions.append(self._known[identity])
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
        indices = (*(self._expressions[a] for a in source.args), *map(self.wrap, at))
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

    def known_name(self, name: str) -> str:
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

    def call(self, name: str, *args: Any, **kwargs: Any) -> Expression:
        """What an operator, a method or a torch function of that name gives."""
        name = self.known_name(name)
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
        args, kind = self._typed(name, [self._complete(x) for x in operands])
        if name == "not" and kind == "i":
            return self.apply("sub", self.apply("neg", args[0]), 1)
        if name in _BAKED and (value := args[1]._value) is not None:
            args[1] = self.const(value)
        if name in ("floordiv", "mod") and args[1]._value == 0:
            raise TraceError("division by zero", "a divisor other than 0")
        if name in _COMMUTE and self._is_const(args[0]) and not self._is_const(args[1]):
            args = args[::-1]
        if all(self._is_const(a) for a in args):
            return self.const(fold(name, [a._value for a in args]))
        simple = self._simplified(name, args, kind)
        if simple is not None:
            return simple
        value = fold(name, [a._value for a in args]) if all(a._value is not None for a in args) else None
        return self.node(name, args, kind, None, value)

    def _typed(self, name: str, args: list[Expression]) -> tuple[list[Expression], str]:
        rule = OPS[name].rule
        values = args[1:] if rule == "choice" else args
        widest = max((a._kind for a in values), key=KINDS.index)
        if rule in ("bits", "shift") and widest == "f":
            raise TraceError(f"{name} was given a float", "it with booleans or integers")
        if rule == "number":
            kind = max(widest, "i", key=KINDS.index)
            return [self.cast(a, kind) for a in args], kind
        if rule in ("bits", "test"):
            return [self.cast(a, widest) for a in args], widest if rule == "bits" else "b"
        if rule == "shift":
            return [self.cast(a, "i") for a in args], "i"
        if rule == "real":
            return [self.cast(a, "f") for a in args], "f"
        if rule == "choice":
            return [self.cast(args[0], "b"), *(self.cast(a, widest) for a in values)], widest
        return args, rule[0]  # a cast

    def _is_const(self, x: Expression, value: Any = None) -> bool:
        return self.nodes[x._index].op == "const" and (value is None or x._value == value)

    def _simplified(self, name: str, args: list[Expression], kind: str) -> Expression | None:
        x, y = args[0], args[-1]
        if name == "where":
            return self._simplified_where(x, args[1], y, kind)
        if name in ("add", "sub") and self._is_const(y, 0):
            return x
        if self._is_const(y, 1) and (name in ("mul", "div") or (name == "floordiv" and kind == "i")):
            return x
        if name == "mul" and kind == "i" and self._is_const(y, 0):
            return y
        if name == "sub" and self._is_const(x, 0):
            return self.apply("neg", y)
        if name == "mul" and x is y:
            return self.apply("square", x)
        if name == "sub":
            return self._difference(x, y)
        if kind == "b" and name in ("and", "or") and self._is_const(y):
            return y if y._value == (name == "or") else x
        node = self.nodes[x._index]
        if name in ("neg", "not") and node.op == name:
            return self._expressions[node.args[0]]
        return None

    def _difference(self, x: Expression, y: Expression) -> Expression | None:
        """i - j is an input of its own: what depends on it alone is known exactly in each tile."""
        i, j, d = self.input("i"), self.input("j"), self.input("d")
        if x is i and y is j:
            return d
        return self.apply("neg", d) if x is j and y is i else None

    def _simplified_where(self, test: Expression, x: Expression, y: Expression, kind: str) -> Expression | None:
        if x is y:
            return x
        if self._is_const(test):
            return x if test._value else y
        node = self.nodes[test._index]
        if node.op == "lt" and {x._index, y._index} == set(node.args):  # Python's min and max
            return self.apply("min" if node.args[0] == x._index else "max", x, y)
        if kind != "b":
            return None
        if test is y or self._is_const(y, False):
            return self.apply("and", test, x)
        if test is x or self._is_const(x, True):
            return self.apply("or", test, y)
        if self._is_const(y, True):
            return self.apply("or", self.apply("not", test), x)
        if self._is_const(x, False):
            return self.apply("and", self.apply("not", test), y)
        return None

    # ---- branches ----

    def branch(self, test: Expression) -> bool:
        """The truth of an expression on the path that is being followed."""
        test = self.cast(test, "b")
        node = self.nodes[test._index]
        if node.op == "const":
            return node.payload
        if node.op == "not":
            return not self.branch(self._expressions[node.args[0]])
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

    # ---- captured numbers ----

    def lift(self, x: Any) -> Any:
        """x with each Python number in it replaced by a node, through containers and the functions of the user."""
        if id(x) in self._lifted:
            return self._lifted[id(x)][1]
        if isinstance(x, bool):
            return x
        if isinstance(x, (int, float)):
            return self.number(float(x) if isinstance(x, float) else int(x))
        if isinstance(x, types.FunctionType):
            return x if _is_library(x) else self._lift_function(x)
        if isinstance(x, types.MethodType):
            return x if _is_library(x) else types.MethodType(self.lift(x.__func__), x.__self__)
        lifted = x
        if type(x) in (list, tuple):
            lifted = type(x)(map(self.lift, x))
        elif type(x) is dict:
            lifted = {key: self.lift(value) for key, value in x.items()}
        elif type(x) is functools.partial:
            keywords = {key: self.lift(value) for key, value in x.keywords.items()}
            lifted = functools.partial(self.lift(x.func), *map(self.lift, x.args), **keywords)
        elif type(x).__module__ == "numpy" and hasattr(x, "dtype"):
            lifted = torch.as_tensor(x) if x.ndim else self.lift(x.item())
        self._lifted[id(x)] = x, lifted  # x is kept, so that its id stays its own
        return lifted

    def _lift_function(self, function: types.FunctionType) -> types.FunctionType:
        closure = function.__closure__
        cells = tuple(types.CellType() for _ in closure) if closure else None
        scope = dict(function.__globals__)
        lifted = types.FunctionType(function.__code__, scope, function.__name__, None, cells)
        self._lifted[id(function)] = function, lifted  # before what it captured: it may refer to itself
        for cell, original in zip(cells or (), closure or (), strict=True):
            try:
                cell.cell_contents = self.lift(original.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for name in _global_names(function.__code__) & scope.keys():
            scope[name] = self.lift(scope[name])
        lifted.__defaults__ = self.lift(function.__defaults__)
        lifted.__kwdefaults__ = self.lift(function.__kwdefaults__)
        lifted.__dict__.update(function.__dict__)
        return lifted

    # ---- the result ----

    def graph(self, mask: Expression | None, score: Expression | None) -> tuple[Graph, tuple, tuple[Tensor, ...]]:
        """The graph of both, and its numbers and tensors: what both need, numbered in the order they need it."""
        roots = [x._index for x in (mask, score) if x is not None]
        order = {old: new for new, old in enumerate(_needed_first(self.nodes, roots))}
        slots: dict[str, dict[Any, int]] = {"number": {}, "load": {}}
        nodes = []
        for old in order:
            node = self.nodes[old]
            payload = node.payload
            if node.op in slots and not isinstance(payload, str):
                payload = slots[node.op].setdefault(payload, len(slots[node.op]))
            nodes.append(node._replace(args=tuple(order[a] for a in node.args), payload=payload))
        numbers = tuple(self.numbers[slot] for slot in slots["number"])
        tensors = tuple(self.tensors[slot] for slot in slots["load"])
        ends = [None if x is None else order[x._index] for x in (mask, score)]
        lines = [f"{n.op} {n.args} {n.kind} {n.payload!r}" for n in nodes]
        graph = Graph(
            nodes=tuple(nodes),
            mask=ends[0],
            score=ends[1],
            operands=self.operands,
            numbers=tuple("f" if isinstance(n, float) else "i" for n in numbers),
            tensors=tuple((t.ndim, kind_of(t)) for t in tensors),
            key=hashlib.sha256("\n".join([*lines, str(ends)]).encode()).hexdigest()[:16],
            schedules={end: schedule(tuple(nodes), end) for end in ends if end is not None},
        )
        return graph, numbers, tensors


def _needed_first(nodes: list[Node], roots: list[int]) -> list[int]:
    """What roots need, each node behind its arguments: the same order however the function came to its result."""
    order: dict[int, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        index, ready = stack.pop()
        if ready:
            order[index] = None
        elif index not in order:
            stack.append((index, True))
            stack.extend((arg, False) for arg in reversed(nodes[index].args))
    return list(order)


def _is_library(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> set[str]:
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_global_names, nested))


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
    results: dict[str, Expression | None] = {"mask": None, "score": None}
    for what, function in (("mask", mask), ("score", score)):
        if function is not None:
            names = _operand_names(what, function, operands)
            lifted = tracer.lift(function)
            results[what] = tracer.explore(what, lifted, {name: tracer.operand(name) for name in names})
    return tracer.graph(results["mask"], results["score"])
