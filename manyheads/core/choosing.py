"""What selections have in common: blocks of tokens as their means, and which entries of a row are worth the most.

Of equal entries the first is taken, on any device. Operators do the work (core/builders.py), for which an engine may
have kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core import builders
from manyheads.core.forms import Blocks
from manyheads.core.picking import products as products


def block_means(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Means over blocks of tokens, float32 or wider, [..., blocks, dim] of x [..., len, dim].

    The first token stands at place `start` of its block; the first and the last block may hold fewer than `size`.
    """
    return builders.block_means(x, size, start)


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of the last dimension."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def by_runs(choose: Callable[[Tensor, int], Tensor], q: Tensor, offset: int, size: int = 128) -> Tensor:
    """choose(q of some queries, the first one's position) -> [..., queries, m], a run of queries at a time: for choices
    that score so many keys that the scores of all queries would not fit in memory."""
    return torch.cat([choose(run, offset + n * size) for n, run in enumerate(q.split(size, -2))], -2)


def past_blocks(queries: int, keys: int, *, first: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: for blocks of one size on both sides, those that begin no later; the first block of queries
    is number `first`."""
    return torch.arange(keys, device=device) <= torch.arange(first, first + queries, device=device)[:, None]


# ---- of scores ----


def best(likes: Tensor, count: int) -> Tensor:
    """bool map of the `count` largest entries of each row; -inf is never among them, +inf always first."""
    return builders.heaviest(likes, None, count, False)


def best_blocks(likes: Tensor, count: int) -> Blocks:
    """The same as lists; no map is made."""
    return Blocks(*builders.best(likes, count))


def fewest(mass: Tensor, share: Tensor | float, least: int = 0, *, first: bool = False) -> Tensor:
    """bool map of the heaviest entries of each row that together hold `share` of one, at least so many; entry 0 before
    all others if `first`. A share of 1 takes all, whatever the sums are rounded to. share: a number, or [..., 1]."""
    given = share if isinstance(share, Tensor) else torch.full((1,), share, device=mass.device)
    return builders.heaviest(mass, given.to(mass.dtype), least, first)


# ---- of blocks that are represented by a vector each ----


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a block of queries looks back at: key blocks that begin no later than it ends. Those that it overlaps are
    taken in any case, and so are `local` more before them and the `first` ones. offset: the first query's position."""

    query_block: int
    key_block: int
    offset: int
    first: int = 0
    local: int = 0


def best_past(q: Tensor, k: Tensor, count: int, past: Past) -> Blocks:
    """The `count` key blocks with the largest q.k, what is taken in any case first among them; no scores are kept.

    q: [batch, heads, query blocks, dim], k: [batch, kv_heads, key blocks, dim].
    """
    return Blocks(*builders.best_past(q, k, count, *astuple(past)))


def fewest_past(q: Tensor, k: Tensor, share: float, past: Past, *, scale: float, least: int = 0) -> Blocks:
    """The fewest key blocks that hold `share` of softmax(scale q.k), at least so many; and what is taken in any
    case."""
    return Blocks(*builders.fewest_past(q, k, scale, share, least, *astuple(past)))
