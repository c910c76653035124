"""The tables of a selection: from its lists of blocks to lists of tiles, and turned round, where the lists lie and
without waiting for them. Linear in what is listed, but for the inner mask's map of tiles, which calls and heads share.

Where blocks are no whole tiles, a bit for each query block and key block says what is listed: tables are made from the
bits, and kernels read them in tiles that are listed in part. That is not linear, but an eighth of a map.

tables = chosen_of(form, x, choose(form, x)); tables.table_of(form.scores.program, x, (128, 64), operands)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manyheads.core.builders import transposed
from manyheads.core.expressions import Program
from manyheads.core.forms import Blocks, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import listing, uniting
from manyheads.engines.triton.hopper.launching import NORMALISERS
from manyheads.engines.triton.hopper.tables import JUMPS, LISTS, Table, tiles_of
from manyheads.engines.triton.lists import Kept, key_of

QUERIES, KEYS = 128, 64  # a tile of queries, and of keys backward; the narrowest of keys forward
PARTS = (16, 32)  # blocks of keys that a tile may have several of
WORD = 32  # query blocks, and queries, that have one word of bits
MOST = 2**31 - 1  # numbers in a table
SLOTS = 128  # of a list that a program reads at a time
MARKED = 1024  # entries that a program marks


def why_not(form: Selection, x: Inputs) -> str | None:
    """Why there are no tables without a map of blocks."""
    if form.scores.normaliser not in NORMALISERS:
        return f"{form.scores.normaliser} has no lists"
    if form.key_block % KEYS and form.key_block not in PARTS:
        return f"lists take {', '.join(map(str, PARTS))} and multiples of {KEYS} for key_block, not {form.key_block}"
    if isinstance(x.q_positions, Tensor) or isinstance(x.kv_positions, Tensor):
        return "lists need rows that are whole"
    if x.q_positions.start % form.query_block % WORD or x.kv_positions.start:
        return f"lists need keys from 0 on, and queries from a multiple of {WORD} in their block on"
    program = form.scores.program
    read = *program.tensors, *(x.operands[name] for name in program.operand_names)
    if torch.is_grad_enabled() and program.has_score and any(t.requires_grad for t in read):
        return "gradients of what the score reads come from kernels that take masks"
    return None


class Tiles(Protocol):
    """What forward.run and backward.run take for the tiles that a selection visits."""

    @property
    def halves(self) -> bool:
        """Whether 128 keys have lists of 64."""
        ...

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table: ...


@dataclass(frozen=True, eq=False)
class Chosen:
    """The blocks that were chosen, and what cuts them into tiles. bits: int32 [batch, heads, words, key blocks]
    where blocks are no tiles, see kernels/uniting.py."""

    blocks: Blocks
    query_block: int
    key_block: int
    bits: Tensor | None = None

    @property
    def halves(self) -> bool:
        """Whether 128 keys are two blocks."""
        return self.key_block % QUERIES != 0

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table:
        """As tables.table_of, of the pairs that were chosen and that the mask allows."""
        states = states_of(program, x, tile, operands, turned)
        if self.bits is not None:
            return self._united(self.bits, x, tile, states, turned)
        return self._turned(x, tile, states) if turned else self._lists(x, tile, states)

    def _lists(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        own = self.blocks.shared if states is None or states.shape[1] == 1 else self.blocks
        indices, counts = own.indices.contiguous(), own.counts.contiguous()
        (_, heads, query_blocks, width), start = indices.shape, row_start(x.q_positions)
        rows, tiles, per_block = cdiv(x.q_len, tile[0]), cdiv(x.kv_len, tile[1]), self.key_block // tile[1]
        out = indices.new_empty(x.batch, heads, rows, 1 + max(1, width) * per_block, dtype=torch.int32)
        _fill(
            out, indices, counts, states, (x.batch, heads), rows, rows, query_blocks, self.query_block // tile[0],
            start % self.query_block // tile[0], tiles, per_block, 0, tiles - 1 if x.kv_len % tile[1] else -1, width,
            turned=False,
        )  # fmt: skip
        return Table(LISTS, out)

    def _turned(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        key_blocks, start = cdiv(x.kv_len, self.key_block), row_start(x.q_positions)
        listed, begins = transposed(self.blocks.indices, self.blocks.counts, key_blocks)
        rows, tiles = cdiv(x.kv_len, QUERIES) * (QUERIES // tile[1]), cdiv(x.q_len, tile[0])
        per_block, per_row = self.query_block // tile[0], self.key_block // tile[1]
        size = 2 * x.batch * x.heads * rows + listed.numel() * per_block * per_row
        if size > MOST:
            raise ValueError(f"{listed.numel()} listed blocks are too many for one table; choose fewer, or larger ones")
        out = listed.new_empty(size)
        _fill(
            out, listed, begins, states, (x.batch, x.heads), rows, cdiv(x.kv_len, tile[1]), key_blocks, per_row, 0,
            tiles, per_block, start % self.query_block // tile[0], tiles - 1 if x.q_len % tile[0] else -1, 0,
            turned=True,
        )  # fmt: skip
        return Table(JUMPS, out)

    def _united(self, bits: Tensor, x: Inputs, tile: tuple[int, int], states: Tensor | None, turned: bool) -> Table:
        (queries, keys), (_, _, chunks, key_blocks) = tile, bits.shape
        q_tiles, k_tiles = cdiv(x.q_len, queries), cdiv(x.kv_len, keys)
        if turned:
            rows, columns, last = cdiv(x.kv_len, QUERIES) * (QUERIES // keys), q_tiles, x.q_len % queries
            most = columns
        else:
            rows, columns, last = q_tiles, k_tiles, x.kv_len % keys
            lists = cdiv(QUERIES - 1, self.query_block) + 1  # that a tile may have queries of
            most = min(columns, lists * self.blocks.indices.shape[3] * max(1, self.key_block // keys))
        out = bits.new_empty(x.batch, x.heads, rows, 1 + max(1, most))
        arguments = (
            out, bits, states, x.heads, rows, columns, x.q_len, x.kv_len, _first(x, self.query_block), chunks,
            key_blocks, out.shape[3], columns - 1 if last else -1, *_steps(states), self.query_block, self.key_block,
            *tile, SLOTS, turned,
        )  # fmt: skip
        with torch.cuda.device_of(out):
            quick.launch(uniting.uniting, x.batch * x.heads * rows, arguments, num_warps=1)
        return Table(LISTS, out)


def chosen_of(form: Selection, x: Inputs, blocks: Blocks) -> Chosen:
    """Of what `form` chose for x, which why_not let pass."""
    whole = not (form.query_block % QUERIES or form.key_block % KEYS or _first(x, QUERIES))
    bits = None if whole else marked(blocks, x, form.query_block, form.key_block)
    return Chosen(blocks, form.query_block, form.key_block, bits)


def bits_of(chosen: Tiles | None) -> tuple[Tensor | None, int, int]:
    """The bits and the sizes of blocks, as kernels take them; 0 where all pairs of a listed tile are listed."""
    if not isinstance(chosen, Chosen) or chosen.bits is None:
        return None, 0, 0
    return chosen.bits, chosen.query_block, chosen.key_block


def marked(blocks: Blocks, x: Inputs, query_block: int, key_block: int) -> Tensor:
    """Chosen.bits."""
    own = blocks.shared
    indices, counts = own.indices.contiguous(), own.counts.contiguous()
    batch, heads, query_blocks, width = indices.shape
    rows = cdiv(x.q_len, QUERIES) * QUERIES + _first(x, query_block)
    chunks, key_blocks = cdiv(rows, WORD * query_block), cdiv(x.kv_len, key_block)
    bits = torch.zeros(batch, heads, chunks, key_blocks, dtype=torch.int32, device=indices.device)
    arguments = bits, indices, counts, indices.numel(), width, query_blocks, chunks, key_blocks, MARKED
    if indices.numel():
        with torch.cuda.device_of(bits):
            quick.launch(uniting.mark, cdiv(indices.numel(), MARKED), arguments, num_warps=4)
    return bits.expand(-1, x.heads, -1, -1).contiguous()


def _first(x: Inputs, block: int) -> int:
    """The place of the first query in its block."""
    return row_start(x.q_positions) % block


# ---- launches ----


def _fill(
    out: Tensor, listed: Tensor, counts: Tensor, states: Tensor | None, of: tuple[int, int], rows: int, *sizes: int,
    turned: bool,
) -> None:  # fmt: skip
    """of: how many batch rows and heads have lists."""
    (batch, heads), rest = of, (*sizes, *_steps(states), SLOTS, turned)
    with torch.cuda.device_of(out):
        quick.launch(
            listing.listing, batch * heads * rows, (out, listed, counts, states, heads, rows, *rest), num_warps=1
        )


def _steps(states: Tensor | None) -> tuple[int, int]:
    """From one batch and head to the next, 0 where they share."""
    return (0, 0) if states is None else tuple(states.stride(b) if states.shape[b] > 1 else 0 for b in (0, 1))  # type: ignore[return-value]  two


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
