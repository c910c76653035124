"""Hash and sort, and attention inside of Functions: torch operations against brute force, kernels against torch
operations, in the interpreter, compiled for Hopper without a GPU, and on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.core import builders, sorting, within
from tests.interpreter import interpret

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled

CPU = torch.device("cpu")


def whole(*shape: int, device: torch.device = CPU) -> torch.Tensor:
    """Small whole numbers: sums of products are exact in any order."""
    return torch.randint(-2, 3, shape, device=device).float()


# ---- what is promised ----


def test_hashes_are_places_in_grays_order():
    q, k, g = whole(2, 4, 20, 8), whole(2, 2, 30, 8), torch.randn(8, 5)
    for x, found in zip((q, k), builders.hashed(q, k, g), strict=True):
        assert found.dtype == torch.int32
        signs = ((x @ g > 0).int() << torch.arange(5)).sum(-1)
        assert (found ^ (found >> 1)).equal(signs.int())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), many=st.integers(1, 5), seed=st.integers(0, 99))
def test_orders_are_stable(n, many, seed):
    ranks = torch.randint(many, (2, 3, n), generator=torch.Generator().manual_seed(seed)).int()
    order, places = builders.in_order(ranks, many)
    for row, found, at in zip(*(t.flatten(0, 1).tolist() for t in (ranks, order, places)), strict=True):
        assert found == sorted(range(n), key=lambda i: row[i])
        assert [found[place] for place in at] == list(range(n))


def in_blocks(heads=4, n=11, dim=3, dtype=torch.float64):
    ranks = torch.randint(4, (2, heads, n)).int()
    return torch.randn(2, heads, n, dim, dtype=dtype), builders.in_order(ranks, 4)


@pytest.mark.parametrize(("size", "group"), [(4, 2), (3, 1), (11, 4), (20, 2)])
def test_blocks_of_an_order(size, group):
    x, (order, places) = in_blocks()
    blocks = -(-11 // size)
    found = builders.to_blocks(x, order, places, blocks, size, group)
    assert found.shape == (2, 4 * blocks, size, 3)
    for b, h, block, place in torch.cartesian_prod(*map(torch.arange, (2, 4, blocks, size))).tolist():
        own = found[b, (h // group * blocks + block) * group + h % group, place]
        at = block * size + place
        assert own.equal(x[b, h, order[b, h, at]] if at < 11 else torch.zeros(3, dtype=x.dtype))
    assert builders.from_blocks(found, order, places, blocks, size, group).equal(x)


def test_orders_are_differentiable():
    x, order = in_blocks()
    at = *order, 3, 4, 2
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: builders.to_blocks(x, *at), x)
    y = builders.to_blocks(x, *at).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: builders.from_blocks(y, *at), y)


@pytest.mark.parametrize(("causal", "numbered"), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_inside_of_functions(monkeypatch, causal, numbered):
    monkeypatch.setattr(within, "RUN", 3)
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in ((4, 8), (2, 10), (2, 10)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    of_q, of_k = (torch.randint(3, (2, 4, n)).int() for n in (8, 10))
    of_k[0, 0] = of_q[0, 0, 0]  # which sees none
    numbers = (of_q, of_k) if numbered else (None, None)
    o, lse = builders.attended(q, k, v, 0.7, causal, *numbers)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 4, 8))).tolist():
        keys = [j for j in range(10) if (j <= i + 2 or not causal) and (not numbered or of_q[b, h, i] != of_k[b, h, j])]
        s = 0.7 * k[b, h // 2, keys] @ q[b, h, i]
        torch.testing.assert_close(o[b, h, i], s.softmax(0) @ v[b, h // 2, keys])
        torch.testing.assert_close(lse[b, h, i], s.logsumexp(0))

    def seen(q, k, v):
        o, lse = builders.attended(q, k, v, 0.7, causal, *numbers)
        return o, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(seen, (q, k, v))


def test_operators_are_as_torch_wants_them():
    q, k, v = (torch.randn(1, h, n, 8, requires_grad=True) for h, n in ((4, 9), (2, 13), (2, 13)))
    x, order = in_blocks(dtype=torch.float32)
    x, at = x.requires_grad_(), (*order, 3, 4, 2)
    cut = builders.to_blocks(x, *at).detach().requires_grad_()
    for operator, arguments in (
        (builders.hashed, (q.detach(), k.detach(), torch.randn(8, 3))), (builders.in_order, (order[0], 11)),
        (builders.to_blocks, (x, *at)), (builders.from_blocks, (cut, *at)),
        (builders.attended, (q, k, v, 0.3, True, None, None)),
    ):  # fmt: skip
        torch.library.opcheck(operator.made, arguments)


# ---- kernels against torch operations ----


def check(device: torch.device) -> None:
    from manyheads.engines.triton.choosing import sorting as kernels

    sizes = (4, 2, 70, 130, 20, 5), (2, 2, 33, 33, 16, 1), (3, 1, 9, 80, 72, 7)
    for heads, kv_heads, q_len, kv_len, dim, signs in sizes:
        q, k = (whole(2, h, n, dim, device=device) for h, n in ((heads, q_len), (kv_heads, kv_len)))
        g = whole(dim, signs, device=device)
        for x, y in ((q, k), (q.transpose(1, 2).contiguous().transpose(1, 2).bfloat16(), k.bfloat16())):
            ranks = kernels.hashed(x, y, g)
            assert all(a.equal(b) for a, b in zip(ranks, sorting.hashed(x, y, g), strict=True))
        many = whole(dim, 20, device=device)
        assert kernels.hashed(q, k, many)[0].equal(sorting.hashed(q, k, many)[0])
        for rank in ranks:
            true = sorting.in_order(rank, 2**signs)
            assert all(a.equal(b) for a, b in zip(kernels.in_order(rank, 2**signs), true, strict=True))
        order = sorting.in_order(ranks[0], 2**signs)
        for size in (8, 33):
            at = *order, -(-q_len // size), size, heads // kv_heads
            cut = sorting.to_blocks(x, *at)
            assert kernels.to_blocks(x, *at).equal(cut) and kernels.from_blocks(cut, *at).equal(x)
            lse = torch.randn(*cut.shape[:3], 1, device=device)
            assert kernels.from_blocks(lse, *at).equal(sorting.from_blocks(lse, *at))


def interpreted() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check(CPU)


def test_kernels_in_the_interpreter():
    interpret("test_sorting", "interpreted()")


@pytest.mark.parametrize("name", ["ranks", "to_blocks", "from_blocks"])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    made = compiled.read(dict(compiled.choosing_kernels())[name]())
    assert made.spilled == 0 and made.shared <= compiled.LIMIT, made


# ---- on a GPU ----

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_kernels_on_a_gpu():
    check(torch.device("cuda"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("heads", "q_len", "kv_len", "dim", "which"),
    [(8, 300, 300, 128, "causal"), (256, 256, 256, 64, "all"), (8, 700, 100, 128, "numbered")],
)
def test_attention_inside_of_functions_on_a_gpu(heads, q_len, kv_len, dim, which):
    shapes = (heads, q_len), (heads // 4, kv_len), (heads // 4, kv_len)
    q, k, v = (torch.randn(2, h, n, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for h, n in shapes)
    numbers: tuple = (None, None)
    if which == "numbered":
        numbers = tuple(torch.randint(5, (2, heads, n), device="cuda").int() for n in (q_len, kv_len))
    rest = dim**-0.5, which == "causal"
    o, lse = builders.attended(q, k, v, *rest, *numbers)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    wide = [t.detach().double() for t in (q, k, v)]
    true_o, true_lse = within.attended(*wide, *rest, *numbers)
    true = within.attended_gradients(*wide, true_o, true_lse, do.double(), dlse.double(), *rest, *numbers)
    found = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-4, rtol=1e-4)
    for a, b in zip((o, *found), (true_o, *true), strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()  # bfloat16, as benchmarks/attention.py has it
