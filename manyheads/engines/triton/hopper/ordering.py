"""Which program of a kernel is worked on first: the last ones to finish should have little to do.

table._replace(order=heaviest_first(work_of(table, x, tile, turned), among_all=False))
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.inputs import Inputs
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.tables import JUMPS, Table

QUERIES = 128  # in a tile, and keys of a program of the backward pass


def work_of(table: Table, x: Inputs, tile: tuple[int, int], turned: bool) -> Tensor:
    """How many tiles each program of a kernel visits, by a table of LISTS or JUMPS: int32 [heads of the batch,
    programs], in the order of programs. turned: heads and programs are those of keys, which work for all query heads
    that share them."""
    if table.kind == JUMPS:
        rows = x.batch * x.heads * cdiv(x.kv_len, QUERIES) * (QUERIES // tile[1])
        jumps = table.values[:rows]
        numbers = table.values[torch.arange(rows, device=jumps.device) + jumps]
    else:
        numbers = table.values[..., 0]
    if not turned:
        return numbers.view(x.batch * x.heads, -1).flip(-1)  # as kernels begin with the last queries
    of_keys = numbers.view(x.batch * x.kv_heads, x.heads // x.kv_heads, -1, QUERIES // tile[1])
    return of_keys.sum((1, 3), dtype=torch.int32)


def heaviest_first(work: Tensor, among_all: bool) -> Tensor:
    """The numbers of programs, int32 [n], the heaviest first: of each head, which share keys, or of all of them."""
    if among_all:
        return work.flatten().argsort(descending=True, stable=True).int()
    heads, programs = work.shape
    begins = torch.arange(0, heads * programs, programs, device=work.device)
    return (work.argsort(dim=-1, descending=True, stable=True) + begins[:, None]).int().flatten()
