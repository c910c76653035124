"""Queries in the order of the blocks that they chose: a row of queries for each of their entries in the lists, the rows
of one block side by side and filled up to whole tiles, so that each tile needs the keys of a single block.

All sizes follow from shapes, so that nobody waits for the device. The order is the same every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.expressions import Program
from manyheads.core.forms import Blocks
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import ordering
from manyheads.engines.triton.hopper.tables import RANGES, Table

TILE = 128  # queries in a tile forward; tiles of the backward pass divide it
LEAST, MOST = 2**21, 2**30  # rows that are in memory at a time
SLOTS = 512  # entries of a program


class Part(NamedTuple):
    """What is computed at a time."""

    batch: slice
    kv_heads: slice
    heads: slice
    queries: slice

    def of(self, x: Inputs) -> Inputs:
        keys = self.batch, self.kv_heads
        start = row_start(x.q_positions)
        return x.with_(
            q=x.q[self.own], k=x.k[keys], v=x.v[keys],
            q_positions=range(start + self.queries.start, start + self.queries.stop),
        )  # fmt: skip

    @property
    def own(self) -> tuple[slice, slice, slice]:
        return self.batch, self.heads, self.queries


def parts(x: Inputs, width: int, blocks: int) -> Iterator[Part]:
    """Of lists of so many blocks, of so many that there are: as many rows as x has queries, or LEAST; key heads are cut
    before queries, so that the gradients of their keys need not be added up."""
    most, group = min(MOST, max(LEAST, x.batch * x.heads * x.q_len)), x.heads // x.kv_heads
    each = group * max(width, cdiv(blocks, 16))  # rows of a query, or what the bits of its blocks take beside them
    rows = each * x.q_len
    queries = x.q_len if rows <= most else max(1, most // (each * TILE)) * TILE
    kv_heads = min(x.kv_heads, max(1, most // rows))
    batch = min(x.batch, max(1, most // (x.kv_heads * rows)))
    for b, h, i in product(_cut(x.batch, batch), _cut(x.kv_heads, kv_heads), _cut(x.q_len, queries)):
        yield Part(b, h, slice(h.start * group, h.stop * group), i)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, length)) for at in range(0, length, size)]


@dataclass(frozen=True, eq=False)
class Order:
    """rows: int32 [batch, kv_heads, places], which row of a key head's group [group * queries] stands at a place, -1
    for none. slots: int32 [batch, heads, queries, width], the places of each query, -1 for none. ends: int32 [batch,
    kv_heads, blocks], where the places of each block end, whole tiles. own: uint8 [batch, heads, queries], who lists
    the block that it stands in; then only blocks before it have places. None: all have."""

    rows: Tensor
    slots: Tensor
    ends: Tensor
    own: Tensor | None
    key_block: int
    halves = False

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table:
        """As tables.table_of, of queries at their places: all pairs of a tile are allowed. Tiles of queries without
        rows have ranges of -1."""
        if turned:
            block = torch.arange(0, x.kv_len, tile[1], device=x.q.device) // self.key_block
            ends = torch.nn.functional.pad(self.ends, (1, 1)) // tile[0]
            ends[..., -1] = ends[..., -2]
            last = self.ends.shape[2]
            lo, hi = (ends[..., (block + end).clamp(max=last + end)] for end in (0, 1))
            return Table(RANGES, torch.stack([lo, hi, lo, hi], -1).int().contiguous(), partial=False)
        place = torch.arange(0, self.rows.shape[2], tile[0], device=x.q.device, dtype=torch.int32)
        place = place.expand(*self.ends.shape[:2], -1).contiguous()
        block = torch.searchsorted(self.ends, place, right=True, out_int32=True)
        per_block = self.key_block // tile[1]
        lo = block * per_block
        hi = (lo + per_block).clamp(max=cdiv(x.kv_len, tile[1]))
        hi = torch.where(block < self.ends.shape[2], hi, lo - 1)
        full = hi.clamp(max=x.kv_len // tile[1])
        return Table(RANGES, torch.stack([lo, hi, lo, full], -1), partial=False)


def order_of(blocks: Blocks, x: Inputs, part: Part, start: int, query_block: int, key_block: int, past: bool) -> Order:
    """Of a part x of a call whose first query stands at `start`, and whose lists are `blocks`. past: its own block of a
    query has no place, see Order."""
    blocks, positions = blocks.shared, x.q_positions
    indices, counts = blocks.indices.contiguous(), blocks.counts.contiguous()
    assert isinstance(positions, range), "selected.why_not said so"
    (_, all_heads, lists, width), device, size, group = indices.shape, x.q.device, x.q_len, x.heads // x.kv_heads
    number = max(1, (positions.stop - 1) // key_block) if past else cdiv(x.kv_len, key_block)
    rows, chunks, key_heads = group * size, cdiv(group * size, 32), x.batch * x.kv_heads
    places = cdiv(rows * min(width, number), TILE) * TILE + number * TILE
    own = torch.zeros(x.batch, x.heads, size, dtype=torch.uint8, device=device) if past else None
    words = torch.zeros(key_heads, number, chunks, dtype=torch.int32, device=device)
    row_at = torch.full((x.batch, x.kv_heads, places), -1, dtype=torch.int32, device=device)
    slots = row_at.new_empty(x.batch, x.heads, size, width)
    head_step = lists if all_heads > 1 else 0
    first = part.batch.start * all_heads * lists + part.heads.start * head_step
    lines = (
        indices.view(-1)[first * width :], counts.view(-1)[first:], slots.numel(), width, size, group, x.heads,
        positions.start, start // query_block, all_heads * lists, head_step, number, chunks,
    )  # fmt: skip
    sizes, programs = (query_block, key_block, SLOTS), cdiv(slots.numel(), SLOTS)
    with torch.cuda.device_of(x.q):
        quick.launch(ordering.mark, programs, (words, own, *lines, *sizes), num_warps=4)
        sums = words.new_empty(words.numel() + 1)
        quick.launch(ordering.count, cdiv(words.numel(), SLOTS), (words, sums, words.numel(), SLOTS), num_warps=4)
        sums.cumsum_(0)
        begins = sums[::chunks]
        padded = (begins.diff() + (TILE - 1)) // TILE * TILE
        ends = padded.view(key_heads, number).cumsum(-1, dtype=torch.int32)
        shifts = (ends.view(-1) - padded - begins[:-1]).int()
        arguments = row_at, slots, words, sums, shifts, *lines, places, *sizes, past
        quick.launch(ordering.place, programs, arguments, num_warps=4)
    return Order(row_at, slots, ends.view(x.batch, x.kv_heads, number), own, key_block)


# ---- a query's own block ----


@dataclass(frozen=True)
class Own:
    """Tiles of queries, in their natural order, with the keys up to their own of their own block."""

    key_block: int
    halves = False

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table:
        start = row_start(x.q_positions)
        make = _turned if turned else _ranges
        return Table(RANGES, make(start, x.q_len, x.kv_len, self.key_block, *tile, x.q.device))


@lru_cache(maxsize=64)
def _ranges(start: int, q_len: int, kv_len: int, block: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """int32 [1, 1, tiles of queries, 4] as tables.ranges has them."""
    first = torch.arange(start, start + q_len, queries)
    last = (first + queries).clamp(max=start + q_len) - 1
    lo, hi = first // block * (block // keys), last // keys + 1
    full = torch.where(first // block == last // block, (first + 1) // keys, lo)
    return _on(device, lo, hi, lo, full)


@lru_cache(maxsize=64)
def _turned(start: int, q_len: int, kv_len: int, block: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """int32 [1, 1, tiles of keys, 4]."""
    key = torch.arange(0, kv_len, keys)
    first = (key - start).clamp(min=0)
    end = ((key // block + 1) * block).clamp(max=start + q_len) - start
    end = torch.where(end > first, end, 0)  # queries first to end - 1 stand behind the key, in its block
    hi, full = -(-end // queries), end // queries
    begin = torch.minimum(-(-(key + keys - 1 - start).clamp(min=0) // queries), full)
    return _on(device, torch.minimum(first // queries, hi), hi, begin, full)


def _on(device: torch.device, *columns: Tensor) -> Tensor:
    return torch.stack(columns, -1).int()[None, None].to(device, non_blocking=True)
