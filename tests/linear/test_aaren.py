"""Aaren is causal softmax attention with one query, and streams with a state of one size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads.layers.linear.aaren import Aaren
from manyheads.nn import split


def test_equals_torchs_attention_with_that_query_everywhere():
    """In float32 over many chunks, with every gradient; from softmaxes that are flat to ones that see a single key."""
    for size in (0.1, 1.0, 30.0):
        torch.manual_seed(0)
        module = Aaren(16, 2)
        with torch.no_grad():
            module.query *= size
        x = torch.randn(2, 300, 16).requires_grad_()
        q = split(module.q(module.query).expand(2, 300, -1), 2)
        k, v = split(module.k(x), 2), split(module.v(x), 2)
        wanted = module.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y, weight = module(x), torch.randn(2, 300, 16)
        leaves = [x, *module.parameters()]
        pairs = zip(*(torch.autograd.grad(t, leaves, weight) for t in (y, wanted)), strict=True)
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        for ours, theirs in pairs:
            # The project's bound, relative to the largest gradient: q's sums 300 tokens that nearly cancel.
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("drift", [0.0, 100.0, -100.0])
def test_a_stream_in_pieces_is_the_whole(drift):
    """Scores that grow without end move the maximum at each token, and those that fall never; neither overflows."""
    module = Aaren(8, 2)
    with torch.no_grad():
        module.k.weight[:, 0] += drift * module.q(module.query)
    x = torch.randn(2, 90, 8)
    x[..., 0] = torch.linspace(0, 5, 90)
    whole, last = module.stream(x)
    state, parts = None, []
    for piece in x.split([1] * 20 + [7, 63], 1):
        y, state = module.stream(piece, state)
        parts.append(y)
        assert [t.shape for t in state] == [(2, 2, 1), (2, 2, 1, 5)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert whole.isfinite().all()


def test_gradients_flow_back_through_a_stream():
    """Cut in two, the second half's loss reaches the first half's tokens."""
    module, x = Aaren(8, 2).double(), torch.randn(1, 12, 8).double().requires_grad_()
    _, state = module.stream(x[:, :5])
    y, _ = module.stream(x[:, 5:], state)
    weight = torch.randn_like(y)
    cut, whole = (torch.autograd.grad(t, x, weight)[0] for t in (y, module(x)[:, 5:]))
    torch.testing.assert_close(cut, whole)
    assert cut[:, :5].abs().sum() > 0
