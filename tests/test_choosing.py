"""Choosing blocks: torch operations against brute force, kernels against torch operations, in the interpreter, compiled
for Hopper without a GPU, and on a GPU.

Triton decides at import whether it interprets, so those cases run in a process of their own.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads import get
from manyheads.core import builders, lists, picking
from manyheads.core.choosing import (
    Past,
    best,
    best_blocks,
    best_past,
    best_windows,
    block_means,
    fewest,
    fewest_past,
    stripes,
    window_means,
)  # fmt: skip
from manyheads.core.forms import Blocks, Selection
from tests.interpreter import interpret

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
from builders import amiss, masses, outweighed

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


def test_windows_speak_for_the_blocks_that_they_reach_into():
    q, k = torch.randn(1, 4, 20, 8, dtype=torch.float64), torch.randn(1, 2, 50, 8, dtype=torch.float64)
    means = window_means(k, 6, 2)
    assert means.shape[2] == 23 and torch.allclose(means[0, 1, 22], k[0, 1, 44:50].mean(0))
    assert window_means(k[:, :, :5], 6, 2).shape[2] == 0
    past = Past(query_block=1, key_block=4, offset=30, first=1, local=1)
    blocks = best_windows(q, means, 5, past, kernel=6, stride=2, scale=0.7, together=2, dense=36)
    assert blocks.indices.shape == (1, 2, 20, 9)
    found = rows_of(blocks.indices, blocks.counts)
    for h in range(2):
        for i in range(30, 50):
            ends = range(5, i + 1, 2)
            p = sum((0.7 * means[0, h, : len(ends)] @ q[0, g, i - 30]).softmax(-1) for g in (2 * h, 2 * h + 1))
            reach = {
                n: [p[w] for w, end in enumerate(ends) if (end - 5) // 4 <= n <= end // 4] for n in range(i // 4 + 1)
            }
            likes = {n: max(weights, default=0) for n, weights in reach.items()}
            taken = {0, i // 4, i // 4 - 1}
            ranked = sorted(likes, key=lambda n: (n not in taken, -likes[n]))
            assert found[20 * h + i - 30] == sorted(ranked if i < 36 else ranked[:5])


def test_stripes_hold_the_mass_of_key_blocks_and_diagonals():
    q, k = torch.randn(1, 4, 5, 8, dtype=torch.float64), torch.randn(1, 2, 23, 8, dtype=torch.float64)
    columns, diagonals = stripes(q, k, 4, scale=0.6)
    for h in range(4):
        true = torch.zeros(2, 6, dtype=torch.float64)
        for i in range(18, 23):
            for j, weight in enumerate((0.6 * k[0, h // 2, : i + 1] @ q[0, h, i - 18]).softmax(-1)):
                true[0, j // 4] += weight / 5
                true[1, (i - j) // 4] += weight / 5
        torch.testing.assert_close(torch.stack([columns[0, h], diagonals[0, h]]), true)


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
        (builders.best_windows, (q, k, 0.3, 2, 9, 2, 4, 2, 1, 4, 15, 1, 0)), (builders.stripes, (q, k, 0.3, 4)),
        (builders.listed, (q > 0,)), (builders.transposed, (*lists.listed(q > 0), 8)),
    ):  # fmt: skip
        torch.library.opcheck(operator.made, arguments)


def test_kernels_are_called_directly_where_nobody_differentiates(monkeypatch):
    direct = []
    own = builders.block_means.function
    monkeypatch.setitem(builders.block_means.kernels, "cpu", lambda *given: (direct.append(given), own(*given))[1])
    x = torch.randn(2, 11, 3, requires_grad=True)
    learned = builders.block_means(x, 4, 0)
    assert not direct and "manyheads" in learned.grad_fn.name()
    assert builders.block_means(torch.nn.Parameter(x, requires_grad=False), 4, 0).equal(learned) and not direct
    assert builders.block_means(x.detach(), 4, 0).equal(learned) and len(direct) == 1
    with torch.no_grad():
        assert builders.block_means(x, 4, 0).equal(learned) and len(direct) == 2
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert builders.block_means(x.detach(), 4, 0).equal(learned) and len(direct) == 2
    traced = torch.compile(lambda x: builders.block_means(x, 4, 0), backend="eager", fullgraph=True)
    assert traced(x.detach()).equal(learned) and len(direct) == 2


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
        pairs = torch.arange(n, device=device)
        pairs = (pairs // 2 + pairs % 2 * 2.0**-12)[None]  # one and its neighbour are apart in their last bits alone
        for count in (1, 3, 200):
            for x in (likes, pairs):
                assert rows_of(*kernels.best(x, count)) == rows_of(*picking.best(x, count))
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


def check_long_rows(device: torch.device, n: int = 40) -> None:
    """Rows that are taken for long, in chunks of 16, which are added up one by one."""
    kernels = launches()
    names = "LOOKED", "TOGETHER", "MEASURED", "KEPT"
    sizes = {name: getattr(kernels, name) for name in names}
    for name, size in zip(names, (16, 1, 8, 8), strict=True):
        setattr(kernels, name, size)
    try:
        mass = torch.randint(0, 5, (3, n), device=device) / 64.0
        likes = mass.masked_fill(torch.rand_like(mass) < 0.3, -torch.inf)
        pairs = (torch.arange(n, device=device) // 2 / 1024).repeat(3, 1)
        shares = torch.tensor([[0.0], [0.125], [1.0]], device=device)
        for x, share, least, first in (
            (mass, shares, 0, False),
            (mass, shares[1:2, 0], 2, True),
            (mass, shares[:1, 0], n - 15, True),
            (likes, None, 5, False),
            (pairs, None, 5, False),
        ):
            kept = torch.empty(x.shape, dtype=torch.bool, device=device)
            kernels.of_long_rows(x, share, kept.view(torch.uint8), least, first)
            assert kept.equal(picking.heaviest(x, share, least, first))
    finally:
        for name, size in sizes.items():
            setattr(kernels, name, size)


STRIPES = [(2, 16, 200, 16, 16), (1, 70, 230, 20, 66), (1, 130, 403, 8, 16)]  # key heads, queries, len, dim, block


def check_stripes(device: torch.device, cases: list = STRIPES) -> None:
    kernels = weighing()
    tiles = kernels.TILES
    for kv_heads, queries, n, dim, size in cases:
        q, k = 2 * torch.randn(1, 2, queries, dim, device=device), torch.randn(1, kv_heads, n, dim, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            q, k = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2), k.to(dtype)
            true = picking.stripes(q.double(), k.double(), 0.3, size)
            # Scores of about 10 in float32 are off by 1e-6, and so are weights, relatively.
            for kernels.TILES in (1, tiles):
                torch.testing.assert_close(kernels.stripes(q, k, 0.3, size).double(), true, rtol=1e-5, atol=1e-7)


WINDOWS = [  # heads, key heads, together, len, queries, dim, count, kernel, stride, key block, first, local, dense
    (4, 2, 2, 200, 70, 16, 5, 4, 2, 8, 1, 1, 0), (3, 1, 3, 130, 33, 20, 4, 8, 4, 4, 0, 0, 110),
    (2, 1, 1, 150, 150, 8, 7, 4, 4, 16, 2, 2, 60), (2, 1, 2, 9, 9, 16, 3, 16, 8, 8, 1, 0, 0),
    (2, 1, 2, 500, 200, 16, 3, 32, 16, 32, 1, 1, 0), (2, 1, 2, 260, 260, 16, 3, 16, 16, 16, 0, 1, 0),  # few blocks
    (3, 1, 3, 250, 200, 8, 3, 2, 1, 4, 0, 1, 20),  # parts that some of the rows see, and that all do
]  # fmt: skip


def check_windows(device: torch.device, cases: list = WINDOWS) -> None:
    for heads, kv_heads, together, n, queries, dim, count, kernel, stride, size, first, local, dense in cases:
        rule, blocks = (1, size, n - queries, first, local), -(-n // size)
        q, k = 2 * torch.randn(1, heads, queries, dim, device=device), torch.randn(1, kv_heads, n, dim, device=device)
        small = (1e-3 * q).half().transpose(1, 2).contiguous().transpose(1, 2)
        alike = 1 + k / 4096  # which 16 bits do not tell apart
        for x, y, scale in (
            (q, k, 0.3),
            (q.bfloat16(), k, 0.3),
            (q.bfloat16(), k, -0.3),
            (q, k, -0.3),
            (small, k, 300.0),
            (q.bfloat16(), alike, 16 / dim),
        ):
            means = window_means(y, kernel, stride)
            found = weighing().best_windows(x, means, scale, count, dense, together, kernel, stride, *rule)
            assert found[0].shape[3] == picking.windows_width(queries, count, dense, *rule)
            kept = Blocks(*found).to_map(blocks)
            likes = picking.window_weights(
                x.double(), means.double(), scale, n - queries, blocks, together, kernel, stride, size
            )
            seen, taken = picking.past(queries, blocks, *rule, device=device)
            number = torch.where(torch.arange(n - queries, n, device=device) < dense, blocks, count)
            assert not outweighed(kept, likes, seen, taken, number).any()


def check_halves(device: torch.device) -> None:
    k = torch.randn(2, 3, 700, 20, device=device)
    k[0, 0], k[0, 1] = 1e28 * k[0, 0], 1e-28 * k[0, 1]
    k[1, 1], k[1, 2, 5, 7] = 0.0, 4096.0
    high, low, sizes = weighing()._in_halves(k)
    largest = k.abs().amax((-2, -1), keepdim=True).double()
    found = (high.double() + low.double()) * sizes[..., None, None].double()
    assert ((found - k).abs() <= 2**-22 * largest).all() and high[largest.expand_as(k) > 0].abs().amax() >= 2**14


def check_lists(device: torch.device) -> None:
    kernels = launches()
    for shape in ((2, 3, 7, 9), (1, 2, 70, 40), (1, 1, 33, 600)):
        keep = torch.rand(shape, device=device) < 0.3
        keep[..., 0, :] = False
        made = kernels.listed(keep)
        assert rows_of(*made) == rows_of(*lists.listed(keep))
        (listed, begins), (true, ends) = kernels.transposed(*made, shape[3]), lists.transposed(*made, shape[3])
        assert begins.equal(ends) and listed[: begins[-1]].equal(true[: begins[-1]]) and listed.shape == true.shape


def check_cut(device: torch.device) -> None:
    """Products of parts of the factors, as on a GPU."""
    kernels = launches()
    precision = kernels.PRECISION
    kernels.PRECISION = "tf32x3"
    try:
        check_past(device)
        check_strange(device)
    finally:
        kernels.PRECISION = precision


def check_strange(device: torch.device) -> None:
    """Rows of equal scores, of which the first are taken, and rows with what is no number: the same lists."""
    kernels, rule = launches(), (4, 4, 80, 1, 0)
    for strange in ("equal", "no query", "no key", "endless"):
        q, k = torch.randn(1, 2, 20, 16, device=device), torch.randn(1, 1, 40, 16, device=device)
        if strange == "equal":
            q[:, :, ::2] = 0
        elif strange == "no query":
            q[:, 1, 3:8] = torch.nan
        elif strange == "no key":
            k[:, :, 33] = torch.nan  # which the later rows see
        else:
            q[..., 0], k[:, :, 5:30:7, 0] = 1.0, -torch.inf
        for share, least in ((0.37, 0), (0.37, 5), (1.0, 0), (0.0, 2)):
            found, true = (by.fewest_past(q, k, 0.3, share, least, *rule) for by in (kernels, picking))
            assert rows_of(*found) == rows_of(*true), (strange, share, least)
        found, true = (by.best_past(q, k, 6, *rule) for by in (kernels, picking))
        assert strange in ("no query", "no key") or rows_of(*found) == rows_of(*true), strange


CHECKS = {
    "means": check_means, "rows": check_rows, "long rows": check_long_rows, "past": check_past,
    "strange": check_strange, "cut": check_cut, "stripes": check_stripes, "windows": check_windows,
    "halves": check_halves,
    "lists": check_lists,
}  # fmt: skip


def launches():
    from manyheads.engines.triton.choosing import launches

    return launches


def weighing():
    from manyheads.engines.triton.choosing import weighing

    return weighing


def interpreted(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    CHECKS[name](CPU)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name):
    interpret(
        "test_choosing", f"interpreted({name!r})", strict=name not in ("strange", "cut")
    )  # numpy warns of what is no number


# Words that a kernel spills, at most, with Triton 3.6 and 3.7; 3.6 none for the fewest past of 256.
SPILLED = {"best past of 2048": 40, "fewest past of 256": 136, "windows of 2048": 48, "best of 1024": 12}
FREE = [
    "means 128", "fewest of 2048", "measure", "parts", "stripes", "listing", "place", "masses",
    "crossed",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FREE, *SPILLED])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    made = compiled.read(dict(compiled.choosing_kernels())[name]())
    assert made.spilled <= SPILLED.get(name, 0) and made.shared <= compiled.LIMIT, made
    if "past" in name:
        assert made.registers <= 128, "sixteen warps fit on a multiprocessor"


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
@pytest.mark.parametrize("n", [20000, 2**20 + 5])
def test_rows_that_fit_in_no_program_on_a_gpu(n):
    """Whole numbers of 2^-24: sums are exact in any order."""
    mass = torch.randint(0, 2**24 // n, (3, n), device="cuda") / 2.0**24
    shares = torch.tensor([[0.125], [0.5], [1.0]], device="cuda")
    for share, least, first in ((shares, 0, False), (shares[:1, 0], n // 2, True), (None, 1000, False)):
        assert launches().heaviest(mass, share, least, first).equal(picking.heaviest(mass, share, least, first))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_windows_and_stripes_of_published_sizes_on_a_gpu(dim):
    device = torch.device("cuda")
    for n, queries in ((20000, 300), (5000, 5000)):
        check_windows(device, [(8, 2, 4, n, queries, dim, 40, 32, 16, 64, 1, 15, 3000)])
    check_stripes(device, [(2, 128, 9000, dim, 128), (1, 100, 20011, dim, 100)])


def chosen_twice(name, given, length):
    """A function that chooses; what it gave twice, the second time without waiting for the GPU; the bytes of a list,
    and how many more than before were taken the second time."""
    form = get(name)(**given)
    assert isinstance(form, Selection)
    q, k = (torch.randn(1, h, length, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
    choose = partial(form.select, q, k, scale=0.1, offset=0)
    first = choose()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = choose()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made = again.indices.untyped_storage().nbytes()
    return choose, (first, again), made, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("name", "given"), [("flexprefill", {}), ("infllm_v2", {"dense_len": 1000}), ("dhsa", {"grain": 16})]
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_whole_choices_on_a_gpu_wait_for_nothing_and_stay_linear(name, given):
    _, (first, again), made, more = chosen_twice(name, given, 32768)
    assert first.counts.equal(again.counts)
    assert more < 3 * made + 2**30  # one head's scores are 4 GiB


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says of itself that it does not see all
def test_choosing_on_a_gpu_runs_kernels_and_waits_for_nothing(monkeypatch):
    q, k = (torch.randn(1, h, 4096, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
    past = Past(query_block=128, key_block=64, offset=0, first=1)
    seen: list[str] = []
    launch = launches().launch

    def watched(entry, *rest, **options) -> None:
        seen.append(entry.fn.__name__)
        launch(entry, *rest, **options)

    monkeypatch.setattr(launches(), "launch", watched)

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
