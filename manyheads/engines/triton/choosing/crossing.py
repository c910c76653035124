"""What core/crossing.py is on a GPU. Heads without a share cost next to nothing, and nobody waits to know which."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core import crossing
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.choosing.kernels import cells as kernels
from manyheads.engines.triton.choosing.launches import (
    LONGEST,
    PART,
    PRECISION,
    TILE,
    block_means,
    empty_lists,
    heaviest,
    launch,
    line_of,
    power,
    warps,
)

ROWS, WARPS = 64, 8  # of a map, at a time
WIDE, WIDEST = 128, 256  # numbers of a head beyond which there is room for fewer keys, and for none


def heaviest_stripes(
    q: Tensor, k: Tensor, mass: Tensor, scale: float, share: float, near: float, least: int
) -> tuple[Tensor, Tensor]:
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    columns = max(16, power(n))
    if q.dtype == torch.float64 or 2 * columns > LONGEST:
        return crossing.heaviest_stripes(q, k, mass, scale, share, near, least)
    q, k, mass = q if q.stride(-1) == 1 else q.contiguous(), k.float().contiguous(), mass.contiguous()
    kept = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    shares, space = mass.new_empty(batch, heads, 1), mass.new_empty(batch * heads, columns)
    sizes = heads, heads // kv_heads, queries, n, *q.stride()[:3], scale, share, near, least
    arguments = q, k, mass, space, kept.view(torch.uint8), shares, *sizes, *stripes_tile_of(columns, dim)
    launch(kernels.stripes, batch * heads, arguments, num_warps=warps(2 * columns))
    return kept, shares


def stripes_tile_of(columns: int, dim: int) -> tuple[int, ...]:
    """The constants of kernels/cells.py's stripes."""
    wide = max(16, power(dim))
    return dim, wide, max(1, TILE // wide), columns, line_of(columns)


def heaviest_cells(q: Tensor, k: Tensor, scale: float, share: Tensor, size: int, offset: int) -> Tensor:
    if q.dtype == torch.float64 or q.shape[-1] > WIDEST:
        return crossing.heaviest_cells(q, k, scale, share, size, offset)
    k, share, first = k.float().contiguous(), share.float().contiguous(), offset // size
    q = block_means(q, size, offset % size, share)
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    mass = q.new_empty(batch, heads, queries, n)
    sizes = heads, heads // kv_heads, queries, n, first, scale
    constants = dim, max(16, power(dim)), ROWS, PART if dim <= WIDE else 16, PRECISION
    programs, arguments = batch * heads * cdiv(queries, ROWS), (q, k, share, mass, *sizes, *constants)
    launch(kernels.masses, programs, arguments, num_warps=WARPS)
    return heaviest(mass.flatten(-2), share, 0, False).view(mass.shape)


def crossed(columns: Tensor, diagonals: Tensor, cells: Tensor, share: Tensor, first: int) -> tuple[Tensor, Tensor]:
    indices, counts = empty_lists(cells, *cells.shape)
    maps = (t.contiguous().view(torch.uint8) for t in (columns, diagonals, cells))
    sizes = counts.numel(), cells.shape[2], cells.shape[3], first, 4, 512
    launch(kernels.crossed, cdiv(counts.numel(), 4), (*maps, share.float().contiguous(), indices, counts, *sizes))
    return indices, counts
