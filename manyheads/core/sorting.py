"""Tokens in the order of what they hash to, and in blocks of that order, by torch operations on any device.

An order: int32 [batch, heads, len], which token stands at a place; places: at which place a token stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hashed(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Where the signs of q . g and k . g stand in Gray's order, in which neighbours differ in one sign: int32 [batch,
    heads, len] of [batch, heads, len, dim]. g: [dim, signs], float32 or wider; the last sign weighs most."""
    return _hashed(q, g), _hashed(k, g)


def _hashed(x: Tensor, g: Tensor) -> Tensor:
    bits = (x.to(g.dtype) @ g > 0).long().flip(-1).cumsum(-1) % 2
    return (bits << torch.arange(g.shape[1] - 1, -1, -1, device=x.device)).sum(-1).int()


def in_order(ranks: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """The order and the places of tokens by their ranks, int32 [batch, heads, len], of which there are so `many`;
    tokens of one rank stay as they are."""
    order = ranks.argsort(dim=-1, stable=True)
    at = torch.arange(ranks.shape[-1], device=ranks.device).expand_as(order)
    return order.int(), torch.empty_like(order).scatter_(-1, order, at).int()


def to_blocks(x: Tensor, order: Tensor, places: Tensor, blocks: int, size: int, group: int) -> Tensor:
    """Tokens x [batch, heads, len, dim] in blocks of their order, so many of `size` places, zeros behind the last one:
    [batch, heads / group * blocks * group, size, dim], the blocks of `group` heads side by side."""
    found = x.take_along_dim(order.long()[..., None], 2)
    found = F.pad(found, (0, 0, 0, blocks * size - x.shape[2]))
    return found.unflatten(2, (blocks, size)).unflatten(1, (-1, group)).transpose(2, 3).flatten(1, 3)


def from_blocks(x: Tensor, order: Tensor, places: Tensor, blocks: int, size: int, group: int) -> Tensor:
    """The tokens of `to_blocks` back where they came from, [batch, heads, len, dim]."""
    found = x.unflatten(1, (-1, blocks, group)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return found.take_along_dim(places.long()[..., None], 2)
