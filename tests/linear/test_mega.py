"""Mega: its average is a recurrence, its Laplace function what the paper says, and its chunks cost what they hold."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads import layers
from manyheads.layers.linear.mega import MovingAverage, laplace
from tests.linear.test_scans import Work


def made(**settings):
    module = layers.get("mega")(**{"dim": 8, "shared": 4, "averages": 3, **settings}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def test_laplace_meets_the_squared_relu_at_the_root_of_a_half():
    """In value and slope there; to 0.022 up to 3/4, and bounded above, where the square grows on."""
    at = torch.tensor(0.5**0.5, dtype=torch.float64, requires_grad=True)
    value = laplace(at)
    (slope,) = torch.autograd.grad(value, at)
    torch.testing.assert_close(torch.stack([value, slope]).detach(), torch.tensor([0.5, 2**0.5]).double())
    s = torch.linspace(-0.5, 0.75, 200)
    assert (laplace(s) - s.relu() ** 2).abs().max() < 0.0221
    assert 1.25**2 - laplace(torch.tensor(1.25)) > 0.55 and laplace(torch.tensor(9.0)) == 1


def test_a_long_average_equals_the_steps_in_float32():
    """Over 2000 tokens, to the row's 1e-4 of outputs around 1."""
    average, x = MovingAverage(3, 16), torch.randn(2000, 3)
    kernel = average.kernel(2000)
    alpha, delta = average.alpha.double().sigmoid(), average.delta.double().sigmoid()
    h, impulse = alpha * average.beta, []
    for _ in range(2000):
        impulse.append((average.eta * h).sum(-1) / 4)
        h = (1 - alpha * delta) * h
    torch.testing.assert_close(kernel.double(), torch.stack(impulse, 1), atol=1e-6, rtol=1e-4)
    module = layers.get("mega")(dim=3).requires_grad_(False)
    exact = layers.get("mega")(dim=3).double()
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(
        module.averaged(x[None]).double(), exact.averaged(x[None].double()), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("far", [40.0, 200.0])
def test_an_average_that_forgets_or_keeps_everything_is_a_number(far):
    """Sigmoids that round to 0 or 1 in float32."""
    average = MovingAverage(2, 2)
    with torch.no_grad():
        average.alpha.copy_(torch.tensor([[far, -far], [far, -far]]))
        average.delta.copy_(torch.tensor([[far, far], [-far, -far]]))
    kernel = average.kernel(50)
    kernel.sum().backward()
    assert kernel.isfinite().all() and all(p.grad.isfinite().all() for p in average.parameters())
    forgets, keeps = (average.eta * average.beta)[:, 0].detach() / 2**0.5
    assert kernel[0, 1:].abs().max() < 1e-6 and abs(kernel[0, 0] - forgets) < 1e-6
    torch.testing.assert_close(kernel[1].detach(), keeps.expand(50))


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
def test_between_chunks_the_average_alone_passes(kind):
    """What the first of four chunks holds reaches the last; with an average of nothing it does not."""
    module, x = made(kind=kind, chunk=4), torch.randn(1, 16, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 1] += 1
    assert (module(other) - module(x))[:, 12:].abs().max() > 1e-9
    torch.nn.init.zeros_(module.average.eta)
    gap = (module(other) - module(x)).abs().amax((0, 2))
    assert gap[4:].max() < 1e-12 and gap[1:4].min() > 1e-9


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [True, False])
def test_work_is_linear_in_length_with_chunks(kind, causal):
    """Products of matrices, with a kernel's, whose length is made a multiple of its root, and all numbers that are
    made, of which transforms have a power of two; without chunks attention is quadratic."""
    flops, numbers = {}, {}
    for chunk in (128, None):
        module = layers.get("mega")(dim=8, shared=4, averages=2, kind=kind, chunk=chunk, causal=causal)
        for length in (1024, 4096):
            with torch.no_grad(), FlopCounterMode(display=False) as counter, Work() as work:
                module(torch.randn(1, length, 8))
            flops[chunk, length], numbers[chunk, length] = counter.get_total_flops(), work.numbers
    # The map of tiles, 128 queries by 64 keys, is quadratic, and under 2 % of it here.
    assert flops[128, 4096] <= 4.1 * flops[128, 1024] and numbers[128, 4096] < 4.5 * numbers[128, 1024]
    assert flops[None, 4096] > 8 * flops[None, 1024]
