"""Bounds of a mask over tiles as kernel text: what tiles.py finds on tensors, by the same rules, in one function.

    bounds(b, h, queries, keys, differences, run, QUERIES, KEYS, A) -> (certainly true, possibly true)

of [rows, columns] tiles of QUERIES x KEYS pairs; results broadcast to that. queries [rows, 1], keys [1, columns] and
differences i - j [rows, columns] say what positions there are in each tile:

    (at, start, place, length, otherwise, low, high)

the places from `place` on, none beyond the last of `length`. Their positions are start + place, or what `at` holds, a
pointer, but `otherwise` where that is negative; low and high are the least and the greatest. All int32.
run: where i - j takes all values that `differences` has, and no others.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, ClassVar

import torch

from manyheads.core.expressions.emit import HELPERS, USES, Writer
from manyheads.core.expressions.graph import Node, schedule
from manyheads.core.expressions.intervals import known
from manyheads.core.expressions.ops import interval_of
from manyheads.core.expressions.terms import TYPES, Term, constant, number
from manyheads.core.expressions.tiles import BINS, SPAN

SIDES = {"i": ("queries", "QUERIES"), "j": ("keys", "KEYS"), "d": ("differences", "QUERIES + KEYS - 1")}
DTYPES = {"b": torch.bool, "i": torch.int64, "f": torch.float64}
AT_ONCE = 4  # positions

MORE = {
    "at_place": """
@jit
def at_place(side, step):
    at, start, place, length, otherwise, low, high = side
    place = tl.minimum(place + step, length - 1)
    if at is None:
        return start + place
    else:
        found = tl.load(at + place).to(tl.int32)
        return tl.where(found < 0, otherwise, found)
""",
    "ends_of": f"""
@jit
def ends_of(LEAF: tl.constexpr, HELD: tl.constexpr, b, h, side, SIZE: tl.constexpr, A):
    # The least and the greatest value in each tile, a NaN if there is one; if HELD a bit for each hash of a value.
    low = numeric(LEAF(b, h, at_place(side, 0), A))
    high = low
    bits = tl.zeros(low.shape, tl.int64)
    more = bits
    for first in range(0, SIZE, {AT_ONCE}):
        for step in tl.static_range({AT_ONCE}):
            x = numeric(LEAF(b, h, at_place(side, first + step), A))
            low, high = tl.minimum(low, x, propagate_nan=NAN), tl.maximum(high, x, propagate_nan=NAN)
            if HELD:
                bin = (x ^ (x >> 7) ^ (x >> 14)).to(tl.int64) & {BINS - 1}
                bit = tl.full([1, 1], 1, tl.int64) << (bin & 63)
                bits, more = bits | tl.where(bin < 64, bit, 0), more | tl.where(bin < 64, 0, bit)
    return low, high, bits, more
""",
    "numeric": """
@jit
def numeric(x):
    return x.to(tl.int32) if x.dtype.is_int1() else x
""",
}
NEEDS = {"ends_of": ("at_place", "numeric", "NAN")}


class Bounder(Writer):
    """A Writer that adds `bounds` of a mask."""

    helpers: ClassVar = {**HELPERS, **MORE}
    uses: ClassVar = {**USES, **NEEDS}

    def bounds_of_tiles(self, root: int) -> None:
        steps = [index for index, _ in schedule(self.nodes, root, frozenset(filter(self._is_leaf, range(root + 1))))]
        # What depends on i - j alone, and is read by what does not.
        read = {arg for index in steps if self._positions(index) != {"d"} for arg in self.nodes[index].args} | {root}
        self._differences = {index for index in steps if self._positions(index) == {"d"} and index in read}
        self._met = {arg for index in steps if self._meets(index) for arg in self.nodes[index].args}
        for index in steps:
            if index in self._differences or (self._is_leaf(index) and not self._is_given(index)):
                # With j = 0, i - j is i.
                parameters = "b, h, j, A" if self._positions(index) == {"j"} else "b, h, i, A, j=0"
                self.function(f"leaf{index}", parameters, index)
        self._begin()
        found: dict[int, Any] = {}
        for index in steps:
            found[index] = self._leaf(index) if self._is_leaf(index) else self._inner(index, found)
        low, high = found[root]
        parameters = "b, h, queries, keys, differences, run, QUERIES: tl.constexpr, KEYS: tl.constexpr, A"
        self._end("bounds", parameters, f"{low.text}, {high.text}")

    def _positions(self, index: int) -> frozenset[str]:
        return self.nodes[index].depends - {"b", "h"}

    def _is_leaf(self, index: int) -> bool:
        """Known exactly: of one of i and j, or of none of them."""
        return self._positions(index) in (frozenset(), frozenset("i"), frozenset("j"))

    def _is_given(self, index: int) -> bool:
        """Known without a look at any position."""
        return self.nodes[index].op == "const" or self.nodes[index].payload in SIDES

    def _meets(self, index: int) -> bool:
        """Whether it is x(i) == y(j), of integers."""
        sides = {(self._positions(a), self.nodes[a].kind) for a in self.nodes[index].args}
        return self.nodes[index].op == "eq" and sides == {(frozenset("i"), "i"), (frozenset("j"), "i")}

    # ---- bounds: pairs of terms ----

    def _term(self, text: str, dtype: torch.dtype) -> Any:
        return Term(self._let, self._let(text), dtype)

    def _leaf(self, index: int) -> Any:
        node, dtype = self.nodes[index], DTYPES[self.nodes[index].kind]
        if node.op == "const":
            ends = [node.payload, node.payload]
            if node.kind == "f":  # a double, which is rounded where it meets a tensor
                ends = sorted((node.payload, torch.tensor(node.payload, dtype=torch.float32).item()))
            return known(*[self._term(constant(number(end, dtype), dtype), dtype) for end in ends])
        if self._is_given(index):
            return self._side(node.payload)
        if self._positions(index):
            return self._ends(self._ends_of(index), node.kind)
        return known(*[self._term(constant(self._let(f"leaf{index}(b, h, 0, A)"), dtype), dtype)] * 2)

    def _side(self, letter: str) -> Any:
        return tuple(self._term(f"{SIDES[letter][0]}[{at}].to(tl.int64)", torch.int64) for at in (5, 6))

    def _ends_of(self, index: int) -> str:
        """The variable of ends_of a leaf."""
        (letter,) = self._positions(index)
        side, size = SIDES[letter]
        return self._let(f"ends_of(leaf{index}, {index in self._met}, b, h, {side}, {size}, A)")

    def _ends(self, variable: str, kind: str) -> Any:
        dtype = DTYPES[kind]
        cast = " != 0" if kind == "b" else f".to({TYPES[dtype]})"
        return known(*(self._term(f"{variable}[{k}]{cast}", dtype) for k in (0, 1)))

    def _inner(self, index: int, found: dict[int, Any]) -> Any:
        node = self.nodes[index]
        if node.op == "input":
            return self._side("d")
        operands = [found[a] for a in node.args]
        if node.op == "load":
            low, high = self._load(node, operands)
        else:
            low, high = interval_of(node.op, node.kind, operands)
        if self._meets(index):
            a, b = map(self._ends_of, node.args)
            high = high & self._term(f"({a}[2] & {b}[2] | {a}[3] & {b}[3]) != 0", torch.bool)
        if index in self._differences:
            run, exact = self._term("run", torch.bool), self._ends(self._ends_of(index), node.kind)
            low, high = (torch.where(run, *pair) for pair in zip(exact, (low, high), strict=True))
        return low, high

    # ---- tensors that are read at indices that are bounded only ----

    def _load(self, node: Node, indices: list[Any]) -> Any:
        """As Classifier._load_bounds; what an index is exactly takes one step."""
        sizes, strides = (
            [
                self._term(constant(self.argument(kind, node.payload, dim), torch.int64), torch.int64)
                for dim in range(len(indices))
            ]
            for kind in ("size", "stride")
        )
        few, places = self._term(constant("True", torch.bool), torch.bool), [[]]
        for arg, (low, high), size in zip(node.args, indices, sizes, strict=True):
            first, last = _wrapped(low, size), _wrapped(high, size)
            few = few & (last - first < SPAN) & ((low >= 0) | (high < 0))
            steps = range(SPAN if self._positions(arg) else 1)
            places = [[*place, torch.minimum(first + step, last)] for place in places for step in steps]
        pointer, dtype = self.argument("pointer", node.payload), DTYPES[node.kind]
        values = []
        for place in places:
            offset = reduce(add, (at * stride for at, stride in zip(place, strides, strict=True)))
            values.append(self._loaded(f"{pointer} + {offset.text}", dtype))
        least, greatest = (self._loaded(self.argument(end, node.payload), dtype) for end in ("least", "greatest"))
        low = torch.where(few, reduce(torch.minimum, values), least)
        return known(low, torch.where(few, reduce(torch.maximum, values), greatest))

    def _loaded(self, pointer: str, dtype: torch.dtype) -> Any:
        cast = " != 0" if dtype == torch.bool else f".to({TYPES[dtype]})"
        return self._term(f"tl.load({pointer}){cast}", dtype)


def _wrapped(index: Any, size: Any) -> Any:
    """As ops.wrapped."""
    return torch.maximum(torch.minimum(torch.where(index < 0, index + size, index), size - 1), torch.zeros_like(size))
