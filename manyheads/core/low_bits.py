"""Which key blocks hold a weight that counts, as products of 4-bit numbers estimate it: by torch operations on any
device and in any dtype. Numbers are float32 or wider; products of the 15 steps are exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.lists import listed
from manyheads.core.picking import products, wide

HELD = 2**22  # scores that are held at a time
STEPS = 7  # from 0 to the greatest number


def by_four_bits(
    q: Tensor, k: Tensor, scale: float, least: float, sink: int, near: int, query_block: int, key_block: int,
    offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As choosing.by_four_bits; lists as wide as there are key blocks."""
    (batch, heads, _, _), n = q.shape, k.shape[2]
    mean, middle = (x.mean(-2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, q))
    q, smooth = wide(q), wide(k) - mean
    rough, sizes = four_bits(smooth)
    shared, sizes = products(middle, smooth), sizes.mT.repeat_interleave(heads // k.shape[1], 1)
    before, behind = offset % query_block, -n % query_block
    steps, own_sizes = (F.pad(x, (0, 0, before, behind)) for x in four_bits(q - middle))
    q, kept = F.pad(q, (0, 0, before, behind)), []
    size = max(1, HELD // max(1, batch * heads * n * query_block)) * query_block
    for first in range(offset - before, offset - before + max(1, q.shape[2]), size):
        run = slice(first - offset + before, first - offset + before + size)
        i = torch.arange(first, first + q[:, :, run].shape[2], device=q.device)[:, None]
        j = torch.arange(min(first + size, n), device=q.device)
        window = max(0, first + query_block - near) // key_block * key_block
        ends = min(window, -(-sink // key_block) * key_block)
        beside = torch.cat([j[:ends], j[window:]])
        start = (i // query_block + 1) * query_block - near
        taken = (j // key_block * key_block < sink) | (j // key_block >= start.div(key_block, rounding_mode="floor"))
        taken, there = taken & (j <= i), (i >= offset) & (i < n)
        total = products(q[:, :, run], smooth[:, :, beside]) * scale
        total = total.masked_fill(~taken[:, beside], -torch.inf).logsumexp(-1, keepdim=True)
        estimate = products(steps[:, :, run], rough[:, :, : len(j)]) * own_sizes[:, :, run]
        estimate = estimate * sizes[..., : len(j)] + shared[..., : len(j)]
        counts = there & (taken | (j <= i) & (estimate * scale > total + least))
        rows = counts.unflatten(-2, (-1, query_block)).any(-2)
        kept.append(F.pad(rows, (0, n - len(j) + -n % key_block)).unflatten(-1, (-1, key_block)).any(-1))
    return listed(torch.cat(kept, 2))


def four_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [..., dim] as whole numbers from -7 to 7, and what they are multiplied by, [..., 1]."""
    size = x.abs().amax(-1, keepdim=True) / STEPS
    return torch.where(size > 0, torch.round(x / size), 0.0), size
