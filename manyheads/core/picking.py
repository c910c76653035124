"""What choosing blocks is made of, by torch operations on any device and in any dtype. Scores are float32 or wider, and
of equal ones the first is taken. Lists are those of core/lists.py."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.lists import listed


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(q: Tensor, k: Tensor) -> Tensor:
    """q.k [batch, heads, n, m] of q [batch, heads, n, dim] and k [batch, kv_heads, m, dim], without repeating k."""
    return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)


def block_means(x: Tensor, size: int, start: int) -> Tensor:
    """As choosing.block_means."""
    first = min(-start % size, x.shape[-2])
    whole = (x.shape[-2] - first) // size
    head, body, tail = x.split([first, whole * size, x.shape[-2] - first - whole * size], -2)
    blocks = head[..., None, :, :], body.unflatten(-2, (whole, size)), tail[..., None, :, :]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([block.mean(-2, dtype=dtype) for block in blocks if block.shape[-2]], -2)


def heaviest(mass: Tensor, share: Tensor | None, least: int, first: bool) -> Tensor:
    """bool map of the heaviest entries of each row that together hold its share, at least so many; entry 0 before all
    others if `first`. A share of 1 takes all, whatever the sums are rounded to. Without one, -inf is never taken.

    share: of mass's dtype, to broadcast to [..., 1].
    """
    rank = mass.index_fill(-1, mass.new_zeros(1, dtype=torch.long), torch.inf) if first else mass
    order = rank.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    kept = torch.arange(mass.shape[-1], device=mass.device) < least
    if share is None:
        kept = kept & ~ordered.isneginf()
    else:
        kept = (ordered.cumsum(-1) - ordered < share) | kept | (share >= 1)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, kept)


def best(likes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lists of the `count` largest entries of each row, without a map; -inf is never among them."""
    top = likes.sort(dim=-1, descending=True, stable=True)
    there = ~top.values[..., :count].isneginf()
    indices = torch.where(there, top.indices[..., :count], torch.iinfo(torch.int32).max)
    return indices.sort(-1).values.int(), there.sum(-1, dtype=torch.int32)


def past(
    queries: int, keys: int, query_block: int, key_block: int, offset: int, first: int, local: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """bool [queries, keys] twice: what a choosing.Past lets a query block see, and what of it is taken in any case."""
    begin = (offset // query_block + torch.arange(queries, device=device)[:, None]) * query_block
    n = torch.arange(keys, device=device)
    seen = n * key_block < begin + query_block
    return seen, seen & ((n >= begin // key_block - local) | (n < first))


def best_past(q: Tensor, k: Tensor, count: int, *rule: int) -> tuple[Tensor, Tensor]:
    """As choosing.best_past; rule: the numbers of a choosing.Past."""
    likes = products(wide(q), wide(k))
    seen, taken = past(*likes.shape[-2:], *rule, device=q.device)
    return best(likes.masked_fill(taken, torch.inf).masked_fill(~seen, -torch.inf), count)


def fewest_past(q: Tensor, k: Tensor, scale: float, share: float, least: int, *rule: int) -> tuple[Tensor, Tensor]:
    """As choosing.fewest_past; lists as wide as there are key blocks."""
    s = products(wide(q), wide(k)) * scale
    seen, taken = past(*s.shape[-2:], *rule, device=q.device)
    mass = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    kept = heaviest(mass, torch.full((1,), share, dtype=s.dtype, device=s.device), least, False)
    return listed(kept & seen | taken)
