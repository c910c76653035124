"""A call of the kernels: all that its forward and backward pass share, and its mask and score compiled into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from manyheads.core.expressions import PARTIAL, Program
from manyheads.core.inputs import Positions, as_range
from manyheads.engines.triton.blocks import Block, block, chip_of, padded
from manyheads.engines.triton.lists import KEPT, Lists, key_of, lists_of

TINY = 1e-6  # a scale below which dividing by it might overflow
AHEAD = 2**16  # bytes of what masks and scores read that may be loaded ahead of a tile


@dataclass(eq=False, slots=True)
class Call:
    """All of a call but q, k and v: what its forward and its backward pass share."""

    program: Program
    operands: Mapping[str, Tensor]
    normaliser: str
    sink: Tensor | None  # float32 [heads]
    scale: float
    q_positions: Positions
    kv_positions: Positions
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    device: torch.device
    size: int
    own: dict[tuple[tuple[int, int], bool], Lists] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return isinstance(self.q_positions, Tensor) or isinstance(self.kv_positions, Tensor)

    @property
    def folded(self) -> bool:
        """Scores are products alone, so that the scale may wait for the exponential."""
        return not self.program.has_score and self.normaliser == "softmax" and self.scale > TINY

    def learned(self) -> dict[int | str, Tensor]:
        """What the score reads and a gradient is asked for: by the captured tensor's place, or the operand's name."""
        read = (*self.program.tensors, *self.operands.values())
        if not self.program.has_score or not any(t.requires_grad for t in read):
            return {}
        sources = dict.fromkeys(gradient.source for gradient in self.program.derivative().gradients)
        tables = {source: self.program.table(source, self.operands) for source in sources}
        return {source: table for source, table in tables.items() if table.requires_grad}

    @property
    def length(self) -> int:
        """Positions are below it: one of few, as each has its own kernels."""
        ends = [0 if isinstance(p, Tensor) else p.stop for p in (self.q_positions, self.kv_positions)]
        return 2**20 if max(*ends, self.kv_len) <= 2**20 else 2**30

    def block(self, kernel: str) -> Block:
        head_dim = padded(max(self.head_dim, self.v_head_dim))
        scored = self.program.has_score or self.normaliser != "softmax"
        found = block(kernel, chip_of(self.device), self.size, head_dim, scored)
        # What is read for each pair of a tile is loaded ahead as keys and values are, and takes shared memory too.
        nodes = self.program.graph.nodes
        reads = sum(
            node.op == "load" and bool(node.depends & {"d", "s"} or node.depends >= {"i", "j"}) for node in nodes
        )
        room = AHEAD // max(1, 4 * reads * found.queries * found.keys)
        return found._replace(stages=min(found.stages, 1 + room))

    def lists(self, block: Block, transposed: bool = False) -> Lists:
        tile = block.queries, block.keys
        if (tile, transposed) in self.own:
            return self.own[tile, transposed]
        at = self.q_positions, self.kv_positions
        key = key_of(self.program, at, self.batch, self.heads, self.operands, tile, transposed, self.device)
        lists = KEPT.made(
            key, lambda: self._lists(tile, transposed), lambda lists: lists.tiles.numel(), self.program.tensors
        )
        self.own[tile, transposed] = lists
        return lists

    def _lists(self, tile: tuple[int, int], transposed: bool) -> Lists:
        found = self.program.tiles(
            as_range(self.q_positions), as_range(self.kv_positions), tile, self.batch, self.heads, device=self.device,
            **self.operands,
        )  # fmt: skip
        # Tiles that stick out are partial: bounds count as a mask.
        if self.q_len % tile[0]:
            found[..., -1, :] = found[..., -1, :].clamp(max=PARTIAL)
        if self.kv_len % tile[1]:
            found[..., -1] = found[..., -1].clamp(max=PARTIAL)
        return lists_of(found.mT if transposed else found)


# ---- kernels ----

FIXED = ("list_b", "list_h", "q_start", "kv_start", "q_len", "kv_len", "heads")  # compile nothing anew
FUNCTIONS = ("mask", "score", "dscore", "gradients", "places")


def kernel_of(kernel: Any, functions: tuple[str, ...], call: Call) -> tuple[Any, tuple[Any, ...]]:
    """A kernel with a program's functions in it, and their arguments, which stand behind the kernel's own."""
    # A derivative that is 1 is left out, and places come with gradients.
    outputs = tuple(f for f in functions if f != "places") if call.program.has_score else ("mask",)
    source = call.program.source("triton", outputs, call.length)
    key = source.text, kernel.fn
    if key not in _ENTRIES:
        _ENTRIES[key] = source.entry(
            f"{kernel.fn.__module__}:{kernel.fn.__name__}", parameters(kernel), functions, FIXED
        )
    return _ENTRIES[key], source.arguments(call.device, **call.operands)


def parameters(kernel: Any) -> list[str]:
    """A kernel's own, with their annotations; not what an entry gives it."""
    given = {"A", *map(str.upper, FUNCTIONS)}
    return [
        f"{name}: tl.constexpr" if "constexpr" in str(p.annotation) else name
        for name, p in signature(kernel.fn).parameters.items()
        if name not in given
    ]


_ENTRIES: dict[tuple[str, Any], Any] = {}
