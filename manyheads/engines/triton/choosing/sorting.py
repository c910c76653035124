"""What core/sorting.py is on a GPU: hashes in one launch, orders by counting as hopper/ordering.py has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.core import sorting
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.choosing.kernels import hashing
from manyheads.engines.triton.choosing.launches import PRECISION, TILE, launch, power
from manyheads.engines.triton.hopper.kernels import ordering

ROWS = 64  # tokens that are hashed at a time
SIGNS = 31  # bits of a rank
COUNTED = 2**10  # ranks that are counted; of more, most have no token
SLOTS = 512  # tokens of a program that counts


def hashed(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if g.dtype != torch.float32 or g.shape[1] > SIGNS:
        return sorting.hashed(q, k, g)
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    found = tuple(torch.empty(t.shape[:3], dtype=torch.int32, device=t.device) for t in (q, k))
    of_q, of_k = (math.prod(t.shape[:2]) * cdiv(t.shape[2], ROWS) for t in (q, k))
    sizes = q.shape[1], k.shape[1], q.shape[2], k.shape[2], *q.stride()[:3], *k.stride()[:3]
    constants = g.shape[1], max(16, power(g.shape[1])), g.shape[0], max(16, power(g.shape[0])), ROWS, PRECISION
    launch(hashing.ranks, of_q + of_k, (q, k, g.contiguous(), *found, of_q, *sizes, *constants))
    return found  # type: ignore[return-value]  two


def in_order(ranks: Tensor, many: int) -> tuple[Tensor, Tensor]:
    if many > COUNTED:
        return sorting.in_order(ranks, many)
    ranks = ranks.contiguous()
    n, tokens = ranks.shape[2], ranks.numel()
    heads, chunks = tokens // max(1, n), cdiv(n, 32)
    order, places = torch.empty_like(ranks), torch.empty_like(ranks)
    words = torch.zeros(heads * many * chunks, dtype=torch.int32, device=ranks.device)
    lines = ranks, None, tokens, 1, n, 1, heads, 0, 0, 0, n, many, chunks
    sizes, programs = (1, 1, SLOTS), cdiv(tokens, SLOTS)
    launch(ordering.mark, programs, (words, None, *lines, *sizes), num_warps=4)
    sums = words.new_empty(words.numel() + 1)
    launch(ordering.count, cdiv(words.numel(), SLOTS), (words, sums, words.numel(), SLOTS), num_warps=4)
    sums.cumsum_(0)
    launch(ordering.place, programs, (order, places, words, sums, None, *lines, n, *sizes, False), num_warps=4)
    return order, places


def to_blocks(x: Tensor, order: Tensor, places: Tensor, blocks: int, size: int, group: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, heads, length, dim), rows = x.shape, rows_of(x)
    out = x.new_empty(batch, heads * blocks, size, dim)
    sizes = heads, length, blocks, size, group, *x.stride()[:3], dim, power(dim), rows
    launch(hashing.to_blocks, batch * heads * cdiv(blocks * size, rows), (out, x, order, *sizes))
    return out


def from_blocks(x: Tensor, order: Tensor, places: Tensor, blocks: int, size: int, group: int) -> Tensor:
    (batch, heads, length), dim, rows = order.shape, x.shape[3], rows_of(x)
    out = x.new_empty(batch, heads, length, dim)
    arguments = out, x.contiguous(), places, length, blocks, size, group, dim, power(dim), rows
    launch(hashing.from_blocks, batch * heads * cdiv(length, rows), arguments)
    return out


def rows_of(x: Tensor) -> int:
    """Tokens that a program moves."""
    return max(1, TILE // power(x.shape[3]))
