"""How long chunks are, how wide tiles, and how many segments a row is cut into."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from manyheads.engines.triton.blocks import cdiv, padded

CHUNK = {2: 64, 4: 32}  # tokens, by the bytes of a number
LEAST = 4  # chunks of a segment: it is walked twice
AT_ONCE = 2  # programs that a multiprocessor has room for
LARGEST = 128  # head_dim of keys up to which a segment that corrects can be put behind another
ELSEWHERE = 132  # multiprocessors where they cannot be counted


class Tile(NamedTuple):
    """How wide it is, of the values (of `inner`, of the keys), and how a kernel is compiled."""

    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


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
    ("inner", 2, 256): Tile(64, 4, 1),
    ("pairs", 2, 128): Tile(128, 4, 1),
    ("pairs", 2, 256): Tile(256, 8, 1),
    ("walk", 4, 128): Tile(32, 4, 2),
    ("walk", 4, 256): Tile(16, 8, 1),
    ("back", 4, 128): Tile(32, 4, 2),
    ("back", 4, 256): Tile(16, 8, 1),
    ("gradients", 4, 128): Tile(32, 8, 1),
    ("gradients", 4, 256): Tile(16, 8, 1),
    ("inner", 4, 256): Tile(32, 4, 1),
    ("pairs", 4, 256): Tile(256, 8, 1),
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


def segments(programs: int, chunks: int, device: torch.device) -> int:
    """Of each row, where without them there are so many programs."""
    wanted = min(AT_ONCE * _multiprocessors(device) // programs, chunks // LEAST)
    return cdiv(chunks, cdiv(chunks, max(wanted, 1)))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else ELSEWHERE
