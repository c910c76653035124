"""Which keys a run of queries needs: from intervals and block lists, a chunk of queries at a time.

Memory stays linear in length: a chunk's scores hold at most `elements` numbers, and no mask is built for tiles that are
empty or full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from manyheads.core.expressions import EMPTY, FULL, PARTIAL, Program
from manyheads.core.forms import Blocks, Form, Scores, Selection
from manyheads.core.inputs import Inputs, Positions, as_range, as_rows

KEY_TILE = 64
QUERY_TILE = 128
SMALL = 2**14  # pairs of query and key


@dataclass(frozen=True, eq=False)
class Chunk:
    """Queries `rows` need the keys `columns`; i [batch | 1, 1, rows, 1] and j [batch | 1, 1, 1, columns] are their
    positions."""

    rows: slice
    columns: slice | Tensor
    i: Tensor
    j: Tensor
    make_mask: Callable[[Tensor, Tensor], Tensor | None]

    @property
    def allowed(self) -> Tensor | None:
        """[batch | 1, heads | 1, rows, columns], or None for all. Made anew each time it is read: the masks of all
        chunks that wait for a backward pass would be quadratic in length."""
        return self.make_mask(self.i, self.j)

    def pick(self, x: Tensor) -> Tensor:
        """The chunk's keys or values of x [batch, kv_heads, kv_len, dim]."""
        return x[:, :, self.columns] if isinstance(self.columns, slice) else x.index_select(2, self.columns)


def chunks(form: Scores | Selection, x: Inputs, elements: int = 2**25) -> Iterator[Chunk]:
    """Cut the queries into chunks and say which keys each needs. Chunks without any key are left out."""
    scores = form.scores if isinstance(form, Selection) else form
    program, device = scores.program, x.q.device
    size = max(1, min(QUERY_TILE, elements // max(1, x.batch * x.heads * x.kv_len)))
    q_rows, kv_rows = as_rows(x.q_positions, device), as_rows(x.kv_positions, device)
    b = torch.arange(x.batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(x.heads, device=device).view(1, -1, 1, 1)
    operands = position_operands(scores, x)
    tiles = tile_map(program, x, as_range(x.q_positions), as_range(x.kv_positions), (size, KEY_TILE), operands)
    chosen = _chosen(form, x) if isinstance(form, Selection) else None

    for start in range(0, x.q_len, size):
        rows = slice(start, min(start + size, x.q_len))
        i, j = q_rows[:, None, rows, None], kv_rows[:, None, None, :]
        row = tiles[:, :, start // size]
        needed = (row != EMPTY).flatten(0, 1).any(0)
        if chosen is not None:
            needed = needed & chosen.tiles(i)
        columns = _columns(needed, x.kv_len, device)
        if columns is None:
            continue
        j = j[..., columns]
        full = bool((row[..., needed] == FULL).all())
        yield Chunk(rows, columns, i, j, partial(_mask, None if full else program, chosen, b, h, operands))


def tile_map(
    program: Program, x: Inputs, i: Tensor | range, j: Tensor | range, tile: tuple[int, int],
    operands: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """The map on the CPU of tiles of the positions i and j of x's tokens, see Program.tiles.

    For little work, a step of decoding above all, it would cost more than it saves: every tile is then partial, or full
    if there is nothing to mask.
    """
    if x.q_len * x.kv_len > SMALL:
        return program.tiles(i, j, tile, x.batch, x.heads, device=None, **operands).cpu()
    state = PARTIAL if program.has_mask or isinstance(i, Tensor) or isinstance(j, Tensor) else FULL
    rows, columns = (t.shape[-1] if isinstance(t, Tensor) else len(t) for t in (i, j))
    return torch.full((1, 1, -(-rows // tile[0]), -(-columns // tile[1])), state, dtype=torch.uint8)


def _mask(
    program: Program | None, chosen: _Chosen | None, b: Tensor, h: Tensor, operands: dict[str, Tensor],
    i: Tensor, j: Tensor,
) -> Tensor | None:  # fmt: skip
    """What a program allows (everything if None) of what was chosen (everything if None)."""
    allowed = None if program is None else seen_pairs(program, b, h, i, j, operands)
    if chosen is None:
        return allowed
    picked = chosen.keys(i, j)
    return picked if allowed is None else allowed & picked


def seen_pairs(program: Program, b: Tensor, h: Tensor, i: Tensor, j: Tensor, operands: dict[str, Tensor]) -> Tensor:
    """The mask over the heads and batches that it depends on; absent tokens see nothing and are not seen."""
    depends = program.mask_depends
    seen = program.mask(
        b if "b" in depends or i.shape[0] > 1 else b[:1], h if "h" in depends else h[:, :1], i, j, **operands
    )
    return seen & (i >= 0) & (j >= 0)


def plain(form: Form, x: Inputs) -> bool:
    """Whether any library's full or causal softmax kernel does it: every row whole, and for causal a square."""
    if not isinstance(form, Scores) or form.program.has_score or form.normaliser != "softmax" or form.sink or x.ragged:
        return False
    if x.dropout is not None:
        return False
    return not form.program.has_mask or (form.program.key == _CAUSAL.program.key and x.q_len == x.kv_len)


_CAUSAL = Scores(mask=lambda b, h, i, j: j <= i)


def score(form: Scores, s: Tensor, chunk: Chunk, operands: dict[str, Tensor]) -> Tensor:
    """The form's score function on s [batch, heads, rows, columns] of a chunk."""
    b = torch.arange(s.shape[0], device=s.device).view(-1, 1, 1, 1)
    h = torch.arange(s.shape[1], device=s.device).view(1, -1, 1, 1)
    return form.program.score(s, b, h, chunk.i, chunk.j, **operands)


def position_operands(form: Scores, x: Inputs) -> dict[str, Tensor]:
    """The operands that mask and score read, indexed by position: stored tokens are moved to where they stand."""
    used = {name: x.operands[name] for name in form.program.operand_names}
    if not isinstance(x.kv_positions, Tensor) and x.kv_positions.start == 0:
        return used
    kv = as_rows(x.kv_positions, x.k.device)
    return {name: _by_position(value, form.operands[name].names, kv) for name, value in used.items()}


def _by_position(value: Tensor, names: tuple[str, ...], positions: Tensor) -> Tensor:
    if "len" not in names:
        return value
    dim = names.index("len")
    # A row of absent tokens, or of none, still has a place to read.
    length = max(1, int(positions.max()) + 1) if positions.numel() else 1
    shape = [1] * value.ndim
    shape[0], shape[dim] = positions.shape[0], positions.shape[1]
    # Absent tokens (-1) land in a slot of their own behind the last one, which is cut off again.
    at = torch.where(positions < 0, length, positions).view(shape).expand(value.shape)
    return (
        value.new_zeros(*value.shape[:dim], length + 1, *value.shape[dim + 1 :])
        .scatter(dim, at, value)
        .narrow(dim, 0, length)
    )


def _columns(needed: Tensor, kv_len: int, device: torch.device) -> slice | Tensor | None:
    """The keys of the needed tiles: a slice if they are one run, else their indices; None if there are none."""
    at = needed.nonzero().flatten()
    if not len(at):
        return None
    first, last = int(at[0]), int(at[-1])
    if last - first + 1 == len(at):
        return slice(first * KEY_TILE, min((last + 1) * KEY_TILE, kv_len))
    index = (at[:, None] * KEY_TILE + torch.arange(KEY_TILE)).flatten()
    return index[index < kv_len].to(device)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A selection's block lists as maps, one chunk of queries at a time."""

    blocks: Tensor  # bool [batch, heads, query blocks, key blocks]
    first: int
    query_block: int
    key_block: int
    kv_len: int

    def _rows(self, i: Tensor) -> Tensor:
        """bool [batch, heads, rows, key blocks] of the queries at positions i [1, 1, rows, 1]."""
        return self.blocks[:, :, (i.flatten() // self.query_block) - self.first]

    def keys(self, i: Tensor, j: Tensor) -> Tensor:
        """bool [batch, heads, rows, columns]: whether the block of key j [1, 1, 1, columns] was chosen for query i."""
        rows = self._rows(i)
        return rows.gather(-1, (j // self.key_block).expand(*rows.shape[:-1], -1))

    def tiles(self, i: Tensor) -> Tensor:
        """Which key tiles hold a key of a block that was chosen for one of the queries i."""
        blocks = self._rows(i).flatten(0, 2).any(0).cpu()
        keys = blocks[torch.arange(self.kv_len) // self.key_block]
        padded = torch.nn.functional.pad(keys, (0, -self.kv_len % KEY_TILE))
        return padded.view(-1, KEY_TILE).any(-1)


def choose(form: Selection, x: Inputs) -> Blocks:
    """Run a form's choice. Rows are whole: keys stand at 0, 1, ..., queries at the end."""
    return form.select(x.q, x.k, scale=x.scale, offset=row_start(x.q_positions))


def row_start(positions: Positions) -> int:
    """The first position of rows that an engine took as a range."""
    if isinstance(positions, Tensor):
        raise TypeError("this is run row by row, over positions that are a range")
    return positions.start


def _chosen(form: Selection, x: Inputs) -> _Chosen:
    key_blocks = -(-x.kv_len // form.key_block)
    return _Chosen(
        choose(form, x).to_map(key_blocks), row_start(x.q_positions) // form.query_block,
        form.query_block, form.key_block, x.kv_len,
    )  # fmt: skip
