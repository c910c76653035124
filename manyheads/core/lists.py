"""Lists of blocks, by torch operations on any device.

A list: `indices` int32 [batch, heads, query blocks, n], of which the first `counts` int32 are meant, ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor


def listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """indices and counts of a boolean map [batch, heads, query blocks, key blocks], as wide as the map, as nobody waits
    for counts."""
    return (~keep).to(torch.uint8).argsort(dim=-1, stable=True).int(), keep.sum(-1, dtype=torch.int32)


def transposed(indices: Tensor, counts: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """The query blocks of all entries, ordered by the head, the key block that they list and themselves, int32
    [indices.numel()]; and where each head's key blocks begin there, int32 [batch * heads * key_blocks + 1]. What is
    behind the last one means nothing."""
    batch, heads, query_blocks, width = indices.shape
    lists = batch * heads * key_blocks
    head = torch.arange(0, lists, key_blocks, device=indices.device).view(batch, heads, 1, 1)
    meant = torch.arange(width, device=indices.device) < counts[..., None]
    ordered, places = torch.where(meant, indices + head, lists).flatten().sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(lists + 1, device=indices.device), out_int32=True)
    return (places // max(1, width) % max(1, query_blocks)).int(), begins
