"""Mamba-2: the layer beside the authors' as transformers has it, and the three ways to compute its recurrence."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention
from manyheads.core.convolution import causal_conv
from manyheads.core.state_space import initial_rates
from manyheads.layers.linear.mamba2 import Mamba2
from manyheads.nn import Attention

EXACT = {"atol": 1e-11, "rtol": 1e-9}  # float64


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_layer_in_transformers(groups):
    """Forward and gradients, with its state under its own names."""
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba2.Mamba2Config(
        hidden_size=12, num_heads=4, head_dim=6, state_size=5, n_groups=groups, chunk_size=4, num_hidden_layers=1,
        use_bias=False,
    )  # fmt: skip
    theirs = mamba2.Mamba2Mixer(config, 0)
    ours = Mamba2(12, head_dim=6, state_dim=5, groups=groups)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 13, 12)
    y, wanted = ours(x), theirs(x)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad((y * weight).sum(), list(ours.parameters()))
    named = dict(theirs.named_parameters())
    theirs_too = torch.autograd.grad((wanted * weight).sum(), [named[name] for name, _ in ours.named_parameters()])
    # Their state is float32 whatever the weights are, so float32 is what can be compared.
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    for (name, _), one, other in zip(ours.named_parameters(), grads, theirs_too, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def made(length=150):
    """q, k, v and g of two rows and three heads; no chunk divides the length."""
    q, k, v = (torch.randn(2, 3, length, n, dtype=torch.float64, requires_grad=True) for n in (5, 5, 4))
    g = -torch.rand(2, 3, length, dtype=torch.float64)
    return q, k, v, g.requires_grad_()


def test_quadratic_chunked_and_recurrent_forms_agree():
    """In o, the last state and all gradients."""
    leaves = q, k, v, g = made()
    total = g.cumsum(-1)
    seen = torch.ones(150, 150, dtype=torch.bool).tril()
    mask = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    left = (total[..., -1:] - total).exp()[..., None]
    quadratic = (q @ k.mT * mask) @ v, (k * left).mT @ v
    chunked = attention(q, k, v, "state_space_duality", g=g, return_state=True)
    outs, state = [], None
    for t in range(150):
        step = (slice(None), slice(None), slice(t, t + 1))
        o, state = attention(
            q[step], k[step], v[step], "state_space_duality", g=g[step], state=state, return_state=True
        )
        outs.append(o)
    weights = torch.randn_like(quadratic[0]), torch.randn_like(quadratic[1])
    wanted = [*quadratic, *torch.autograd.grad(quadratic, leaves, weights)]
    for way in (chunked, (torch.cat(outs, 2), state)):
        for one, other in zip([*way, *torch.autograd.grad(way, leaves, weights)], wanted, strict=True):
            torch.testing.assert_close(one, other, **EXACT)


def test_without_decay_it_is_linear_attention():
    q, k, v, g = made(30)
    plain = (q @ k.mT).tril() @ v
    torch.testing.assert_close(attention(q, k, v, "state_space_duality", g=torch.zeros_like(g)), plain, **EXACT)


def test_starts_as_the_authors_code():
    A_log, dt_bias = initial_rates(10_000)
    A, dt = A_log.exp(), F.softplus(dt_bias)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.2
    assert 0.00099 < dt.min() < 0.0011 and 0.09 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.05
    g = Attention(8, 2, "state_space_duality").operands["g"](torch.randn(1, 3, 8))
    torch.testing.assert_close(g, torch.full_like(g, -0.07), atol=0.005, rtol=0.0)  # as its docstring rounds it


def test_an_impulse_comes_out_of_the_convolution_as_its_taps():
    taps = torch.arange(1.0, 9.0).view(2, 4)
    x = torch.zeros(1, 7, 2)
    x[0, 2] = 1.0
    y = causal_conv(x, taps)
    assert y[0, :, 0].tolist() == [0, 0, 4, 3, 2, 1, 0] and y[0, :, 1].tolist() == [0, 0, 8, 7, 6, 5, 0]
    assert causal_conv(x[:, :0], taps).shape == (1, 0, 2)
    assert causal_conv(x, taps, present=torch.arange(7)[None] != 2).eq(0).all()


def test_trains_under_autocast():
    module, x = Mamba2(16, head_dim=8, state_dim=8), torch.randn(2, 21, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    # Seven bits of mantissa through three products and a norm.
    assert (y - module(x)).abs().max() < 0.05 * module(x).abs().max()
