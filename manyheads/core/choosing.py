"""What selections have in common: blocks of tokens as their means, and which entries of a row are worth the most.

Of equal entries the first is taken, on any device. Operators do the work (core/builders.py), for which an engine may
have kernels.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from manyheads.core import builders
from manyheads.core.forms import Blocks
from manyheads.core.picking import past_blocks as past_blocks
from manyheads.core.picking import products as products


def block_means(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Means over blocks of tokens, float32 or wider, [..., blocks, dim] of x [..., len, dim].

    The first token stands at place `start` of its block; the first and the last block may hold fewer than `size`.
    """
    return builders.block_means(x, size, start)


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


# ---- of queries that show which blocks matter ----


def stripes(q: Tensor, k: Tensor, size: int, *, scale: float) -> Tensor:
    """Vertical and slash: the mass of the causal softmax(scale q.k), averaged over the queries, in each block of `size`
    keys, and at each distance of that many blocks, [2, batch, heads, key blocks], float32 or wider.

    q: [batch, heads, queries, dim], the last ones of k [batch, kv_heads, len, dim].
    """
    return builders.stripes(q, k, scale, size)


# ---- of windows of keys ----


def window_means(k: Tensor, kernel: int, stride: int) -> Tensor:
    """Means of the keys n stride to n stride + kernel - 1, float32 or wider, [..., windows, dim] of k [..., len, dim];
    of whole windows alone. stride divides kernel."""
    means, together = block_means(k, stride)[..., : k.shape[-2] // stride, :], kernel // stride
    if means.shape[-2] < together:
        return means[..., :0, :]
    return means.unfold(-2, together, 1).mean(-1)


def best_windows(
    q: Tensor, k: Tensor, count: int, past: Past, *, kernel: int, stride: int, scale: float, together: int = 1,
    dense: int = 0,
) -> Blocks:  # fmt: skip
    """The `count` key blocks with the windows of the greatest weight, what is taken in any case first among them: by
    the softmax(scale q.k) of each query over the windows that end by its position, summed over `together` heads, which
    have one list. A block has the windows that reach into it. Queries before position `dense` take all past blocks.

    q: [batch, heads, q_len, dim], k: window_means, [batch, kv_heads, windows, dim]; past.query_block is 1.
    """
    numbers = count, dense, together, kernel, stride
    return Blocks(*builders.best_windows(q, k, scale, *numbers, *astuple(past)))


# ---- of keys that are looked at one by one ----


def tournament(
    q: Tensor, k: Tensor, count: int, *, query_block: int, key_block: int, offset: int, query_stride: int = 1,
    key_stride: int = 1,
) -> Blocks:  # fmt: skip
    """The key blocks that each query block overlaps, and of those before it up to `count`: it cuts them into so many
    chunks, and halves these until they are blocks. Of all halves the `count` stay whose middle block has the greatest
    q.k, of every so many queries of the query block and every so many keys.

    q: [batch, heads, queries, dim], the last ones of k [batch, kv_heads, len, dim]. offset: the first query's position.
    """
    return Blocks(*builders.tournament(q, k, count, query_stride, key_stride, query_block, key_block, offset))


def by_four_bits(
    q: Tensor, k: Tensor, least: float, *, scale: float, sink: int, near: int, query_block: int, key_block: int,
    offset: int,
) -> Blocks:  # fmt: skip
    """The past key blocks that hold a key whose weight, as 4 bits estimate it, is e^least times the sum of the weights
    of the first `sink` keys and the last `near` up to the end of the query block, and the blocks of these.

    q and k: as for tournament. A row less the mean of all has 15 steps for its numbers; keys are meant less their mean.
    """
    return Blocks(*builders.by_four_bits(q, k, scale, least, sink, near, query_block, key_block, offset))
