"""Masks and scores as plain functions of positions, traced once and read in several ways.

A mask(b, h, i, j) -> bool and a score(s, b, h, i, j) -> float are written for one element: batch, head and absolute
query and key position, and for a score the scaled product s. `trace` turns them into a Program, which runs on tensors,
writes kernels' text, has derivatives, says which tiles of a score matrix are empty or full without building a mask, and
has a key that is stable under what does not change the code: `window` may be 128 or 4096.

    def mask(b, h, i, j): return 0 <= i - j < window
    def score(s, b, h, i, j, forget): return s + forget[b, h, i] - forget[b, h, j]

    program = trace(mask, score, operands={"forget": (3, "f")})

A tensor is read with one integer index for each dimension. An index beyond the tensor wraps once if negative and is
then clamped, so that what lies beside the data can be computed and thrown away. A function may be called several times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from manyheads.core.expressions.derive import derive
from manyheads.core.expressions.expression import TraceError
from manyheads.core.expressions.graph import Gradient, Graph, kind_of, schedule
from manyheads.core.expressions.ops import OPS, fold, gather, widened
from manyheads.core.expressions.source import Source, Tables, make_source
from manyheads.core.expressions.tiles import EMPTY, FULL, PARTIAL, classify
from manyheads.core.expressions.trace import trace_graph

__all__ = ["EMPTY", "FULL", "PARTIAL", "Gradient", "Program", "Source", "TraceError", "trace"]

Number = int | float | Tensor


def trace(
    mask: Callable | None = None,
    score: Callable | None = None,
    operands: Mapping[str, tuple[int, str]] | None = None,
) -> Program:
    """Trace mask(b, h, i, j, ...) and score(s, b, h, i, j, ...).

    operands: for each name that may follow j, its number of dimensions and its kind: "b", "i" or "f". They are bound
        by keyword when the program runs. Tensors that the functions captured are bound now.

    Numbers in closures, globals, defaults and helper functions become arguments of the program. Divisors, moduli,
    shifts, exponents, loop bounds and attributes of objects do not: they are part of the key.
    """
    return Program(*trace_graph(mask, score, operands or {}))


class Program:
    """A traced mask, score, or both.

    numbers, tensors: what the functions captured, in the order of the graph.
    key: 16 hexadecimal digits, equal for programs that differ in numbers and tensors alone.
    mask_depends, score_depends: the letters among b, h, i, j, s that the results depend on.
    operand_names: the operands that are read, in declared order.
    gradients: of a program that `derivative` gave: where the score reads floats, and its derivatives by them.
    """

    def __init__(self, graph: Graph, numbers: tuple[Number, ...], tensors: tuple[Tensor, ...]):
        self.graph = graph
        self.numbers = numbers
        self.tensors = tensors
        self.key = graph.key
        self.has_mask = graph.mask is not None
        self.has_score = graph.score is not None
        self.gradients = graph.gradients
        self.tables = Tables(tensors)
        self._derivative: Program | None = None
        self._sources: dict[Any, Any] = {}  # None where what the tensors hold makes a difference
        self.constants = _constants(graph, numbers)

    def __repr__(self) -> str:
        parts = [name for name, has in (("mask", self.has_mask), ("score", self.has_score)) if has]
        return f"Program({' and '.join(parts) or 'empty'}, key={self.key}, numbers={self.numbers})"

    @property
    def mask_depends(self) -> frozenset[str]:
        return self._depends(self.graph.mask)

    @property
    def score_depends(self) -> frozenset[str]:
        return frozenset("s") if self.graph.score is None else self._depends(self.graph.score)

    @property
    def operand_names(self) -> tuple[str, ...]:
        read = {node.payload for node in self.graph.nodes if node.op == "load"}
        return tuple(name for name in self.graph.operands if name in read)

    @cached_property
    def mask_reads(self) -> frozenset[int | str]:
        """What the mask reads, and what the tile map depends on: places of captured tensors, names of operands."""
        steps = () if self.graph.mask is None else self.graph.schedules[self.graph.mask]
        nodes = [self.graph.nodes[step] for step, _ in steps]
        return frozenset(node.payload for node in nodes if node.op == "load")

    @cached_property
    def mask_reads_operands(self) -> bool:
        return any(isinstance(source, str) for source in self.mask_reads)

    def mask(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, **operands: Tensor) -> Tensor:
        """Which pairs are allowed: bool, in the common shape of the arguments in mask_depends."""
        if self.graph.mask is None:
            return torch.full((), True, dtype=torch.bool, device=i.device)
        value = self.evaluate(self.graph.mask, {"b": b, "h": h, "i": i, "j": j}, operands)
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.bool, device=i.device)

    def score(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, **operands: Tensor) -> Tensor:
        """The new scores, in the dtype of s and the common shape of the arguments in score_depends.

        Floats are computed in the dtype of s, float32 at the least. Differentiable in s, captured tensors, operands.
        """
        if self.graph.score is None:
            return s
        return self._real(self.graph.score, s, b, h, i, j, operands)

    def _real(
        self, index: int, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, operands: Mapping[str, Tensor]
    ) -> Tensor:
        real = torch.promote_types(s.dtype, torch.float32)
        inputs = {"s": s.to(real), "b": b, "h": h, "i": i, "j": j}
        value = self.evaluate(index, inputs, operands, real)
        return value.to(s.dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=s.dtype, device=s.device)

    def dscore(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, **operands: Tensor) -> Tensor:
        """d score / d s, of a program that `derivative` gave, as `score` gives the scores."""
        if self.graph.dscore is None:
            raise ValueError("a program has no dscore before derivative() was called")
        return self._real(self.graph.dscore, s, b, h, i, j, operands)

    def tiles(
        self,
        i: Tensor | range,
        j: Tensor | range,
        tile: tuple[int, int] = (128, 128),
        batch: int = 1,
        heads: int = 1,
        *,
        device: torch.device | None = None,
        **operands: Tensor,
    ) -> Tensor:
        """Which tiles of the mask are EMPTY, PARTIAL or FULL: uint8 [batch | 1, heads | 1, query tiles, key tiles].

        i, j: int64 positions [q_len], [kv_len] or [batch, q_len], [batch, kv_len], in any order, -1 where there is no
            token; or ranges. What depends on i - j alone is exact where positions are a run.

        EMPTY: no pair of tokens is allowed. FULL: there is a token at every place, and all pairs are allowed. Anything
        may be called PARTIAL. Memory is linear in the lengths and in the number of tiles.
        The map lies on `device`: where the positions are, or the first operand, or on the CPU, unless given.
        """
        self.check(operands)
        return classify(self, i, j, tile, batch, heads, operands, device)

    def derivative(self) -> Program:
        """The same program, with `dscore` and `gradients`."""
        if self.graph.dscore is not None:
            return self
        if self._derivative is None:
            self._derivative = Program(derive(self.graph, self.tensors), self.numbers, self.tensors)
            self._derivative.tables = self.tables  # moved and converted once for both
        return self._derivative

    def source(
        self, language: str = "triton", outputs: Sequence[str] = ("mask", "score"), length: int = 2**20
    ) -> Source:
        """The text of the functions that kernels call, and what to call them with.

        language: "triton" or "gluon". outputs: what to write of mask, score, dscore and gradients, as far as the
            program has it. length: positions are below it, so that integers may be 32 bits wide; each length may have
            its own text.
        """
        asked = language, tuple(outputs), length
        if asked not in self._sources:
            least, most = (make_source(self, *asked, small) for small in self.tables.guesses())
            self._sources[asked] = least if least.text == most.text else None
        if (source := self._sources[asked]) is not None:
            return source
        looked = *asked, self.tables.small()
        if looked not in self._sources:
            self._sources[looked] = make_source(self, *looked)
        return self._sources[looked]

    def rebind(self, numbers: tuple[Number, ...], tensors: tuple[Tensor, ...]) -> Program:
        """The same program with other numbers and tensors: those of a program with the same key.

        Numbers may be 0-d tensors: then they are arguments of what torch.compile makes of the program, too.
        """
        if len(numbers) != len(self.graph.numbers) or len(tensors) != len(self.graph.tensors):
            raise ValueError(
                f"the program has {len(self.graph.numbers)} numbers and {len(self.graph.tensors)} tensors, "
                f"not {len(numbers)} and {len(tensors)}"
            )
        for n, kind in zip(numbers, self.graph.numbers, strict=True):
            if (kind_of(n) if isinstance(n, Tensor) else "f" if isinstance(n, float) else "i") != kind:
                raise TypeError(f"number {n!r} was {'a float' if kind == 'f' else 'an integer'} when traced")
        for t, (ndim, kind) in zip(tensors, self.graph.tensors, strict=True):
            _check_tensor("captured tensor", t, ndim, kind)
        return Program(self.graph, tuple(numbers), tuple(tensors))

    def evaluate(
        self,
        index: int,
        inputs: Mapping[str, Tensor],
        operands: Mapping[str, Tensor],
        real: torch.dtype = torch.float32,
    ) -> Any:
        """The value of a node: a tensor, or a Python number if nothing but numbers is behind it.

        inputs: a tensor for each letter that is needed; "d" stands for i - j.
        """
        self.check(operands)
        device = next(iter(inputs.values())).device
        sources: dict[int | str, Tensor] = {}
        values: dict[int, Any] = {}
        steps = self.graph.schedules.get(index) or schedule(self.graph.nodes, index)
        for step, dead in steps:
            node = self.graph.nodes[step]
            if step in self.constants:
                values[step] = self.constants[step]
            elif node.op == "input":
                values[step] = _input(node.payload, inputs)
            elif node.op == "number":
                number = self.numbers[node.payload].to(device)
                values[step] = number.to(real) if node.kind == "f" else number
            elif node.op == "load":
                if node.payload not in sources:  # moved at most once
                    sources[node.payload] = self.table(node.payload, operands).to(device)
                values[step] = widened(gather(sources[node.payload], [values[a] for a in node.args]), real)
            else:
                op, args = OPS[node.op], [values[a] for a in node.args]
                values[step] = op.run(*args, real) if op.sized else op.run(*args)
            for other in dead:
                del values[other]
        return values[index]

    def table(self, payload: int | str, operands: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(payload, str):
            return self.tensors[payload]
        if payload not in operands:
            raise TypeError(f"operand {payload!r} is missing; the program reads {', '.join(self.operand_names)}")
        return operands[payload]

    def check(self, operands: Mapping[str, Tensor]) -> None:
        for name, value in operands.items():
            if name not in self.graph.operands:
                raise TypeError(f"{name!r} is no operand; declared: {', '.join(self.graph.operands) or 'none'}")
            _check_tensor(f"operand {name!r}", value, *self.graph.operands[name])

    def _depends(self, index: int | None) -> frozenset[str]:
        letters = frozenset() if index is None else self.graph.nodes[index].depends
        return (letters - {"d"}) | {"i", "j"} if "d" in letters else letters


def _input(letter: str, inputs: Mapping[str, Tensor]) -> Tensor:
    if letter == "d" and "d" not in inputs:
        return inputs["i"] - inputs["j"]
    return inputs[letter]


def _constants(graph: Graph, numbers: tuple[Number, ...]) -> dict[int, bool | int | float]:
    """Values of the nodes behind which there is nothing but Python numbers."""
    values: dict[int, Any] = {}
    for index, node in enumerate(graph.nodes):
        if node.op == "const":
            values[index] = node.payload
        elif node.op == "number":
            if not isinstance(numbers[node.payload], Tensor):
                values[index] = numbers[node.payload]
        elif node.op in OPS and all(a in values for a in node.args):
            values[index] = fold(node.op, [values[a] for a in node.args])
    return values


def _check_tensor(what: str, value: Tensor, ndim: int, kind: str) -> None:
    if value.ndim != ndim or kind_of(value) != kind:
        names = {"b": "boolean", "i": "integer", "f": "float"}
        raise ValueError(
            f"{what} must have {ndim} dimensions and a {names[kind]} dtype, not {value.ndim} and {value.dtype}"
        )
