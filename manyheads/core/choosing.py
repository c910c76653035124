"""What selections have in common: blocks of tokens as their means, and which entries of a row are worth the most."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.forms import Blocks


def block_means(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Means over blocks of tokens, float32 or wider, [..., blocks, dim] of x [..., len, dim].

    The first token stands at place `start` of its block; the first and the last block may hold fewer than `size`.
    """
    first = min(-start % size, x.shape[-2])
    whole = (x.shape[-2] - first) // size
    head, body, tail = x.split([first, whole * size, x.shape[-2] - first - whole * size], -2)
    blocks = head[..., None, :, :], body.unflatten(-2, (whole, size)), tail[..., None, :, :]
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([block.mean(-2, dtype=wide) for block in blocks if block.shape[-2]], -2)


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of the last dimension."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q.k [batch, heads, n, m] of q [batch, heads, n, dim] and k [batch, kv_heads, m, dim], without repeating k."""
    return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)


def by_runs(choose: Callable[[Tensor, int], Tensor], q: Tensor, offset: int, size: int = 128) -> Tensor:
    """choose(q of some queries, the first one's position) -> [..., queries, m], a run of queries at a time: for choices
    that score so many keys that the scores of all queries would not fit in memory."""
    return torch.cat([choose(run, offset + n * size) for n, run in enumerate(q.split(size, -2))], -2)


def past_blocks(queries: int, keys: int, *, first: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: for blocks of one size on both sides, those that begin no later; the first block of queries
    is number `first`."""
    return torch.arange(keys, device=device) <= torch.arange(first, first + queries, device=device)[:, None]


def best(likes: Tensor, count: int) -> Tensor:
    """bool map of the `count` largest entries of each row; -inf is never among them, +inf always first."""
    top = likes.topk(min(count, likes.shape[-1]), dim=-1)
    return torch.zeros_like(likes, dtype=torch.bool).scatter(-1, top.indices, ~top.values.isneginf())


def best_blocks(likes: Tensor, count: int) -> Blocks:
    """The same as lists; no map is made."""
    top = likes.topk(min(count, likes.shape[-1]), dim=-1)
    return Blocks.from_indices(top.indices, ~top.values.isneginf())


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
