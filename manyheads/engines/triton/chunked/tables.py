"""How long chunks are, how wide tiles, and how many segments a row is cut into."""

from __future__ import annotations

from typing import NamedTuple

import torch

from manyheads.engines.triton.blocks import cdiv, multiprocessors, padded

CHUNK = {2: 64, 4: 32}  # tokens, by the bytes of a number
LEAST = 4  # chunks of a segment: it is walked twice
AT_ONCE = 2  # programs that a multiprocessor has room for
FEW = 1  # of them, which hopper/ needs to keep the memory busy
LARGEST = 128  # head_dim of keys up to which a segment that corrects can be put behind another
ELSEWHERE = 132  # multiprocessors where they cannot be counted


class Tile(NamedTuple):
    """How wide it is, of the values (of what is about keys alone, of them), and how a kernel is compiled."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most

    @property
    def options(self) -> dict[str, int]:
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


# By kernel (with " channels" if they decay by themselves), bytes of a number and padded head_dim.
TILES: dict[tuple[str, int, int], Tile] = {
    ("walk", 2, 128): Tile(64, 4, 2),
    ("walk", 2, 256): Tile(32, 4, 2),
    ("walk channels", 2, 256): Tile(32, 4, 1),
    ("back", 2, 128): Tile(64, 4, 2),
    ("back", 2, 256): Tile(32, 4, 2),
    ("back channels", 2, 256): Tile(32, 4, 1),
    ("gradients", 2, 128): Tile(64, 8, 2),
    ("gradients", 2, 256): Tile(32, 8, 1),
    ("inner", 2, 256): Tile(32, 4, 1, 160),
    ("inner blocks", 2, 256): Tile(64, 4, 1),
    ("pairs", 2, 128): Tile(128, 4, 1),
    ("pairs", 2, 256): Tile(256, 8, 1),
    ("solve", 2, 256): Tile(32, 1, 3, 168),  # three programs for each quarter of a multiprocessor
    ("walk", 4, 128): Tile(32, 4, 2),
    ("walk", 4, 256): Tile(16, 8, 1),
    ("back", 4, 128): Tile(32, 4, 2),
    ("back", 4, 256): Tile(16, 8, 1),
    ("gradients", 4, 128): Tile(32, 8, 1),
    ("gradients", 4, 256): Tile(16, 8, 1),
    ("inner", 4, 256): Tile(32, 4, 1),
    ("inner blocks", 4, 256): Tile(32, 4, 1),
    ("pairs", 4, 256): Tile(256, 8, 1),
    ("solve", 4, 256): Tile(32, 1, 3),
}


def tile(kernel: str, size: int, head_dim: int, width: int, channels: bool) -> Tile:
    """width: of what a tile's columns are of."""
    found = TILES[key_of(kernel, size, head_dim, channels)]
    return found._replace(columns=min(found.columns, padded(width)))


def key_of(kernel: str, size: int, head_dim: int, channels: bool) -> tuple[str, int, int]:
    """Where the table has it: under the smallest head_dim that is not exceeded."""
    names = (f"{kernel} channels", kernel) if channels else (kernel,)
    keys = ((name, size, limit) for limit in (128, 256) if head_dim <= limit for name in names)
    return next(key for key in keys if key in TILES)


def segments(programs: int, chunks: int, device: torch.device, few: bool = False) -> int:
    """Of each row, where without them there are so many programs. few: as all but one are walked twice in full."""
    at_once = FEW if few else AT_ONCE
    wanted = min(at_once * multiprocessors(device, ELSEWHERE) // programs, chunks // LEAST)
    return cdiv(chunks, cdiv(chunks, max(wanted, 1)))
