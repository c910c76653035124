"""Gated slot attention: the slots as a cache, and slots that differ."""

from __future__ import annotations

import torch

from manyheads import attention, get
from manyheads.nn import Attention


def test_a_slot_for_each_token_is_softmax_attention(make_inputs):
    """Token t overwrites slot t and leaves the others alone: the last query sees what attention would."""
    n = 40
    form = get("gated_slot_attention")(slots=n)
    x = make_inputs(form, 1, n, grad=True)
    g = torch.where(torch.eye(n, dtype=torch.bool), -1e4, 0.0).expand(2, 4, n, n)
    o = attention(*x.tensors, form, g=g)
    expected = (x.q @ x.k.mT).softmax(-1) @ x.v
    torch.testing.assert_close(o, expected, atol=1e-12, rtol=1e-10)
    weight = torch.randn_like(o)
    got, wanted = (torch.autograd.grad(y, x.tensors, weight) for y in (o, expected))
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-10)


def test_the_state_is_as_large_as_the_slots(make_inputs):
    form = get("gated_slot_attention")(slots=3)
    for n in (1, 50):
        x = make_inputs(form, n)
        assert attention(*x.tensors, form, return_state=True, **x.operands)[1].shape == (2, 4, 3, 6 + 5)


def test_slots_start_different():
    """Or their softmax would be uniform, and they would have the same gradients for ever."""
    layer = Attention(16, 2, "gated_slot_attention", slots=4)
    x = torch.randn(2, 9, 16)
    layer(x).square().sum().backward()
    rows = layer.operands["g"].weight.weight.grad.unflatten(0, (2, 4))
    assert all((rows[:, a] - rows[:, b]).norm() > 0.01 * rows.norm() for a in range(4) for b in range(a))
    assert layer.q.weight.grad.ne(0).any()
