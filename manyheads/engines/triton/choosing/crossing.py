"""What core/crossing.py is on a GPU. Heads without a share cost next to nothing, and nobody waits to know which."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core import crossing
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.choosing.kernels import cells as kernels
from manyheads.engines.triton.choosing.launches import (
    PART,
    PRECISION,
    empty_lists,
    heaviest,
    launch,
    power,
)

ROWS, WARPS = 64, 8  # of a map, at a time
WIDE, WIDEST = 128, 256  # numbers of a head beyond which there is room for fewer keys, and for none


def heaviest_cells(q: Tensor, k: Tensor, scale: float, share: Tensor, first: int) -> Tensor:
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    if q.dtype == torch.float64 or dim > WIDEST:
        return crossing.heaviest_cells(q, k, scale, share, first)
    q, k, share = (t.float().contiguous() for t in (q, k, share))
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
