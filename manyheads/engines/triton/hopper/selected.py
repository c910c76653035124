"""The tables of a selection: from its lists of blocks to lists of tiles, and turned round, where the lists lie and
without waiting for them. Linear in what is listed, but for the inner mask's map of tiles, which calls and heads share.

Where blocks are no whole tiles, a bit for each query block and key block says what is listed: tables are made from the
bits, and kernels read them in tiles that are listed in part. That is not linear, but an eighth of a map.

tables = chosen_of(form, x, choose(form, x)); tables.table_of(form.scores.program, x, (128, 64), operands)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manyheads.core.expressions import Program
from manyheads.core.forms import Blocks, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import listing, turning, uniting
from manyheads.engines.triton.hopper.launching import NORMALISERS
from manyheads.engines.triton.hopper.tables import JUMPS, LISTS, Table, tiles_of
from manyheads.engines.triton.lists import Kept, key_of

QUERIES, KEYS = 128, 64  # a tile of queries, and of keys backward; the narrowest of keys forward
PARTS = (16, 32)  # blocks of keys that a tile may have several of
FEW = 8  # keys of a block, up to which 32 of them have one word of bits; of more, 32 query blocks; as kernels/listed.py
TINY = (2, 4, 8)  # such blocks
WORD = 32  # query blocks, and queries, that have one word of bits
STEP = max(QUERIES // keys for keys in PARTS)  # entries that a kernel may read at a time, see kernels/gathered.py
MOST = 2**31 - 1  # numbers in a table
SLOTS = 128  # of a list that a program reads at a time
MARKED = 64, 1024  # entries of 32 lists that a program marks at a time, and words that it sets to 0
TURNED = 32, 128  # words, and tiles, of a row that a program reads at a time


def why_not(form: Selection, x: Inputs) -> str | None:
    """Why there are no tables without a map of blocks."""
    if form.scores.normaliser not in NORMALISERS:
        return f"{form.scores.normaliser} has no lists"
    if form.key_block % KEYS and form.key_block not in (*TINY, *PARTS):
        sizes = ", ".join(map(str, (*TINY, *PARTS)))
        return f"lists take {sizes} and multiples of {KEYS} for key_block, not {form.key_block}"
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

    def whole(self, x: Inputs, keys: int) -> bool:
        """Whether tiles of so many keys are listed for all 128 queries and all of their keys."""
        small = self.key_block in TINY or self.key_block % keys
        return not (small or self.query_block % QUERIES or _first(x, QUERIES))

    def table_of(
        self, program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
    ) -> Table:
        """As tables.table_of, of the pairs that were chosen and that the mask allows."""
        states = states_of(program, x, tile, operands, turned)
        if self.bits is not None and not self.whole(x, tile[1]):
            return self._united(self.bits, x, tile, states, turned)
        return self._turned(x, tile, states) if turned else self._lists(x, tile, states)

    def _lists(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        own = self.blocks.shared if states is None or states.shape[1] == 1 else self.blocks
        indices, counts = own.indices.contiguous(), own.counts.contiguous()
        (_, heads, query_blocks, width), start = indices.shape, row_start(x.q_positions)
        rows, tiles, per_block = cdiv(x.q_len, tile[0]), cdiv(x.kv_len, tile[1]), self.key_block // tile[1]
        most = cdiv(max(1, width) * per_block, STEP) * STEP
        out = indices.new_empty(x.batch, heads, rows, 1 + most, dtype=torch.int32)
        arguments = (
            out, indices, counts, states, heads, rows, query_blocks, self.query_block // tile[0],
            start % self.query_block // tile[0], tiles, per_block, tiles - 1 if x.kv_len % tile[1] else -1, width,
            *_steps(states), SLOTS, STEP,
        )  # fmt: skip
        with torch.cuda.device_of(out):
            quick.launch(listing.listing, x.batch * heads * rows, arguments, num_warps=1)
        return Table(LISTS, out)

    def _turned(self, x: Inputs, tile: tuple[int, int], states: Tensor | None) -> Table:
        rows, tiles = cdiv(x.kv_len, QUERIES) * (QUERIES // tile[1]), cdiv(x.q_len, tile[0])
        per_block, per_row = self.query_block // tile[0], self.key_block // tile[1]
        listed, front = self.blocks.indices.numel(), x.batch * x.heads * rows
        if (size := 2 * front + listed * per_block * per_row) > MOST:
            raise ValueError(f"{listed} listed blocks are too many for one table; choose fewer, or larger ones")
        out, free = (torch.empty(n, dtype=torch.int32, device=x.q.device) for n in (size, 1))
        bits = marked(self.blocks, x, self.query_block, self.key_block, (free, front))
        arguments = (
            out, free, bits, states, x.heads, rows, cdiv(x.kv_len, tile[1]), *bits.shape[2:], per_row, tiles, per_block,
            _first(x, self.query_block) // tile[0], tiles - 1 if x.q_len % tile[0] else -1, *_steps(states), *TURNED,
        )  # fmt: skip
        with torch.cuda.device_of(out):
            quick.launch(turning.turning, front, arguments, num_warps=1)
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
            *tile, SLOTS, self.key_block <= FEW, turned,
        )  # fmt: skip
        with torch.cuda.device_of(out):
            quick.launch(uniting.uniting, x.batch * x.heads * rows, arguments, num_warps=1)
        return Table(LISTS, out)


def chosen_of(form: Selection, x: Inputs, blocks: Blocks) -> Chosen:
    """Of what `form` chose for x, which why_not let pass."""
    whole = not (form.query_block % QUERIES or form.key_block % KEYS or _first(x, QUERIES))
    alike = x.heads // x.kv_heads if form.together else 1
    bits = None if whole else marked(blocks, x, form.query_block, form.key_block, alike=alike)
    return Chosen(blocks, form.query_block, form.key_block, bits)


def parts_of(chosen: Tiles | None, x: Inputs, keys: int) -> int:
    """Of how many entries of a list a step of so many keys is put together: 1 if it is one tile, for which bits say
    what is listed where not all is."""
    if not isinstance(chosen, Chosen):
        return 1
    part = math.gcd(chosen.key_block, keys)
    return keys // part if chosen.whole(x, part) else 1


def cut(chosen: Tiles | None, parts: int) -> bool:
    """Whether the mask must look at steps for what is listed of them."""
    return parts > 1 or (chosen is not None and (not isinstance(chosen, Chosen) or chosen.bits is not None))


def bits_of(chosen: Tiles | None, parts: int = 1) -> tuple[Tensor | None, int, int]:
    """The bits and the sizes of blocks, as kernels take them; 0 where all pairs of a listed tile are listed."""
    if not isinstance(chosen, Chosen) or chosen.bits is None or parts > 1:
        return None, 0, 0
    return chosen.bits, chosen.query_block, chosen.key_block


def marked(
    blocks: Blocks, x: Inputs, query_block: int, key_block: int, front: tuple[Tensor | None, int] = (None, 0),
    alike: int = 1,
) -> Tensor:  # fmt: skip
    """Chosen.bits. front: a tensor for one number, and the number that it gets. alike: so many heads that follow each
    other have the same lists."""
    own, along = blocks.shared, key_block <= FEW
    indices, counts = (t[:, ::alike].contiguous() for t in (own.indices, own.counts))
    batch, heads, query_blocks, width = indices.shape
    rows = cdiv(x.q_len, QUERIES) * QUERIES + _first(x, query_block)
    chunks, columns = cdiv(rows, WORD * query_block), cdiv(x.kv_len, key_block * WORD if along else key_block)
    bits = indices.new_empty(batch, heads, WORD * chunks if along else chunks, columns, dtype=torch.int32)
    free, number = front
    arguments = bits, free, indices, counts, number, query_blocks, width, chunks, columns, *MARKED, along
    if batch * heads * chunks:
        with torch.cuda.device_of(bits):
            quick.launch(uniting.mark, batch * heads * chunks, arguments, num_warps=4)
    return bits[:, :, None].expand(-1, -1, x.heads // heads, -1, -1).flatten(1, 2).contiguous()


def _first(x: Inputs, block: int) -> int:
    """The place of the first query in its block."""
    return row_start(x.q_positions) % block


# ---- launches ----


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
