"""Fastmax: its features, its weights, and gradients of finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention, explain, get

BOTH = pytest.mark.parametrize("causal", [True, False])


@pytest.mark.parametrize("p", [1, 2])
def test_features_multiply_to_the_polynomial(p, make_inputs):
    form = get("fastmax")(p=p)
    x = make_inputs(form, 7)
    s = F.layer_norm(x.q, (6,)) @ F.layer_norm(x.k, (6,)).mT
    weights = form.query_feature(x.q) @ form.key_feature(x.k).mT
    torch.testing.assert_close(weights, 1 + s + (s**2 / 2 if p == 2 else 0), atol=1e-12, rtol=1e-10)
    assert p == 1 or (weights >= 0.5 - 1e-12).all(), "1 + x + x^2 / 2 is least, 1/2, at -1"


@BOTH
@pytest.mark.parametrize("p", [1, 2])
def test_weights_sum_to_one(p, causal, make_inputs):
    x = make_inputs(get("fastmax")(), 33)
    o = attention(x.q, x.k, torch.ones_like(x.v), "fastmax", p=p, causal=causal)
    torch.testing.assert_close(o, torch.ones_like(o), atol=1e-10, rtol=0)


@BOTH
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_are_those_of_finite_differences(p, causal, make_inputs):
    x = make_inputs(get("fastmax")(), 4, batch=1, heads=2, head_dim=3, v_head_dim=2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, "fastmax", p=p, causal=causal), x.leaves)


def test_wide_heads_are_more_than_kernels_take(monkeypatch, make_inputs):
    from manyheads.engines import triton

    monkeypatch.setattr(triton, "_interprets", lambda: True)
    x = make_inputs(get("fastmax")(), 4, head_dim=32, dtype=torch.float32)
    with pytest.raises(ValueError, match="up to 256, not 561"):
        explain(*x.tensors, "fastmax", engine="triton")
    assert explain(*x.tensors, "fastmax", p=1, engine="triton").engine == "triton"
