"""Choosing blocks: torch operations against brute force, kernels against torch operations, in the interpreter, compiled
for Hopper without a GPU, and on a GPU.

Triton decides at import whether it interprets, so those cases run in a process of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.core import builders, lists, picking
from manyheads.core.choosing import Past, best, best_blocks, best_past, block_means, fewest, fewest_past
from manyheads.core.forms import Blocks
from tests.interpreter import interpret

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
from builders import amiss, masses

CPU = torch.device("cpu")
FIELDS = ("query_block", "key_block", "offset", "first", "local")
RULES = [(4, 4, 0, 0, 0), (4, 2, 8, 1, 1), (2, 6, 7, 0, 2), (1, 4, 3, 2, 0), (7, 3, 5, 1, 1)]


def rows_of(indices: Tensor, counts: Tensor) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(indices.flatten(0, -2), counts.flatten().tolist(), strict=True)]


def whole(*shape: int, device: torch.device = CPU) -> Tensor:
    """Small whole numbers: sums of products are exact in any order, and many are equal."""
    return torch.randint(-2, 3, shape, device=device).float()


# ---- what is promised ----


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), count=st.integers(1, 10), seed=st.integers(0, 99))
def test_the_best_and_of_equal_ones_the_first(n, count, seed):
    torch.manual_seed(seed)
    likes = whole(2, 3, n).masked_fill(torch.rand(2, 3, n) < 0.3, -torch.inf)
    true = []
    for row in likes.flatten(0, 1).tolist():
        ranked = sorted((j for j in range(n) if row[j] > -torch.inf), key=lambda j: -row[j])
        true.append(sorted(ranked[:count]))
    blocks = best_blocks(likes, count)
    assert rows_of(blocks.indices, blocks.counts) == true
    assert [row.nonzero().flatten().tolist() for row in best(likes, count).flatten(0, 1)] == true


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]), least=st.integers(0, 3), first=st.booleans())
def test_the_fewest_that_hold_a_share(n, share, least, first):
    mass = torch.randint(0, 4, (4, n)) / 8.0
    for row, kept in zip(mass.tolist(), fewest(mass, share, least, first=first).tolist(), strict=True):
        true, total = set(), 0.0
        for j in sorted(range(n), key=lambda j: (first and j > 0, -row[j])):
            if total < share or len(true) < least or share == 1:
                true.add(j)
            total += row[j]
        assert {j for j in range(n) if kept[j]} == true


@pytest.mark.parametrize("rule", RULES)
def test_what_is_past(rule):
    query_block, key_block, offset, first, local = rule
    seen, taken = picking.past(6, 9, *rule)
    for m in range(6):
        queries = range((offset // query_block + m) * query_block, (offset // query_block + m + 1) * query_block)
        own = [n for n in range(9) if any(i // key_block == n for i in queries)]
        near = range(queries[0] // key_block - local, queries[0] // key_block)
        assert seen[m].tolist() == [n * key_block <= queries[-1] for n in range(9)]
        assert taken[m].tolist() == [bool(seen[m, n]) and (n in own or n in near or n < first) for n in range(9)]


def test_past_blocks_that_are_best_or_hold_a_share():
    q, k = torch.randn(1, 4, 5, 8, dtype=torch.float64), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    past = Past(query_block=4, key_block=4, offset=0, first=1)
    found, held = best_past(q, k, 3, past), fewest_past(q, k, 0.6, past, scale=0.5, least=2)
    for h in range(4):
        for m in range(5):
            s = k[0, h // 2] @ q[0, h, m]
            taken = {0, m}
            others = sorted(set(range(m)) - taken, key=lambda n: -s[n])
            assert set(rows_of(found.indices, found.counts)[5 * h + m]) == taken | set(others[: 3 - len(taken)])
            p, true, total = (0.5 * s[: m + 1]).softmax(-1).tolist(), set(), 0.0
            for n in sorted(range(m + 1), key=lambda n: -p[n]):
                true |= {n} if total < 0.6 or len(true) < 2 else set()
                total += p[n]
            assert set(rows_of(held.indices, held.counts)[5 * h + m]) == true | taken


def test_lists_and_maps():
    keep = torch.rand(2, 3, 20, 15) < 0.3
    blocks = Blocks.from_map(keep)
    assert blocks.to_map(15).equal(keep)
    assert rows_of(blocks.indices, blocks.counts) == [row.nonzero().flatten().tolist() for row in keep.flatten(0, 2)]


def test_transposed_lists_are_in_order():
    keep = torch.rand(2, 3, 20, 15) < 0.3
    listed, begins = lists.transposed(*lists.listed(keep), 15)
    assert listed.numel() == keep.numel() and begins[-1] == keep.sum()
    for place, column in enumerate(keep.mT.flatten(0, 2)):
        assert listed[begins[place] : begins[place + 1]].tolist() == column.nonzero().flatten().tolist()


def test_means_are_differentiable():
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    for size, start in ((4, 0), (4, 3), (3, 7), (20, 2)):
        assert torch.autograd.gradcheck(lambda x, size=size, start=start: block_means(x, size, start), x)


def test_operators_are_as_torch_wants_them():
    x, q, k = torch.randn(2, 11, 8, requires_grad=True), torch.randn(1, 2, 5, 8), torch.randn(1, 1, 9, 8)
    for operator, arguments in (
        (builders.block_means, (x, 4, 3)), (builders.best, (q, 3)), (builders.best, (q, 30)),
        (builders.heaviest, (q.softmax(-1), torch.tensor([0.4]), 1, True)), (builders.heaviest, (q, None, 2, False)),
        (builders.best_past, (q, k, 3, *RULES[1])), (builders.fewest_past, (q, k, 0.5, 0.5, 1, *RULES[1])),
        (builders.listed, (q > 0,)), (builders.transposed, (*lists.listed(q > 0), 8)),
    ):  # fmt: skip
        torch.library.opcheck(operator, arguments)


# ---- kernels against torch operations ----


def check_means(device: torch.device) -> None:
    for shape, size, start in (((2, 3, 37, 20), 8, 3), ((1, 2, 3, 16), 8, 2), ((11, 8), 4, 0), ((3, 130, 72), 128, 5)):
        x = whole(*shape, device=device)
        for y in (x, x.bfloat16(), x.transpose(0, -2).contiguous().transpose(0, -2)):
            # Sums are exact; the quotient of two floats is rounded, or multiplied by a rounded inverse.
            found, true = launches().block_means(y, size, start), picking.block_means(y, size, start)
            torch.testing.assert_close(found, true, rtol=3e-7, atol=0)


def check_rows(device: torch.device) -> None:
    kernels = launches()
    for n in (1, 5, 130):
        likes = torch.where(torch.rand(2, 9, n) < 0.5, whole(2, 9, n), torch.randn(2, 9, n)).to(device)
        likes = likes.masked_fill(torch.rand_like(likes) < 0.2, -torch.inf)
        likes = likes.masked_fill(torch.rand_like(likes) < 0.05, torch.inf)
        likes[0, 0], likes[0, 1, ::2], likes[0, 1, 1::2] = -torch.inf, -0.0, 0.0
        for count in (1, 3, 200):
            assert rows_of(*kernels.best(likes, count)) == rows_of(*picking.best(likes, count))
        assert kernels.heaviest(likes, None, 3, False).equal(picking.heaviest(likes, None, 3, False))
        mass = torch.randint(0, 20, (2, 9, n), device=device) / 64.0
        shares = torch.randint(0, 64, (2, 9, 1), device=device) / 64.0
        for share, least, first in (
            (0.0, 0, False),
            (0.3, 0, False),
            (0.9, 2, True),
            (1.0, 0, True),
            (shares, 0, False),
        ):
            of = share if isinstance(share, Tensor) else torch.full((1,), share, device=device)
            assert kernels.heaviest(mass, of, least, first).equal(picking.heaviest(mass, of, least, first))


def check_past(device: torch.device, sizes: tuple[int, int] = (33, 100), rules: list | None = None) -> None:
    """The last of these rules lets some see all blocks, which are multiplied in two parts."""
    kernels, (queries, n) = launches(), sizes
    for rule, dim in zip(rules or [RULES[1], RULES[2], (7, 3, 63, 1, 1)], (8, 72, 40), strict=False):
        q, k = whole(1, 4, queries, dim, device=device), whole(1, 2, n, dim, device=device)
        for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2).bfloat16()):
            found, true = kernels.best_past(x, k, 5, *rule), picking.best_past(x, k, 5, *rule)
            assert found[0].shape == true[0].shape and rows_of(*found) == rows_of(*true)
        q, k = torch.randn_like(q), torch.randn_like(k)
        p, taken = masses(q, k, 0.3, Past(**dict(zip(FIELDS, rule, strict=True))))
        for share, least in ((0.0, 0), (0.5, 0), (0.9, 3), (1.0, 0)):
            kept = Blocks(*kernels.fewest_past(q, k, 0.3, share, least, *rule)).to_map(n)
            assert not amiss(kept, p, taken, share, least).any()
            assert share < 1 or kept.equal(p > 0)


def check_lists(device: torch.device) -> None:
    kernels = launches()
    for shape in ((2, 3, 7, 9), (1, 2, 70, 40), (1, 1, 33, 600)):
        keep = torch.rand(shape, device=device) < 0.3
        keep[..., 0, :] = False
        made = kernels.listed(keep)
        assert rows_of(*made) == rows_of(*lists.listed(keep))
        (listed, begins), (true, ends) = kernels.transposed(*made, shape[3]), lists.transposed(*made, shape[3])
        assert begins.equal(ends) and listed[: begins[-1]].equal(true[: begins[-1]]) and listed.shape == true.shape


CHECKS = {"means": check_means, "rows": check_rows, "past": check_past, "lists": check_lists}


def launches():
    from manyheads.engines.triton.choosing import launches

    return launches


def interpreted(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    CHECKS[name](CPU)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name):
    interpret("test_choosing", f"interpreted({name!r})")


# Words that a kernel spills, at most, with Triton 3.6 and 3.7.
SPILLED = {"best past of 2048": 8, "fewest past of 256": 8}


@pytest.mark.parametrize("name", ["means 128", "best of 1024", "fewest of 2048", *SPILLED, "listing", "place"])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    made = compiled.read(dict(compiled.choosing_kernels())[name]())
    assert made.spilled <= SPILLED.get(name, 0) and made.shared <= compiled.LIMIT, made


# ---- on a GPU ----

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_on_a_gpu(name):
    CHECKS[name](torch.device("cuda"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("n", [17, 64, 257, 1024, 2048, 5000, 16000])
def test_long_rows_on_a_gpu(n):
    device = torch.device("cuda")
    check_past(device, (300, n), [(128, 128, 128 * n // 2, 1, 1), (1, 512, 256 * n, 0, 0)])
    likes = whole(3, 50, n, device=device)
    assert rows_of(*launches().best(likes, n // 10)) == rows_of(*picking.best(likes, n // 10))


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says of itself that it does not see all
def test_choosing_on_a_gpu_runs_kernels_and_waits_for_nothing(monkeypatch):
    q, k = (torch.randn(1, h, 4096, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
    past = Past(query_block=128, key_block=64, offset=0, first=1)
    seen: list[str] = []
    launch = launches()._launch

    def watched(entry, *rest, **options) -> None:
        seen.append(entry.fn.__name__)
        launch(entry, *rest, **options)

    monkeypatch.setattr(launches(), "_launch", watched)

    def choose() -> list[Tensor]:
        means = block_means(q, 128), block_means(k, 64)
        top, held = best_past(*means, 6, past), fewest_past(*means, 0.3, past, scale=0.1)
        kept = Blocks.from_map(fewest(torch.rand(1, 8, 32, 64, device="cuda").softmax(-1), 0.5))
        turned = builders.transposed(held.indices, held.counts, 64)
        return [top.to_map(64), held.to_map(64), turned[1], kept.counts.clamp(max=64)]

    first = choose()
    assert set(seen) == {"means", "past", "heaviest_of_rows", "listing", "mark", "count", "place"}
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = choose()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again, strict=False)), "the same every run"
