"""Which tiles the kernels visit: lists made from maps of tiles, on the device, and what keeps them for later calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from manyheads.core.expressions import EMPTY, FULL, Program
from manyheads.core.inputs import Positions


class Lists(NamedTuple):
    """For each row of tiles those to visit, partial ones first. counts [batch | 1, heads | 1, rows, 2] of partial and
    full ones; tiles [batch | 1, heads | 1, rows, columns]. Steps in rows from one batch and head to the next."""

    counts: Tensor
    tiles: Tensor
    batch_step: int
    head_step: int


def lists_of(found: Tensor) -> Lists:
    """From a map of tiles, without waiting for the device."""
    rank = torch.where(found == EMPTY, 2, torch.where(found == FULL, 1, 0)).to(torch.uint8).contiguous()
    order = rank.argsort(dim=-1, stable=True).to(torch.int32)
    counts = torch.stack([(rank == 0).sum(-1), (rank == 1).sum(-1)], -1).to(torch.int32)
    batch, heads, rows, _ = found.shape
    return Lists(counts, order, heads * rows if batch > 1 else 0, rows if heads > 1 else 0)


Found = TypeVar("Found")


class Kept(Generic[Found]):
    """Lists, or Hopper's tables, by what they depend on, the latest used; no more than so many and so large."""

    def __init__(self, sets: int = 64, elements: int = 2**26):
        self.sets, self.elements = sets, elements
        self.found: OrderedDict[tuple[Any, ...], tuple[Found, int, Any]] = OrderedDict()
        self._lock = threading.Lock()  # backward passes have threads of their own

    def get(self, key: tuple[Any, ...]) -> Found | None:
        with self._lock:
            if key not in self.found:
                return None
            self.found.move_to_end(key)
            return self.found[key][0]

    def put(self, key: tuple[Any, ...], found: Found, elements: int, alive: Any) -> None:
        """`alive` stays so as long as what was found does: an id in the key is no other tensor's."""
        with self._lock:
            self.found[key] = found, elements, alive
            while len(self.found) > 1 and (len(self.found) > self.sets or self._size() > self.elements):
                self.found.popitem(last=False)

    def made(
        self, key: tuple[Any, ...] | None, make: Callable[[], Found], size: Callable[[Found], int], alive: Any
    ) -> Found:
        """What is kept, or else made now; None as a key keeps nothing."""
        found = None if key is None else self.get(key)
        if found is None:
            found = make()
            if key is not None:
                self.put(key, found, size(found), alive)
        return found

    def all(self) -> list[Found]:
        with self._lock:
            return [found for found, _, _ in self.found.values()]

    def _size(self) -> int:
        return sum(elements for _, elements, _ in self.found.values())


KEPT: Kept[Lists] = Kept()


def key_of(
    program: Program, positions: tuple[Positions, Positions], batch: int, heads: int, operands: Mapping[str, Tensor],
    *rest: Any,
) -> tuple[Any, ...] | None:  # fmt: skip
    """What a map of tiles depends on, `rest` among it; None if that is not known by name."""
    if any(isinstance(p, Tensor) for p in positions) or program.mask_reads_operands:
        return None
    read = [program.tensors[source] for source in sorted(program.mask_reads)]  # type: ignore[index,type-var]  no operands
    if any(t.is_inference() for t in read):
        return None
    if read and read[0].is_cuda and torch.cuda.is_current_stream_capturing():  # what is recorded is not made yet
        return None
    tensors, depends = tuple((id(t), t._version, t.data_ptr()) for t in read), program.mask_depends
    shared = batch if "b" in depends else 1, heads if "h" in depends else 1
    return program.key, program.numbers, tensors, positions, *shared, *rest
