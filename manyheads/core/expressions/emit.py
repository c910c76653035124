"""Programs as text: the functions that kernels call for each tile of scores, in Triton or in Gluon.

    mask(b, h, i, j, A)         which pairs are allowed
    score(s, b, h, i, j, A)     the new scores, of the shape of s
    dscore(s, b, h, i, j, A)    d score / d s
    grad_<n>(s, b, h, i, j, A)  d score / d the number that gradient n reads
    place_<n>(s, b, h, i, j, A) where it is read: an offset into a contiguous tensor of that shape

b and h are scalars, i is int32 [BM, 1] or [BM, BN], j is [1, BN] or [BM, BN], s is float32 [BM, BN], all of them
tensors of the kernel language; results broadcast to the tile, derivatives may be plain numbers. In Gluon i and j are
pairs of tensors, (near, far), whose sum they are: a thread has few near parts, and the compiler knows the far ones,
which are below 512. A is a tuple of the arguments that Source.signature lists. What a lane outside of the scores
computes means nothing, but it reads no memory that is not a tensor's: indices are clamped everywhere.

Integers are 32 bits wide unless their bounds say otherwise. The text depends on no number, but for the magnitude of
integers beyond the longest position, and on nothing that tensors hold, but for integers beyond SMALL.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from manyheads.core.expressions.graph import Node, schedule
from manyheads.core.expressions.intervals import FAR, INF, Bounds
from manyheads.core.expressions.ops import OPS, interval_of

if TYPE_CHECKING:
    from manyheads.core.expressions import Program

EXACT = 2**23  # floats are exact up to twice that
SMALL = 2**24  # integers in tensors that count as small
INDICES = 2**16  # of batch and head
NARROW = 2**31  # what does not fit 32 bits

LANGUAGES = {
    "triton": """import triton
import triton.language as tl

jit = triton.jit
""",
    "gluon": """from triton.experimental import gluon
from triton.experimental.gluon import language as tl

jit = gluon.jit
""",
}

# Whoever calls one of these in a function gets it in the module.
HELPERS = {
    "NAN": """
from triton.language import PropagateNan

NAN = tl.constexpr(PropagateNan.ALL)
""",
    "clamped": """
@jit
def clamped(index, size):
    return tl.maximum(tl.minimum(index, size - 1), 0)
""",
    "wrapped": """
@jit
def wrapped(index, size):
    return tl.maximum(tl.minimum(tl.where(index < 0, index + size, index), size - 1), 0)
""",
    "floormod": """
@jit
def floormod(a, b):
    rest = a % b  # has the sign of a
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    "floordiv": """
@jit
def floordiv(a, b):
    rest = a % b
    return a // b - ((rest != 0) & ((rest < 0) != (b < 0))).to(tl.int32)
""",
    "floordiv_real": """
@jit
def floordiv_real(a, b):
    quotient = (a - floormod(a, b)) / b  # a whole number, but for rounding
    floor = tl.floor(quotient)
    return tl.where(quotient - floor > 0.5, floor + 1.0, floor)
""",
    "tanh": """
@jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
""",
    # What Triton makes of log2 is several times larger, for the sake of subnormal numbers.
    "lg2": """
@jit
def lg2(x):
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
""",
    "reciprocal": """
@jit
def reciprocal(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
""",
}
USES = {"floordiv_real": ("floormod",)}
# Masks compare what positions give, and must not round it otherwise than tensors do; scores may.
EXACT_TEXT = {"div": "tl.div_rn({0}, {1})", "sqrt": "tl.sqrt_rn({0})"}
# What is not worth what Triton pays for it: subnormal numbers, and the last bit of a quotient.
GLUON_TEXT = {
    "log": "lg2({0}) * 0.6931471805599453", "log2": "lg2({0})", "exp": "tl.exp2({0} * 1.4426950408889634)",
    "tanh": "1.0 - 2.0 * reciprocal(tl.exp2({0} * 2.8853900817779268) + 1.0)",
    "sigmoid": "reciprocal(1.0 + tl.exp2({0} * -1.4426950408889634))",
}  # fmt: skip


class Argument(NamedTuple):
    """One run-time argument. kind: "pointer"; "least" or "greatest", a pointer to that number of a tensor; "size" or
    "stride" of dimension `dim`; "i32", "i64" or "fp32", a number; "inverse", one over a number. of: a captured tensor's
    place, an operand's name, or a number's node."""

    name: str
    kind: str
    of: int | str
    dim: int = 0


ORDER = ["pointer", "least", "greatest", "size", "stride", "i32", "i64", "fp32", "inverse"]


class Writer:
    """Text of functions over one graph. `small`: the captured tensors of integers below SMALL."""

    helpers, uses = HELPERS, USES

    def __init__(self, program: Program, language: str, length: int, small: frozenset[int]):
        if language not in LANGUAGES:
            raise ValueError(f"no kernel language is called {language!r}; there are {', '.join(LANGUAGES)}")
        self.language, self.length, self.small = language, length, small
        self.pairs = language == "gluon"
        self.narrow = small | program.tables.narrow  # captured tensors that are read in 32 bits
        self.nodes, self.constants = program.graph.nodes, program.constants
        self._is_number = frozenset(k for k in program.constants if self.nodes[k].op != "const")
        self._arguments: dict[tuple[str, int | str, int], Argument] = {}
        self._functions: list[tuple[str, list[Argument], list[str]]] = []  # head, what it unpacks, body
        self._tables: dict[int | str, str] = {}
        self._bounds: dict[int, Bounds] = {}
        self._body: dict[str, str] = {}  # expressions, and the variables that hold them
        self._used: dict[Argument, None] = {}
        self._values: dict[int, str] = {}

    # ---- bounds ----

    def bounds(self, index: int) -> Bounds:
        if index not in self._bounds:
            for step, _ in schedule(self.nodes, index, frozenset(self._bounds)):
                if step not in self._bounds:
                    low, high = self._limits(step, self.nodes[step])
                    dtype = {"b": torch.bool, "i": torch.int64, "f": torch.float64}[self.nodes[step].kind]
                    self._bounds[step] = torch.as_tensor(low, dtype=dtype), torch.as_tensor(high, dtype=dtype)
        return self._bounds[index]

    def _limits(self, index: int, node: Node) -> tuple:
        if node.op == "const":
            value = node.payload
            return (value, value) if value == value else (-INF, INF)
        if node.op == "input":
            last = self.length - 1
            inputs = {"s": (-INF, INF), "i": (0, last), "j": (0, last), "d": (-last, last)}
            return inputs.get(node.payload, (0, INDICES))
        if node.kind == "f" and (node.op == "load" or index in self._is_number):
            return -INF, INF
        if node.kind == "b" and (node.op == "load" or index in self._is_number):
            return False, True
        if node.op == "load":
            if node.payload in self.narrow - self.small:
                return -NARROW, NARROW - 1
            far = SMALL if node.payload in self.small else FAR
            return -far, far
        if index in self._is_number:
            far = max(self.length, 1 << abs(int(self.constants[index])).bit_length())
            return -far, far
        return interval_of(node.op, node.kind, [self._bounds[a] for a in node.args])

    def is_wide(self, index: int) -> bool:
        if self.nodes[index].kind != "i":
            return False
        low, high = self.bounds(index)
        return low.item() < -NARROW or high.item() >= NARROW

    # ---- arguments ----

    def argument(self, kind: str, of: int | str, dim: int = 0) -> str:
        """The name of an argument, which the function at hand unpacks."""
        identity = kind, of, dim
        if identity not in self._arguments:
            self._arguments[identity] = Argument(self._name(*identity), *identity)
        self._used[self._arguments[identity]] = None
        return self._arguments[identity].name

    def _name(self, kind: str, of: int | str, dim: int) -> str:
        if kind in ("i32", "i64", "fp32", "inverse"):
            return f"number{sum(a.name.startswith('number') for a in self._arguments.values())}"
        if of not in self._tables:
            alike = sum(isinstance(other, int) for other in self._tables)
            self._tables[of] = f"operand_{of}" if isinstance(of, str) else f"tensor{alike}"
        return self._tables[of] + ("" if kind == "pointer" else f"_{kind}{dim}")

    # ---- functions ----

    def function(self, name: str, parameters: str, root: int, tile: bool = False) -> None:
        """Adds a function that returns a node; if `tile`, in the shape of s."""
        self._begin(root)
        value, depends = self._values[root], self.nodes[root].depends
        if tile and not (depends >= {"i", "j"} or depends & {"s", "d"}):
            value = f"tl.where(s == s, {value}, {value})"
        if self.nodes[root].kind == "b" and not depends & {"i", "j", "d"}:
            j = self._position("j")
            value = {"True": f"{j} == {j}", "False": f"{j} != {j}"}.get(value, f"{value} & ({j} == {j})")
        self._end(name, parameters, value)

    def place(self, name: str, source: int | str, index: tuple[int, ...]) -> None:
        """Adds a function that returns the offset at which a contiguous tensor is read."""
        self._begin(*index)
        sizes = [self.argument("size", source, dim) for dim in range(len(index))]
        terms = [
            " * ".join([self._place(at, sizes[dim], wide=dim < len(index) - 1), *sizes[dim + 1 :]])
            for dim, at in enumerate(index)
        ]
        self._end(name, "s, b, h, i, j, A", " + ".join(terms) or "0")

    def _begin(self, *roots: int) -> None:
        self._body, self._used, self._values = {}, {}, {}
        for root in roots:
            for index, _ in schedule(self.nodes, root, self._is_number | self._values.keys()):
                if index not in self._values:
                    self._values[index] = self._value(index, self.nodes[index])

    def _end(self, name: str, parameters: str, value: str) -> None:
        body = [f"{variable} = {text}" for text, variable in self._body.items()]
        self._functions.append((f"def {name}({parameters}):", list(self._used), [*body, f"return {value}"]))

    def _let(self, text: str) -> str:
        return self._body.setdefault(text, f"v{len(self._body)}")

    def _value(self, index: int, node: Node) -> str:
        """A node as a name or a literal; what it takes to compute it goes to the body."""
        if node.op == "const":
            return literal(node.payload)
        if node.op == "input" and node.payload != "d":
            return self._position(node.payload) if node.payload in ("i", "j") else node.payload
        if index in self._is_number:
            if node.kind == "f":
                return self.argument("fp32", index)
            name = self.argument("i64" if self.is_wide(index) else "i32", index)
            return f"({name} != 0)" if node.kind == "b" else name
        if node.op == "input":
            return self._let(" - ".join(self._difference()))
        return self._let(self._read(node) if node.op == "load" else self._operation(index, node))

    def _position(self, letter: str) -> str:
        return self._let(f"{letter}[0] + {letter}[1]") if self.pairs else letter

    def _difference(self) -> tuple[str, str]:
        """Two values whose difference is i - j; of pairs, the near parts' and the far parts'."""
        return (self._let("i[0] - j[0]"), self._let("j[1] - i[1]")) if self.pairs else ("i", "j")

    def _comparison(self, node: Node) -> str | None:
        """Of i and j, or of i - j and what no position is in: the far parts on a side of their own."""
        if not self.pairs or node.op not in ("lt", "le", "eq"):
            return None
        sides = [self.nodes[a].payload if self.nodes[a].op == "input" else None for a in node.args]
        if sides in (["i", "j"], ["j", "i"]):
            return OPS[node.op].text.format(*self._difference()[:: 1 if sides[0] == "i" else -1])
        if "d" not in sides:
            return None
        other = node.args[1 - sides.index("d")]
        if self.nodes[other].depends & {"i", "j", "d"} or self._largest(other) + self.length > NARROW // 4:
            return None
        near, far = self._difference()
        moved = self._let(f"{near} - {self._values[other]}")
        return OPS[node.op].text.format(*((moved, far) if sides[0] == "d" else (far, moved)))

    def _largest(self, index: int) -> int:
        low, high = self.bounds(index)
        return max(-int(low), int(high))

    def _float(self, index: int) -> str:
        """An integer as a float. Of i - j the difference of floats, if none of the three is rounded: of the near parts
        there are few, and the far ones are known before."""
        node = self.nodes[index]
        if self.pairs and self._largest(index) <= EXACT:
            inner = self.nodes[node.args[0]] if node.op == "neg" else node
            if inner.op == "input" and inner.payload == "d":
                parts = [f"{part}.to(tl.float32)" for part in self._difference()]
                return " - ".join(parts if inner is node else reversed(parts))
            if node.op == "abs":
                return OPS["abs"].text.format(self._let(self._float(node.args[0])))
        return f"{self._values[index]}.to(tl.float32)"

    def _operation(self, index: int, node: Node) -> str:
        if node.op == "to_float" and self.nodes[node.args[0]].kind == "i":
            return self._float(node.args[0])
        if comparison := self._comparison(node):
            return comparison
        text, args = self._spelling(index, node), node.args
        values = [self._values[a] for a in args]
        wide, any_wide = self.is_wide(index), any(self.is_wide(a) for a in args)
        if (wide or any_wide) and not node.op.startswith("to_"):
            values = [self._widened(a) for a in args]
        if node.op == "to_int" and wide:
            text = text.replace("int32", "int64")
        text = text.format(*values)
        return f"({text}).to(tl.int32)" if any_wide and node.kind == "i" and not wide else text

    def _widened(self, index: int) -> str:
        """An integer of 64 bits; a small literal follows its surroundings."""
        value, node = self._values[index], self.nodes[index]
        if node.kind != "i" or (node.op == "const") != self.is_wide(index):
            return value
        return f"tl.cast({value}, tl.int64)" if node.op == "const" else f"{value}.to(tl.int64)"

    def _spelling(self, index: int, node: Node) -> str:
        if node.op in ("floordiv", "mod"):
            return self._division(node)
        if "s" not in node.depends and node.op in EXACT_TEXT:
            return EXACT_TEXT[node.op]
        if node.op == "div" and (inverse := self._inverse(node.args[1])):
            return f"{{0}} * {inverse}"
        if self.language == "gluon" and "s" in node.depends and node.op in GLUON_TEXT:
            return GLUON_TEXT[node.op]
        return OPS[node.op].text

    def _inverse(self, divisor: int) -> str | None:
        """One over a number, by which scores are multiplied where they are divided by that."""
        if divisor in self._is_number:
            return self.argument("inverse", divisor)
        node = self.nodes[divisor]
        return literal(1 / node.payload) if node.op == "const" and node.payload else None

    def _division(self, node: Node) -> str:
        """Triton's // and % round towards zero; they are the same where nothing is negative."""
        is_div = node.op == "floordiv"
        divisor = self.nodes[node.args[1]]
        if node.kind == "f":
            return "floordiv_real({0}, {1})" if is_div else OPS["mod"].text
        if divisor.op == "const" and divisor.payload > 0 and divisor.payload & (divisor.payload - 1) == 0:
            return f"{{0}} >> {divisor.payload.bit_length() - 1}" if is_div else f"{{0}} & {divisor.payload - 1}"
        if self.bounds(node.args[0])[0] >= 0 and self.bounds(node.args[1])[0] > 0:
            return "{0} // {1}" if is_div else "{0} % {1}"
        return OPS[node.op].text

    def _read(self, node: Node) -> str:
        pointer, last = self.argument("pointer", node.payload), len(node.args) - 1
        sizes = [self.argument("size", node.payload, dim) for dim in range(len(node.args))]
        strides = [self.argument("stride", node.payload, dim) for dim in range(len(node.args))]
        places = [self._place(at, sizes[dim], wide=dim < last) for dim, at in enumerate(node.args)]
        offsets = [f"{place} * {stride}" for place, stride in zip(places, strides, strict=True)]
        text = f"tl.load({' + '.join([pointer, *offsets])})"
        if node.kind == "b":
            return f"{text} != 0"
        kind = "float32" if node.kind == "f" else "int32" if node.payload in self.narrow else "int64"
        return f"{text}.to(tl.{kind})"

    def _place(self, index: int, size: str, wide: bool) -> str:
        """An index inside of a dimension. All but the last are widened: their strides may be long."""
        helper = "clamped" if self.bounds(index)[0] >= 0 else "wrapped"
        return self._let(f"{helper}({self._values[index]}, {size})" + (".to(tl.int64)" if wide else ""))

    # ---- the module ----

    def signature(self) -> tuple[Argument, ...]:
        return tuple(sorted(self._arguments.values(), key=lambda argument: ORDER.index(argument.kind)))

    def text(self) -> str:
        signature = self.signature()
        functions = []
        for head, used, body in self._functions:
            unpacked = [f"{name.name} = A[{k}]" for k, name in enumerate(signature) if name in used]
            functions.append("\n    ".join([f"\n@jit\n{head}", *unpacked, *body]) + "\n")
        called = set(re.findall(r"(?<![.\w])\w+", "".join(functions))) & self.helpers.keys()
        called |= {needed for name in called for needed in self.uses.get(name, ())}
        listed = ", ".join(f"{argument.name}: {argument.kind}" for argument in signature)
        head = f"# A = ({listed})\n{LANGUAGES[self.language]}"
        return "\n".join([head, *(text for name, text in self.helpers.items() if name in called), *functions])


def literal(value: bool | int | float) -> str:
    """A Python number as kernels write it: floats that float32 cannot hold are rounded as it would."""
    if not isinstance(value, float):
        return repr(value)
    rounded = torch.tensor(value, dtype=torch.float32).item()
    if not math.isfinite(rounded):
        return f'float("{rounded}")'
    return repr(value if abs(value) >= 2.0**-126 else math.copysign(0.0, value))
