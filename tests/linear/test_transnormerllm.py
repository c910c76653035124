"""TransNormerLLM: the masked form, the angles of the first layer, and float32."""

import math

import torch
import torch.nn.functional as F

from manyheads.layers.linear.transnormerllm import TransNormerLLM

EXACT = {"atol": 1e-11, "rtol": 1e-9}  # float64


def masked(module, x):
    """Scores of all pairs at once: sums over channels of q k cos((t - s) theta), times lambda^(t - s)."""
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for p in (module.q, module.k, module.v))
    n = x.shape[1]
    apart = torch.arange(n)[:, None] - torch.arange(n)
    turned = torch.cos(apart[..., None] * module.theta[:, None])  # [heads, t, s, channel]
    rate = torch.tensor([2 ** (-8 * (h + 1) / module.heads) for h in range(module.heads)], dtype=x.dtype)
    rate = rate[:, None, None] * (1 + 1e-5)
    scores = torch.einsum("bhtc,bhsc,htsc->bhts", F.silu(q), F.silu(k), turned)
    o = (scores * torch.where(apart >= 0, torch.exp(-rate * apart), 0.0)) @ v
    o = o.transpose(1, 2).flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return module.o(o * module.u(x))


def test_chunks_and_the_recurrence_equal_the_masked_form():
    """Angles tell how far apart tokens are, and not where they stand; 90 tokens are no whole number of chunks."""
    module = TransNormerLLM(8, 2).double()
    x = torch.randn(2, 90, 8, dtype=torch.float64)
    wanted = masked(module, x)
    torch.testing.assert_close(module(x), wanted, **EXACT)
    torch.testing.assert_close(module.published.reference(module, x[:1]), wanted[:1], **EXACT)
    # 1e-5 is what the three forms are held to in float32.
    torch.testing.assert_close(module.float()(x.float()).double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_first_layer_alone_has_angles():
    modules = [TransNormerLLM(8, 2, layer=n, layers=3) for n in range(3)]
    assert ["theta" in dict(module.named_parameters()) for module in modules] == [True, False, False]
    assert modules[0].theta.shape == (2, 1, 4) and modules[0].theta[0, 0, 0] == 1
    rates = -modules[0].theta.flatten().log() / math.log(10000)
    torch.testing.assert_close(rates, torch.arange(8) / 4)


def test_trains_under_autocast():
    module, x = TransNormerLLM(16, 2), torch.randn(2, 21, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert (y - module(x)).abs().max() < 0.1 * module(x).abs().max()  # eight bits, and sums of both signs
