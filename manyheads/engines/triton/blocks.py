"""Tiles of scores: how large, and how kernels are compiled for them, by chip."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """A tile of scores, and how a kernel is compiled for it."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 3


# By kernel, chip (the major compute capability, "" for any other), bytes of a number and padded head_dim.
BLOCKS: dict[tuple[str, str, int, int], Block] = {
    ("forward", "9", 2, 32): Block(128, 128, 8, 3),
    ("forward", "9", 2, 64): Block(128, 128, 8, 3),
    ("forward", "9", 2, 128): Block(128, 64, 8, 3),
    ("forward", "9", 2, 256): Block(128, 32, 8, 2),
    ("keys", "9", 2, 32): Block(64, 128, 8, 3),
    ("keys", "9", 2, 64): Block(64, 128, 8, 3),
    ("keys", "9", 2, 128): Block(64, 128, 8, 2),
    ("keys with score", "9", 2, 128): Block(32, 128, 8, 2),
    ("keys", "9", 2, 256): Block(32, 64, 8, 2),
    ("queries", "9", 2, 32): Block(128, 128, 8, 2),
    ("queries", "9", 2, 64): Block(128, 64, 8, 3),
    ("queries", "9", 2, 128): Block(128, 64, 8, 2),
    ("queries", "9", 2, 256): Block(128, 32, 8, 2),
    ("forward", "", 2, 32): Block(128, 64, 4, 3),
    ("forward", "", 2, 64): Block(128, 64, 4, 3),
    ("forward", "", 2, 128): Block(128, 32, 8, 2),
    ("forward", "", 2, 256): Block(64, 32, 8, 1),
    ("keys", "", 2, 32): Block(64, 64, 4, 2),
    ("keys", "", 2, 64): Block(64, 64, 4, 2),
    ("keys", "", 2, 128): Block(32, 64, 8, 1),
    ("keys", "", 2, 256): Block(32, 32, 8, 1),
    ("queries", "", 2, 32): Block(64, 64, 4, 2),
    ("queries", "", 2, 64): Block(64, 64, 4, 2),
    ("queries", "", 2, 128): Block(64, 32, 8, 1),
    ("queries", "", 2, 256): Block(32, 32, 8, 1),
    # Without tensor cores, a product is unrolled: large tiles take minutes to compile.
    ("forward", "", 4, 64): Block(32, 32, 4, 1),
    ("forward", "", 4, 256): Block(16, 16, 4, 1),
    ("keys", "", 4, 64): Block(32, 32, 4, 1),
    ("keys", "", 4, 256): Block(16, 16, 4, 1),
    ("queries", "", 4, 64): Block(32, 32, 4, 1),
    ("queries", "", 4, 256): Block(16, 16, 4, 1),
}


@cache
def block(kernel: str, chip: str, size: int, head_dim: int, scored: bool) -> Block:
    """The table's entry of the smallest head_dim that is not exceeded, a chip's own before the others'. Score functions
    have one of their own where they need registers that the ordinary one has not left."""
    for own in dict.fromkeys((chip, "")):
        for limit in (32, 64, 128, 256):
            names = (f"{kernel} with score", kernel) if scored else (kernel,)
            found = next((BLOCKS[name, own, size, limit] for name in names if (name, own, size, limit) in BLOCKS), None)
            if head_dim <= limit and found is not None:
                return found
    raise KeyError((kernel, chip, size, head_dim))


@cache
def chip_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return ""
    major = str(torch.cuda.get_device_capability(device)[0])
    return major if any(chip == major for _, chip, _, _ in BLOCKS) else ""


def is_hopper(device: torch.device) -> bool:
    """Not kept: torch.compile traces it, and warns of what is."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device, elsewhere: int = 1) -> int:
    """elsewhere: where they cannot be counted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else elsewhere


def padded(head_dim: int) -> int:
    """To a power of two, and to what a product takes at the least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def cdiv(n: int, size: int) -> int:
    return -(-n // size)
