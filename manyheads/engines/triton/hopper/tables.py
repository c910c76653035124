"""Which tiles of keys a tile of queries needs, or the other way round, as a table on the device. No mask is ever built.

    table = table_of(program, x, (128, keys), operands)     # None stands for all tiles

Where all that a mask reads is known here and tiles are not too many, their map is made on the CPU; else by kernels, see
maps.py. Either is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.expressions import EMPTY, FULL, Program
from manyheads.core.inputs import Inputs, as_range
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import maps
from manyheads.engines.triton.lists import Kept, key_of

MANY = 2**20  # tiles, which take a CPU a second
EVERY, RANGES, LISTS, JUMPS = 0, 1, 2, 3  # kinds of tables, as in kernels/common.py


class Table(NamedTuple):
    """values: int32 [batch | 1, heads | 1, rows of tiles, n], see `ranges` and `lists`; for JUMPS flat, with a number
    for each row of tiles in front. partial: there may be tiles that the mask must look at, beside
    those that stick out."""

    kind: int
    values: Tensor
    partial: bool = True

    def to(self, device: torch.device) -> Table:
        return self._replace(values=self.values.to(device, non_blocking=True))


def ranges(tiles: Tensor, length: int, size: int) -> Table:
    """From a map of tiles [batch | 1, heads | 1, rows, columns]: lo, hi, f0, f1 for each row of tiles.

    length, size: of what columns are tiles of, in all and in one tile. The tiles lo to hi - 1 hold all that are needed;
    the longest run of full ones is f0 to f1 - 1, and the mask looks at all others, empty ones among them.
    """
    needed, full = _needed(tiles, length, size)
    at = torch.arange(tiles.shape[-1], device=tiles.device)
    hi = torch.where(needed, at + 1, 0).amax(-1)
    lo = torch.minimum(torch.where(needed, at, tiles.shape[-1]).amin(-1), hi)
    run, last = (at - torch.where(full, -1, at).cummax(-1).values).max(-1)
    return Table(RANGES, torch.stack([lo, hi, last + 1 - run, last + 1], -1).int().contiguous())


def lists(tiles: Tensor, length: int, size: int) -> Table:
    """From a map of tiles: for each row of tiles the number of those it needs, then 2 * tile + (0 if it is full) for
    each of them in ascending order, then 1s."""
    needed, full = _needed(tiles, length, size)
    at = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32)
    far = 2 * tiles.shape[-1] + 2
    entries = torch.where(needed, 2 * at + (~full).int(), far).sort(-1).values
    entries = torch.where(entries == far, 1, entries)
    return Table(LISTS, torch.cat([needed.sum(-1, keepdim=True), entries], -1).int().contiguous())


def table(tiles: Tensor, length: int, size: int) -> Table:
    """Ranges where the needed tiles of every row are one run, else lists."""
    found = ranges(tiles, length, size)
    lo, hi = found.values[..., 0], found.values[..., 1]
    one_run = int((hi - lo).sum()) == int((tiles != EMPTY).sum())
    return found if one_run else lists(tiles, length, size)


def _needed(tiles: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    full = tiles == FULL
    if length % size:  # the last tile sticks out: the mask must look at it
        full[..., -1] = False
    return tiles != EMPTY, full


KEPT: Kept[Table] = Kept()


def table_of(
    program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], turned: bool = False
) -> Table | None:
    """The table of a call for tiles of so many queries and keys; turned: its rows are tiles of keys. None: all pairs
    are allowed."""
    if not (program.has_mask or x.ragged) or not x.q_len or not x.kv_len:
        return None

    def make() -> Table:
        tiles = tiles_of(program, x, tile, operands)
        length, size = (x.q_len, tile[0]) if turned else (x.kv_len, tile[1])
        if tiles.device.type == "cuda":  # which is not waited for
            return Table(LISTS, maps.lists_of(tiles, length // size if length % size else -1, turned))
        return table(tiles.mT.contiguous() if turned else tiles, length, size).to(x.q.device)

    positions = x.q_positions, x.kv_positions
    key = key_of(program, positions, x.batch, x.heads, operands, tile, turned, x.q.device)
    return KEPT.made(key, make, lambda found: found.values.numel(), program.tensors)


def tiles_of(program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor]) -> Tensor:
    """The map of tiles of a call: made on the GPU if something that the mask reads lies there, or if there are many
    tiles; else on the CPU."""
    if x.q.device.type == "cuda" and (_many(program, x, tile) or _reads_there(program, x, operands)):
        return maps.map_of(program, x, tile, operands)
    at = as_range(x.q_positions), as_range(x.kv_positions)
    return program.tiles(*at, tile=tile, batch=x.batch, heads=x.heads, device=torch.device("cpu"), **operands)


def _many(program: Program, x: Inputs, tile: tuple[int, int]) -> bool:
    depends = program.mask_depends
    heads = (x.batch if "b" in depends else 1) * (x.heads if "h" in depends else 1)
    return heads * cdiv(x.q_len, tile[0]) * cdiv(x.kv_len, tile[1]) > MANY


def _reads_there(program: Program, x: Inputs, operands: dict[str, Tensor]) -> bool:
    read = *(program.table(source, operands) for source in program.mask_reads), x.q_positions, x.kv_positions
    return any(isinstance(t, Tensor) and t.device == x.q.device for t in read)


def steps_of(table: Table | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Strides of a table for so many batches, heads and rows, 0 where it is shared."""
    if table is None:
        return 0, 0, 0
    values = table.values
    if table.kind == JUMPS:
        return shape[1] * shape[2], shape[2], 1
    batch, heads, rows, _ = values.shape
    if batch not in (1, shape[0]) or heads not in (1, shape[1]) or rows != shape[2] or not values.is_contiguous():
        raise ValueError(f"a table of {list(values.shape)} does not fit {shape[0]} x {shape[1]} heads, {shape[2]} rows")
    return (values.stride(0) if batch > 1 else 0), (values.stride(1) if heads > 1 else 0), values.stride(2)
