"""Queries and their gradients to their places, see ordering.py, and what was computed there back to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.inputs import Inputs
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import moving
from manyheads.engines.triton.hopper.launching import wide
from manyheads.engines.triton.hopper.ordering import TILE, Order

ROWS = 16  # of a program


def at_places(x: Inputs, order: Order) -> Inputs:
    """Its queries at their places: one row of queries for each key head."""
    return x.with_(q=gathered(x.q, order), q_positions=range(order.rows.shape[2]))


def gathered(x: Tensor, order: Order) -> Tensor:
    """Rows of x [batch, heads, queries, dim] at their places [batch, kv_heads, places, dim]."""
    x = x if x.stride(3) == 1 else x.contiguous()
    out = quick.empty((*order.rows.shape, x.shape[3]), x.dtype, x.device)
    _, *sizes = _sizes(order)
    arguments = out, x, order.rows, *sizes, *x.stride()[:3], *_widths(x), TILE
    _launch(moving.gather, order.rows.numel() // ROWS, arguments)
    return out


def numbers_at(top: Tensor, delta: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """As backward.prepared gives them, at their places."""
    at = order.rows.clamp(min=0).long()
    top, delta = (numbers.reshape(*at.shape[:2], -1).gather(2, at) for numbers in (top, delta))
    return top.masked_fill_(order.rows < 0, torch.inf), delta


def merge(
    o: Tensor, lse: Tensor, o_own: Tensor | None, lse_own: Tensor | None, sink: Tensor | None, o_parts: Tensor,
    lse_parts: Tensor, order: Order,
) -> None:  # fmt: skip
    """Fills o and lse from those of own blocks, a sink, and what was computed at places."""
    arguments = (
        o, lse, o_own, lse_own, order.own, sink, o_parts, lse_parts, order.slots, *_sizes(order), *o.stride()[:3],
        *lse.stride()[:2], *_widths(o),
    )  # fmt: skip
    _launch(moving.merge, cdiv(o.shape[2], ROWS) * o.shape[0] * o.shape[1], arguments)


def add(dq: Tensor, own: Tensor | None, more: Tensor, order: Order) -> None:
    """Fills dq with the sums."""
    arguments = dq, own, more, order.slots, *_sizes(order), *dq.stride()[:3], *_widths(dq)
    _launch(moving.add, cdiv(dq.shape[2], ROWS) * dq.shape[0] * dq.shape[1], arguments)


def _sizes(order: Order) -> tuple[int, ...]:
    """width, size, group, heads, places, as kernels/moving.py takes them."""
    (_, kv_heads, places), (_, heads, size, width) = order.rows.shape, order.slots.shape
    return width, size, heads // kv_heads, heads, places


def _widths(x: Tensor) -> tuple[int, int, int]:
    return x.shape[3], wide(x.shape[3]), ROWS


def _launch(entry: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            quick.launch(entry, programs, arguments, num_warps=4)
