"""The tables of a selection: from its lists of blocks to lists of tiles, and turned round, where the lists lie and
without waiting for them. Linear in what is listed, but for the inner mask's map of tiles, which calls and heads share.

tables = Chosen(form, x, choose(form, x)); tables.table_of(form.scores.program, x, (128, 64), operands)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.core.expressions import Program
from manyheads.core.forms import Blocks, Selection
from manyheads.core.inputs import Inputs
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import listing
from manyheads.engines.triton.hopper.tables import JUMPS, LISTS, Table, tiles_of
from manyheads.engines.triton.lists import Kept, key_of

QUERIES, KEYS = 128, 64  # what blocks must be multiples of: a tile of queries, and the narrowest of keys
MOST = 2**31 - 1  # numbers in a table
SLOTS = 128  # of a list that a program reads at a time


def why_not(form: Selection, x: Inputs) -> str | None:
    """Why there are no tables without a map of blocks."""
    if form.scores.normaliser == "entmax":
        return "entmax has no lists"
    if form.query_block % QUERIES or form.key_block % KEYS:
        given = f"{form.query_block} and {form.key_block}"
        return f"lists take multiples of {QUERIES} and {KEYS} for query_block and key_block, not {given}"
    if isinstance(x.q_positions, Tensor) or isinstance(x.kv_positions, Tensor):
        return "lists need rows that are whole"
    if x.q_positions.start % QUERIES or x.kv_positions.start:
        return f"lists need keys from 0 on and queries from a multiple of {QUERIES} on"
    program = form.scores.program
    read = *program.tensors, *(x.operands[name] for name in program.operand_names)
    if torch.is_grad_enabled() and program.has_score and any(t.requires_grad for t in read):
        return "gradients of what the score reads come from kernels that take masks"
    return None


@dataclass(frozen=True, eq=False)
class Chosen:
    """The blocks that were chosen, and what cuts them into tiles."""

    blocks: Blocks
    query_block: int
    key_block: int

    @property
    def halves(self) -> bool:
        """Whether 128 keys are two blocks."""
        return self.key_block % QUERIES != 0

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table:
        """As tables.table_of, of the pairs that were chosen and that the mask allows."""
        states = states_of(program, x, tile, operands, turned)
        return self._turned(x, tile, states) if turned else self._lists(x, tile, states)

    def _lists(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        indices, counts = self.blocks.indices.contiguous(), self.blocks.counts.contiguous()
        (_, _, query_blocks, width), start = indices.shape, x.q_positions.start  # type: ignore[union-attr]  why_not
        rows, tiles, per_block = cdiv(x.q_len, tile[0]), cdiv(x.kv_len, tile[1]), self.key_block // tile[1]
        out = indices.new_empty(x.batch, x.heads, rows, 1 + max(1, width) * per_block, dtype=torch.int32)
        _fill(
            out, indices, counts, states, x, rows, rows, query_blocks, self.query_block // tile[0],
            start % self.query_block // tile[0], tiles, per_block, 0, tiles - 1 if x.kv_len % tile[1] else -1, width,
            query_blocks, turned=False,
        )  # fmt: skip
        return Table(LISTS, out)

    def _turned(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        (_, _, query_blocks, width), start = self.blocks.indices.shape, x.q_positions.start  # type: ignore[union-attr]
        key_blocks = cdiv(x.kv_len, self.key_block)
        places, begins = transposed(self.blocks, key_blocks)
        rows, tiles = cdiv(x.kv_len, QUERIES) * (QUERIES // tile[1]), cdiv(x.q_len, tile[0])
        per_block, per_row = self.query_block // tile[0], self.key_block // tile[1]
        size = 2 * x.batch * x.heads * rows + places.numel() * per_block * per_row
        if size > MOST:
            raise ValueError(f"{places.numel()} listed blocks are too many for one table; choose fewer, or larger ones")
        out = places.new_empty(size, dtype=torch.int32)
        _fill(
            out, places, begins, states, x, rows, cdiv(x.kv_len, tile[1]), key_blocks, per_row, 0, tiles, per_block,
            start % self.query_block // tile[0], tiles - 1 if x.q_len % tile[0] else -1, width, query_blocks,
            turned=True,
        )  # fmt: skip
        return Table(JUMPS, out)


def transposed(blocks: Blocks, key_blocks: int) -> tuple[Tensor, Tensor]:
    """The places of all entries in `indices`, in the order of the head, the key block and the query block that they
    list, and where each head's key blocks begin there, int32 [batch * heads * key_blocks + 1]. What is not meant comes
    last."""
    indices, counts = blocks.indices, blocks.counts
    batch, heads, _, width = indices.shape
    lists = batch * heads * key_blocks
    kind = torch.int16 if lists < 2**15 else torch.int32  # narrow numbers are sorted in less time
    head = torch.arange(0, lists, key_blocks, device=indices.device).view(batch, heads, 1, 1)
    meant = torch.arange(width, device=indices.device) < counts[..., None]
    ordered, places = torch.where(meant, indices + head, lists).to(kind).flatten().sort(stable=True)
    ends = torch.arange(lists + 1, device=indices.device, dtype=kind)
    return places, torch.searchsorted(ordered, ends, out_int32=True)


def _fill(
    out: Tensor, listed: Tensor, counts: Tensor, states: Tensor | None, x: Inputs, rows: int, *sizes: int,
    turned: bool,
) -> None:  # fmt: skip
    steps = (0, 0) if states is None else (states.stride(b) if states.shape[b] > 1 else 0 for b in (0, 1))
    arguments = out, listed, counts, states, x.heads, rows, *sizes, *steps, SLOTS, turned
    with torch.cuda.device_of(out):
        quick.launch(listing.listing, x.batch * x.heads * rows, arguments, num_warps=1)


# ---- what the mask makes of tiles ----

KEPT: Kept[Tensor] = Kept()


def states_of(
    program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool
) -> Tensor | None:
    """uint8 [batch | 1, heads | 1, rows, columns] EMPTY, PARTIAL or FULL, contiguous on q's device; turned: rows are
    tiles of keys. None: all pairs are allowed."""
    if not program.has_mask:
        return None

    def make() -> Tensor:
        tiles = tiles_of(program, x, tile, operands)
        if turned:
            tiles = tiles.mT
        return tiles.contiguous().to(x.q.device, non_blocking=True)

    positions = x.q_positions, x.kv_positions
    key = key_of(program, positions, x.batch, x.heads, operands, tile, turned, x.q.device)
    return KEPT.made(key, make, lambda found: found.numel(), program.tensors)
