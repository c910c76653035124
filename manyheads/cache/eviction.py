"""Which stored tokens stay, given their importance."""

from __future__ import annotations

import torch
from torch import Tensor


def keep(importance: Tensor, positions: Tensor, budgets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The indices of what stays, and their positions, both [batch, heads, width], in stored order.

    importance: [batch, heads, n]; positions: int64 [batch, heads, n], -1 where nothing is stored; budgets: int64
    [batch]; width: the largest budget, at most n. A row with less to keep has free places in front, at position -1.
    """
    importance = importance.masked_fill(positions < 0, -torch.inf)
    # Stable: equal tokens are ranked by where they stand, so that padding does not change a row.
    order = importance.argsort(dim=-1, descending=True, stable=True)[..., :width]
    rank = torch.arange(width, device=order.device)
    stays = (rank < budgets[:, None, None]) & (positions.gather(-1, order) >= 0)
    index = torch.where(stays, order, -1).sort(-1).values
    free = index < 0
    index = index.clamp(min=0)
    return index, torch.where(free, -1, positions.gather(-1, index))
