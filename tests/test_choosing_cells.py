"""Maps of blocks: cells that hold a share of a map, and lists of columns, diagonals and cells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core import builders, crossing, picking
from manyheads.core.forms import Blocks
from tests.interpreter import interpret

CPU = torch.device("cpu")
SIZES = [(2, 4, 2, 20, 30, 16, 5), (1, 3, 1, 33, 33, 72, 0), (1, 2, 2, 9, 70, 8, 61)]


def shares(batch: int, heads: int, device: torch.device = CPU) -> Tensor:
    return torch.tensor([0.9, 0.0, 0.5, 1.0], device=device)[torch.arange(batch * heads) % 4].view(batch, heads, 1)


def masses(q: Tensor, k: Tensor, scale: float, first: int) -> Tensor:
    """Of each cell, float64."""
    apart = first + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    s = picking.products(q.double(), k.double()).cpu() * scale
    return s.masked_fill(apart < 0, -torch.inf).softmax(-1) / q.shape[2]


def check_cells(kept: Tensor, p: Tensor, share: Tensor) -> None:
    """As benchmarks/builders.py's amiss: what differs by less than 1e-5 counts as equal."""
    for own, mass, wanted in zip(kept.cpu().flatten(0, 1), p.flatten(0, 1), share.flatten().tolist(), strict=True):
        chosen = own & (mass > 0)
        if wanted == 1:
            assert chosen.equal(mass > 0)
        elif wanted > 0:
            lightest = mass[chosen].min()
            assert mass[chosen].sum() >= wanted - 1e-5 and mass[mass > lightest * (1 + 1e-5)].sum() < wanted + 1e-5
            assert mass.masked_fill(chosen, 0).max() <= lightest * (1 + 1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_cells_hold_their_share_of_the_map(sizes):
    batch, heads, kv_heads, queries, n, dim, first = sizes
    q, k = torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, n, dim)
    share = shares(batch, heads)
    check_cells(builders.heaviest_cells(q, k, 0.3, share, first), masses(q, k, 0.3, first), share)


def random_maps(batch: int, heads: int, queries: int, n: int, device: torch.device = CPU) -> list[Tensor]:
    return [torch.rand(batch, heads, *rest, device=device) < 0.1 for rest in ((n,), (n,), (queries, n))]


@pytest.mark.parametrize("sizes", SIZES)
def test_lists_of_columns_diagonals_and_cells(sizes):
    batch, heads, _, queries, n, _, first = sizes
    columns, diagonals, cells = random_maps(batch, heads, queries, n)
    share = shares(batch, heads)
    blocks = Blocks(*builders.crossed(columns, diagonals, cells, share, first))
    for b, h, m in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        aware, own = share[b, h] > 0, first + m
        true = [
            t for t in range(min(own + 1, n))
            if columns[b, h, t] or diagonals[b, h, own - t] or (aware and cells[b, h, m, t])
        ]  # fmt: skip
        assert blocks.indices[b, h, m, : blocks.counts[b, h, m]].tolist() == true


def test_operators_are_as_torch_wants_them():
    q, k, share = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 9, 8), torch.full((1, 2, 1), 0.5)
    torch.library.opcheck(builders.heaviest_cells.made, (q, k, 0.3, share, 4))
    torch.library.opcheck(builders.crossed.made, (*random_maps(1, 2, 5, 9), share, 4))


# ---- kernels against torch operations ----


def check(device: torch.device, cases: list = SIZES) -> None:
    from manyheads.engines.triton.choosing import crossing as kernels
    from manyheads.engines.triton.choosing import launches

    longest = launches.LONGEST
    for batch, heads, kv_heads, queries, n, dim, first in cases:
        q, k = (torch.randn(batch, h, m, dim, device=device) for h, m in ((heads, queries), (kv_heads, n)))
        share, p = shares(batch, heads, device), masses(q, k, 0.3, first)
        for launches.LONGEST in (longest, 1):
            check_cells(kernels.heaviest_cells(q, k, 0.3, share, first), p, share)
        launches.LONGEST = longest
        maps = random_maps(batch, heads, queries, n, device)
        found, true = (Blocks(*by.crossed(*maps, share, first)) for by in (kernels, crossing))
        assert found.counts.equal(true.counts) and found.to_map(n).equal(true.to_map(n))


def interpreted() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check(CPU)


def test_kernels_in_the_interpreter():
    interpret("test_choosing_cells", "interpreted()")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_kernels_on_a_gpu():
    check(torch.device("cuda"), [*SIZES, (1, 4, 2, 300, 400, 128, 100)])
