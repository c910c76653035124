"""What choosing blocks is made of, by torch operations on any device and in any dtype. Scores are float32 or wider, and
of equal ones the first is taken. Lists are those of core/lists.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.lists import listed

RUN = 128  # queries whose scores are held at a time, where they are scored against as many keys as there are


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


def best(likes: Tensor, count: int, number: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lists of the `count` largest entries of each row, without a map; -inf is never among them. number: so many of
    them in each row [..., 1]."""
    top = likes.sort(dim=-1, descending=True, stable=True)
    there = ~top.values[..., :count].isneginf()
    if number is not None:
        there = there & (torch.arange(there.shape[-1], device=likes.device) < number)
    indices = torch.where(there, top.indices[..., :count], torch.iinfo(torch.int32).max)
    return indices.sort(-1).values.int(), there.sum(-1, dtype=torch.int32)


def past_blocks(queries: int, keys: int, *, first: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: for blocks of one size on both sides, those that begin no later; the first block of queries
    is number `first`."""
    return torch.arange(keys, device=device) <= torch.arange(first, first + queries, device=device)[:, None]


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


def best_windows(
    q: Tensor, k: Tensor, scale: float, count: int, dense: int, together: int, kernel: int, stride: int, *rule: int
) -> tuple[Tensor, Tensor]:
    """As choosing.best_windows; rule: the numbers of a choosing.Past, for blocks of one query."""
    _, key_block, offset, first, local = rule
    width, n, parts = windows_width(q.shape[2], count, dense, *rule), -(-(offset + q.shape[2]) // key_block), []
    for at in range(offset, offset + max(1, q.shape[2]), RUN):
        run = q[:, :, at - offset : at - offset + RUN]
        likes = window_weights(wide(run), wide(k), scale, at, n, together, kernel, stride, key_block)
        seen, taken = past(run.shape[2], n, 1, key_block, at, first, local, device=q.device)
        likes = likes.masked_fill(taken, torch.inf).masked_fill(~seen, -torch.inf)
        whole = torch.arange(at, at + run.shape[2], device=q.device)[:, None] < dense
        parts.append(best(likes, width, torch.where(whole, width, count)))
    indices, counts = zip(*parts, strict=True)
    return torch.cat(indices, 2), torch.cat(counts, 2)


def window_weights(
    q: Tensor, k: Tensor, scale: float, first: int, blocks: int, together: int, kernel: int, stride: int, key_block: int
) -> Tensor:
    """The greatest weight of a window that reaches into each block [batch, heads / together, queries, blocks], for
    queries from position `first` on."""
    step, overlap = key_block // stride, kernel // stride - 1
    ends = torch.arange(k.shape[2], device=q.device) * stride + kernel - 1
    later = ends > torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    p = (products(q, k) * scale).masked_fill(later, torch.finfo(q.dtype).min).softmax(-1).masked_fill(later, 0.0)
    p = F.pad(p.unflatten(1, (-1, together)).sum(2), (overlap, (blocks + 1) * step - len(ends)))
    return p.unfold(-1, step + overlap, step).amax(-1)[..., :blocks]


def stripes(q: Tensor, k: Tensor, scale: float, size: int) -> Tensor:
    """As choosing.stripes."""
    (queries, n), j = (q.shape[2], k.shape[2]), torch.arange(k.shape[2], device=q.device)
    apart = j[n - queries :, None] - j  # query i sees key j over this distance, and over distance j the key i - j
    a = (products(wide(q), wide(k)) * scale).masked_fill(apart < 0, -torch.inf).softmax(-1) / queries
    by_distance = a.gather(-1, apart.clamp(min=0).expand_as(a)).masked_fill(apart < 0, 0.0)
    both = torch.stack([a.sum(-2), by_distance.sum(-2)])
    return F.pad(both, (0, -n % size)).unflatten(-1, (-1, size)).sum(-1)


def windows_width(queries: int, count: int, dense: int, *rule: int) -> int:
    """Of the lists of best_windows."""
    _, key_block, offset, *_ = rule
    whole = -(-min(dense, offset + queries) // key_block) if offset < dense else 0
    return min(-(-(offset + queries) // key_block), max(count, whole))
