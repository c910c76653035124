"""Maps of blocks from which whole columns, whole diagonals and single cells are kept, by torch operations on any
device. Query block m of the map is number first + m, and sees key blocks up to its own."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.lists import listed
from manyheads.core.picking import heaviest, past_blocks, products, wide


def heaviest_cells(q: Tensor, k: Tensor, scale: float, share: Tensor, first: int) -> Tensor:
    """bool [batch, heads, query blocks, key blocks]: the fewest cells that hold their head's share of the whole map, of
    softmax(scale q.k), rows of which weigh the same; none of heads without a share, whatever they are.

    q: [batch, heads, query blocks, dim], k: [batch, kv_heads, key blocks, dim]; share: [batch, heads, 1], q's dtype.
    """
    s = products(wide(q), wide(k)) * scale
    seen = past_blocks(s.shape[2], s.shape[3], first=first, device=s.device)
    mass = s.masked_fill(~seen, -torch.inf).softmax(-1) / s.shape[-2]
    return heaviest(mass.flatten(-2), share.to(mass.dtype), 0, False).view_as(mass)


def crossed(columns: Tensor, diagonals: Tensor, cells: Tensor, share: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Lists of the blocks that are in a column, bool [batch, heads, key blocks], or on a diagonal so many blocks before
    the own one, likewise, or a cell; cells of heads without a share are not read."""
    queries, n = cells.shape[-2:]
    apart = first + torch.arange(queries, device=cells.device)[:, None] - torch.arange(n, device=cells.device)
    kept = columns[..., None, :] | diagonals[..., apart.clamp(min=0)] | cells & (share > 0)[..., None]
    return listed(kept & (apart >= 0))
