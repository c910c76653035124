"""Maps of blocks: cells that hold a share of a map, and lists of columns, diagonals and cells."""

from __future__ import annotations

from typing import Any

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
    check_cells(builders.heaviest_cells(q, k, 0.3, share, 1, first), masses(q, k, 0.3, first), share)


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


def stripes(batch: int, heads: int, kv_heads: int, queries: int, n: int, dim: int, device: torch.device) -> Any:
    """q, k and masses in steps of 2^-16, so that sums are exact; of every second head the first ones are what its
    products say, and of the others they are not."""
    q, k = torch.randn(batch, heads, queries, dim, device=device), torch.randn(batch, kv_heads, n, dim, device=device)
    mass = (4 * torch.randn(2, batch, heads, n, device=device)).softmax(-1)
    mass[0, :, 1::2] = (picking.products(q.mean(2, keepdim=True), k) * 0.9).softmax(-1)[:, 1::2, 0]
    return q, k, (mass * 2**16).round() / 2**16


def test_operators_are_as_torch_wants_them():
    q, k, share = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 9, 8), torch.full((1, 2, 1), 0.5)
    torch.library.opcheck(builders.heaviest_cells.made, (q, k, 0.3, share, 2, 7))
    torch.library.opcheck(builders.heaviest_stripes.made, (*stripes(2, 2, 1, 5, 9, 8, CPU), 0.9, 0.7, 0.1, 2))
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
            check_cells(kernels.heaviest_cells(q, k, 0.3, share, 1, first), p, share)
        launches.LONGEST = longest
        tokens, offset = torch.randn(batch, heads, 7 * queries - 3, dim, device=device).half(), 7 * first + 2
        found = kernels.heaviest_cells(tokens, k, 0.3, share, 7, offset)  # the first block has 5 tokens, the last 6
        check_cells(found, masses(picking.block_means(tokens, 7, offset), k, 0.3, first), share)
        maps = random_maps(batch, heads, queries, n, device)
        found, true = (Blocks(*by.crossed(*maps, share, first)) for by in (kernels, crossing))
        assert found.counts.equal(true.counts) and found.to_map(n).equal(true.to_map(n))


STRIPES = [(2, 4, 2, 20, 30, 16), (1, 3, 1, 33, 9, 72), (1, 2, 2, 5, 300, 8), (1, 2, 1, 40, 1, 24)]


def check_stripes(device: torch.device, cases: list = STRIPES) -> None:
    from manyheads.engines.triton.choosing import crossing as kernels

    for batch, heads, kv_heads, queries, n, dim in cases:
        q, k, mass = stripes(batch, heads, kv_heads, queries, n, dim, device)
        for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2).half()):
            for share, near, least in ((0.7, 0.1, 2), (0.95, 0.1, 1), (1.0, 0.1, 3), (0.5, 9.0, 1), (0.5, 0.0, 40)):
                found, true = (by.heaviest_stripes(x, k, mass, 0.9, share, near, least) for by in (kernels, crossing))
                assert found[0].equal(true[0]) and found[1].equal(true[1])
            p, shown = (
                (picking.products(x.double().mean(2, keepdim=True), k.double()) * 0.9).softmax(-1)[:, :, 0],
                mass[0],
            )
            middle = (p + shown) / 2
            apart = (torch.xlogy(p, p / middle) + torch.xlogy(shown, shown / middle)).sum(-1).div(2).clamp(min=0).sqrt()
            for near in (0.8 * apart[0, 0].item(), 1.25 * apart[0, 0].item()):
                told = kernels.heaviest_stripes(x, k, mass, 0.9, 0.7, near, 2)[1].flatten(1) > 0
                assert mass.shape[3] == 1 or told.equal(apart < near)


def interpreted() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check(CPU)
    check_stripes(CPU)


def test_kernels_in_the_interpreter():
    interpret("test_choosing_cells", "interpreted()", strict=False)  # masses without a share are what memory held


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_kernels_on_a_gpu():
    check(torch.device("cuda"), [*SIZES, (1, 4, 2, 300, 400, 128, 100)])
    check_stripes(torch.device("cuda"), [*STRIPES, (1, 4, 2, 128, 2000, 128), (1, 2, 1, 128, 8192, 128)])
