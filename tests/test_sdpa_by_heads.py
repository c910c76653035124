"""Selections whose heads chose different blocks, in torch's kernels: each head gets keys of its own."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention
from manyheads.core import Blocks, Operand, Scores, Selection
from manyheads.engines import sdpa


def causal(b, h, i, j):
    return j <= i


def document(b, h, i, j, of):
    return (j <= i) & (of[b, i] == of[b, j])


MASKS = {"causal": Scores(mask=causal), "none": Scores(),
         "documents": Scores(mask=document, operands={"of": Operand("batch len")})}  # fmt: skip


def form_of(scores: Scores, blocks: Blocks, size: tuple[int, int]) -> Selection:
    select = lambda q, k, *, scale, offset: blocks  # noqa: E731
    return Selection(select=select, scores=scores, operands=scores.operands, query_block=size[0], key_block=size[1])


def drawn(heads: int, rows: int, columns: int, share: float) -> Blocks:
    return Blocks.from_map(torch.rand(2, heads, rows, columns) < share)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "size"),
    [(96, 96, (4, 4), (32, 16)), (75, 203, (6, 2), (32, 48)), (64, 130, (4, 1), (64, 16))],
)
def test_equals_eager(mask, q_len, kv_len, heads, size):
    torch.manual_seed(0)
    (h, kv), start = heads, kv_len - q_len
    q = torch.randn(2, h, q_len, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv, kv_len, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = (kv_len - 1) // size[0] - start // size[0] + 1
    blocks = drawn(h, rows, -(-kv_len // size[1]), 0.15)  # some queries see nothing
    operands = {"of": (torch.arange(kv_len).expand(2, -1) // 50).double()} if mask == "documents" else {}
    form = form_of(MASKS[mask], blocks, size)
    assert sdpa._differ(blocks, -(-kv_len // size[1]))
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


def test_heads_that_chose_alike_share():
    blocks = drawn(1, 4, 8, 0.3)
    alike = Blocks(blocks.indices.expand(2, 4, -1, -1), blocks.counts.expand(2, 4, -1))
    assert not sdpa._differ(Blocks(alike.indices[:1], alike.counts[:1]), 8)
