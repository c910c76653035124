"""What selections have in common: blocks of tokens as their means, and which entries of a row are worth the most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_means(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Means over blocks of tokens, float32 or wider, [..., blocks, dim] of x [..., len, dim].

    The first token stands at place `start` of its block; the first and the last block may hold fewer than `size`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    there = F.pad(wide.new_ones(x.shape[-2]), (start, 0))
    return (block_sums(F.pad(wide.mT, (start, 0)), size) / block_sums(there, size)).mT


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of the last dimension."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q.k [batch, heads, n, m] of q [batch, heads, n, dim] and k [batch, kv_heads, m, dim], without repeating k."""
    return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)


def past_blocks(queries: int, keys: int, *, first: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: for blocks of one size on both sides, those that begin no later; the first block of queries
    is number `first`."""
    return torch.arange(keys, device=device) <= torch.arange(first, first + queries, device=device)[:, None]


def best(likes: Tensor, count: int) -> Tensor:
    """bool map of the `count` largest entries of each row; -inf is never among them, +inf always first."""
    top = likes.topk(min(count, likes.shape[-1]), dim=-1)
    return torch.zeros_like(likes, dtype=torch.bool).scatter(-1, top.indices, ~top.values.isneginf())


def fewest(mass: Tensor, share: Tensor | float, least: int = 0, *, first: bool = False) -> Tensor:
    """bool map of the heaviest entries of each row that together hold `share` of one, at least so many; entry 0 before
    all others if `first`. A share of 1 takes all, whatever the sums are rounded to."""
    share = torch.as_tensor(share, dtype=mass.dtype, device=mass.device)
    rank = mass.index_fill(-1, mass.new_zeros(1, dtype=torch.long), torch.inf) if first else mass
    order = torch.argsort(rank, dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    number = torch.arange(mass.shape[-1], device=mass.device)
    kept = (ordered.cumsum(-1) - ordered < share) | (number < least) | (share >= 1)
    return torch.zeros_like(kept).scatter(-1, order, kept)
