"""Selections in torch's kernels: each block of queries gets keys of its own."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention
from manyheads.core import Blocks, Operand, Scores, Selection, tiling
from manyheads.engines import sdpa


def causal(b, h, i, j):
    return j <= i


def document(b, h, i, j, of):
    return (j <= i) & (of[b, i] == of[b, j])


def far(b, h, i, j):
    return (j <= i) & (i - j < 20 * (h + 1))


MASKS = {"causal": Scores(mask=causal), "none": Scores(), "far": Scores(mask=far),
         "documents": Scores(mask=document, operands={"of": Operand("batch len")})}  # fmt: skip


def form_of(scores: Scores, blocks: Blocks, size: tuple[int, int]) -> Selection:
    select = lambda q, k, *, scale, offset: blocks  # noqa: E731
    return Selection(select=select, scores=scores, operands=scores.operands, query_block=size[0], key_block=size[1])


def drawn(heads: int, rows: int, columns: int, share: float) -> Blocks:
    return Blocks.from_map(torch.rand(2, heads, rows, columns) < share)


@pytest.fixture(params=[2**18, 1], ids=["", "one list a call"])
def tiled(request, monkeypatch):
    """Tiles are told apart however little there is to do."""
    monkeypatch.setattr(tiling, "SMALL", 0)
    monkeypatch.setattr(sdpa, "AT_ONCE", request.param)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "size"),
    [
        (96, 96, (4, 4), (32, 16)), (75, 203, (6, 2), (32, 48)), (64, 130, (4, 1), (64, 16)), (3, 64, (4, 2), (32, 8)),
        (34, 98, (2, 2), (32, 32)),
    ],
)  # fmt: skip
def test_equals_eager(tiled, mask, q_len, kv_len, heads, size):
    torch.manual_seed(0)
    (h, kv), start = heads, kv_len - q_len
    q = torch.randn(2, h, q_len, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv, kv_len, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = (kv_len - 1) // size[0] - start // size[0] + 1
    blocks = drawn(h, rows, -(-kv_len // size[1]), 0.15)  # some queries see nothing
    documents = torch.stack([torch.arange(kv_len) // 50, torch.arange(kv_len) // 40]).double()
    operands = {"of": documents} if mask == "documents" else {}
    form = form_of(MASKS[mask], blocks, size)
    found, true = (attention(q, k, v, form, engine=engine, **operands) for engine in ("sdpa", "eager"))
    assert bool((true == 0).all(-1).any()), "a row that sees nothing is to be looked at"
    torch.testing.assert_close(found, true)
    do = torch.randn_like(true)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (found, true)), strict=True):
        torch.testing.assert_close(a, b)


def test_lists_that_say_nothing_behind_their_counts():
    """What stands behind a list's count may be no block at all."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 128, 8)
    n = torch.randint(0, 8, (2, 4, 4, 1))
    there = torch.rand(2, 4, 4, 1) < 0.7
    blocks = Blocks.from_indices(n, there)
    assert int(blocks.indices.max()) > 8
    form = form_of(Scores(mask=causal), blocks, (32, 16))
    torch.testing.assert_close(attention(q, k, v, form, engine="sdpa"), attention(q, k, v, form, engine="eager"))


def test_what_is_seen_whole_needs_no_mask(tiled, monkeypatch):
    """A mask is made for blocks on the diagonal, once for all heads that have them in common."""
    made = []
    seen_pairs = sdpa.seen_pairs
    monkeypatch.setattr(sdpa, "seen_pairs", lambda *a: made.append(seen_pairs(*a)) or made[-1])
    monkeypatch.setattr(sdpa, "AT_ONCE", 2**18)
    form = form_of(MASKS["causal"], Blocks.from_map(torch.ones(1, 4, 3, 3, dtype=torch.bool).tril()), (32, 32))
    q, k, v = torch.randn(3, 1, 4, 96, 8)
    found = attention(q, k, v, form, engine="sdpa")
    assert [t.shape for t in made] == [(1, 1, 32, 32)] * 3
    torch.testing.assert_close(found, attention(q, k, v, "causal", engine="eager"))


def test_nothing_is_seen_by_anyone(tiled):
    form = form_of(MASKS["causal"], Blocks.from_map(torch.zeros(1, 2, 2, 4, dtype=torch.bool)), (32, 16))
    q, k, v = torch.randn(3, 1, 2, 64, 8, requires_grad=True)
    o = attention(q, k, v, form, engine="sdpa")
    assert not o.any()
    assert not any(grad.any() for grad in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("scores", [True, False])
def test_what_only_a_mask_reads_may_want_a_gradient(scores):
    """It gets none, and the outputs are those without it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 100, 8)
    given = torch.rand(1, 100)
    mask = Scores(mask=lambda b, h, i, j, of: (of[b, j] > 0.3) & (j <= i), operands={"of": Operand("batch len")})
    blocks = Blocks.from_map(torch.tensor([[[1, 0], [1, 1]], [[1, 0], [0, 1]]], dtype=torch.bool)[None])
    form = mask if scores else form_of(mask, blocks, (64, 64))
    o = attention(q, k, v, form, of=given.clone().requires_grad_(), engine="sdpa")
    torch.testing.assert_close(o, attention(q, k, v, form, of=given, engine="eager"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wants_grad", [False, True])
def test_no_rows(wants_grad):
    q, k, v = (t.requires_grad_(wants_grad) for t in torch.randn(3, 0, 2, 100, 8))
    blocks = Blocks.from_map(torch.ones(0, 2, 2, 2, dtype=torch.bool))
    o = attention(q, k, v, form_of(MASKS["causal"], blocks, (64, 64)), engine="sdpa")
    assert o.shape == (0, 2, 100, 8) and o.requires_grad == wants_grad
