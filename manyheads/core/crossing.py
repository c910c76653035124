"""Maps of blocks from which whole columns, whole diagonals and single cells are kept, by torch operations on any
device. Query block m of the map is number first + m, and sees key blocks up to its own."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.lists import listed
from manyheads.core.picking import block_means, heaviest, past_blocks, products, wide


def heaviest_stripes(
    q: Tensor, k: Tensor, mass: Tensor, scale: float, share: float, near: float, least: int
) -> tuple[Tensor, Tensor]:
    """bool [2, batch, heads, key blocks]: the fewest entries of each row of mass [2, batch, heads, key blocks] that
    hold `share`, at least so many, the first one in any case. And the share [batch, heads, 1] of heads whose
    softmax(scale mean(q).k) is less than `near` from mass[0], by the root of the Jensen-Shannon divergence: their rows
    need not hold any. Of others 0.

    q: [batch, heads, queries, dim], k: [batch, kv_heads, key blocks, dim]; both results in mass's dtype, if any.
    """
    mean = wide(q).mean(-2, keepdim=True) * scale
    both = torch.stack([products(mean, wide(k)).softmax(-1).squeeze(-2), mass[0]])
    divergence = (torch.xlogy(both, both) - torch.xlogy(both, both.mean(0))).sum(-1, keepdim=True).mean(0)
    alike = divergence.clamp(min=0).sqrt() < near
    shares = alike * torch.full((), share, dtype=mass.dtype, device=mass.device)
    return heaviest(mass, share - shares, least, True), shares


def heaviest_cells(q: Tensor, k: Tensor, scale: float, share: Tensor, size: int, offset: int) -> Tensor:
    """bool [batch, heads, query blocks, key blocks]: the fewest cells that hold their head's share of the whole map, of
    softmax(scale mean(q).k), rows of which weigh the same; none of heads without a share, whatever they are.

    q: [batch, heads, queries, dim], from position `offset` on, in blocks of `size`; k: [batch, kv_heads, key blocks,
    dim]; share: [batch, heads, 1], q's dtype.
    """
    s = products(block_means(q, size, offset % size), wide(k)) * scale
    seen = past_blocks(s.shape[2], s.shape[3], first=offset // size, device=s.device)
    mass = s.masked_fill(~seen, -torch.inf).softmax(-1) / s.shape[-2]
    return heaviest(mass.flatten(-2), share.to(mass.dtype), 0, False).view_as(mass)


def crossed(columns: Tensor, diagonals: Tensor, cells: Tensor, share: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Lists of the blocks that are in a column, bool [batch, heads, key blocks], or on a diagonal so many blocks before
    the own one, likewise, or a cell; cells of heads without a share are not read."""
    queries, n = cells.shape[-2:]
    apart = first + torch.arange(queries, device=cells.device)[:, None] - torch.arange(n, device=cells.device)
    kept = columns[..., None, :] | diagonals[..., apart.clamp(min=0)] | cells & (share > 0)[..., None]
    return listed(kept & (apart >= 0))
