"""Tournaments and 4-bit products: kernels against torch operations, in the interpreter, compiled for Hopper without a
GPU, and on a GPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads.core import builders, low_bits, tournaments
from manyheads.core.forms import Blocks
from tests.interpreter import interpret
from tests.test_choosing import chosen_twice, rows_of, whole

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled

CPU = torch.device("cpu")
ROUNDS = [  # heads, key heads, queries, len, dim, count, strides, query block, key block
    (4, 2, 9, 60, 8, 4, (1, 1), 4, 2), (3, 1, 5, 201, 20, 5, (2, 1), 7, 3), (2, 1, 90, 90, 16, 7, (3, 2), 16, 5),
    (2, 2, 9, 9, 8, 50, (1, 1), 4, 1), (1, 1, 1, 130, 16, 3, (2, 2), 32, 4), (2, 1, 3, 333, 24, 16, (1, 4), 1, 4),
    (2, 1, 3, 500, 8, 3, (1, 1), 4, 40), (1, 1, 40, 300, 8, 2, (1, 1), 80, 4),
]  # fmt: skip
BITS = [  # heads, key heads, queries, len, dim, tau, sink, near, query block, key block
    (4, 2, 37, 150, 8, 0.2, 2, 4, 4, 2), (3, 1, 50, 201, 20, 0.3, 0, 5, 3, 4), (2, 1, 90, 300, 16, 0.1, 7, 24, 16, 5),
    (2, 2, 9, 9, 8, 0.1, 1, 10**6, 4, 1), (1, 1, 1, 130, 16, 0.1, 8, 32, 32, 8), 
    (2, 1, 70, 500, 33, 0.0, 64, 70, 64, 32),
    (2, 1, 200, 400, 16, 0.1, 32, 128, 64, 32),
]  # fmt: skip


def estimating():
    from manyheads.engines.triton.choosing import estimating

    return estimating


def check_tournaments(device: torch.device, cases: list = ROUNDS) -> None:
    for heads, kv_heads, queries, n, dim, count, strides, query_block, key_block in cases:
        q, k = whole(2, heads, queries, dim, device=device), whole(2, kv_heads, n, dim, device=device)
        for x, y in ((q, k), (q.bfloat16().transpose(1, 2).contiguous().transpose(1, 2), k.bfloat16()), (0 * q, k)):
            numbers = count, *strides, query_block, key_block, n - queries
            found, true = estimating().tournament(x, y, *numbers), tournaments.tournament(x, y, *numbers)
            assert found[0].shape == true[0].shape and rows_of(*found) == rows_of(*true), numbers


def check_four_bits(device: torch.device, cases: list = BITS) -> None:
    """Logarithms of sums of float32 are off by 1e-5 at most: what is kept with 1e-4 more has to be, what is not kept
    with 1e-4 less must not be."""
    for heads, kv_heads, queries, n, dim, tau, *sizes in cases:
        q, k = 2 * torch.randn(2, heads, queries, dim, device=device), torch.randn(2, kv_heads, n, dim, device=device)
        k, least = k + 3 * torch.randn(dim, device=device), torch.tensor(tau).log().item()
        for x, y in ((q, k), (q.bfloat16().transpose(1, 2).contiguous().transpose(1, 2), k.bfloat16())):

            def kept(by, more: float, x: Tensor = x, y: Tensor = y, sizes=sizes, n=n, least=least) -> Tensor:
                lists = by.by_four_bits(x, y, 0.3, least + more, *sizes, n - x.shape[2])
                assert rows_of(*lists) == [sorted(row) for row in rows_of(*lists)]
                return Blocks(*lists).to_map(-(-n // sizes[-1]))

            found = kept(estimating(), 0.0)
            must, may = kept(low_bits, 1e-4), kept(low_bits, -1e-4)
            assert (found >= must).all() and (found <= may).all(), (sizes, (found < must).sum(), (found > may).sum())


CHECKS = {"tournaments": check_tournaments, "four bits": check_four_bits}


def interpreted(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    estimating().ROUNDED = 512  # so that there are fewer programs, one after the other
    CHECKS[name](CPU)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name):
    interpret("test_choosing_estimating", f"interpreted({name!r})")


def test_operators_are_as_torch_wants_them():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 19, 8)
    torch.library.opcheck(builders.tournament.made, (q, k, 2, 1, 1, 4, 2, 14))
    torch.library.opcheck(builders.by_four_bits.made, (q, k, 0.3, -1.0, 1, 4, 4, 2, 14))


# Words that a kernel spills, at most, with Triton 3.6 and 3.7: twelve such programs are still faster than fewer.
SPILLED = {"tournaments": 17}


@pytest.mark.parametrize("name", ["tournaments", "rounded", "limits", "outweighing"])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    made = compiled.read(dict(compiled.choosing_kernels())[name]())
    assert made.spilled <= SPILLED.get(name, 0) and made.shared <= compiled.LIMIT, made


# ---- on a GPU ----

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("name", "case"), [("tournaments", c) for c in ROUNDS] + [("four bits", c) for c in BITS])
def test_kernels_on_a_gpu(name, case):
    torch.manual_seed(0)
    CHECKS[name](torch.device("cuda"), [case])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_published_sizes_on_a_gpu(dim):
    torch.manual_seed(0)
    device = torch.device("cuda")
    check_tournaments(device, [(4, 2, 300, 5000, dim, 256, (2, 1), 32, 2), (4, 1, 1000, 3000, dim, 32, (1, 1), 64, 16)])
    check_four_bits(
        device, [(4, 2, 1000, 4000, dim, 0.01, 32, 128, 64, 32), (4, 1, 300, 5000, dim, 0.004, 32, 64, 32, 16)]
    )


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_eight_bits_are_as_good_as_sixteen_on_a_gpu(dim, monkeypatch):
    """Rows of sevens, whose sums are as great as they can be, with a few small numbers; and ordinary ones."""
    kernels, sizes = estimating(), (32, 128, 64, 32, 0)
    for share in (0.0, 0.1, 1.0):
        q, k = (torch.randn(1, h, 2048, dim, device="cuda") for h in (4, 2))
        q, k = (torch.where(torch.rand_like(x) < share, x, x.sign()).bfloat16() for x in (q, k))
        for scale, tau in ((0.1, 0.01), (0.3, 0.1), (0.1, 0.03)):
            found = kernels.by_four_bits(q, k, scale, math.log(tau), *sizes)
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "type_of", lambda device: torch.bfloat16)
                true = kernels.by_four_bits(q, k, scale, math.log(tau), *sizes)
            assert rows_of(*found) == rows_of(*true)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("name", "given"), [("sale", {}), ("hip_attention", {"query_stride": 2})])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_whole_choices_on_a_gpu_wait_for_nothing_and_are_the_same_every_run(name, given):
    choose, (first, again), made, more = chosen_twice(name, given, 16384)
    assert first.counts.equal(again.counts)
    meant = torch.arange(first.indices.shape[-1], device="cuda") < first.counts[..., None]
    assert first.indices.where(meant, 0).equal(again.indices.where(meant, 0))
    assert more < 2 * made + 2**28  # one head's scores are 1 GiB
    graph, taken = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        taken = choose()
    graph.replay()
    assert taken.counts.equal(first.counts) and taken.indices.where(meant, 0).equal(first.indices.where(meant, 0))
