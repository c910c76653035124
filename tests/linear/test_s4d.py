"""S4D: its convolution is its recurrence, and its starts are what the theory of HiPPO says."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import layers
from manyheads.layers.linear.s4d import STARTS, reference


def start(name, n):
    return STARTS[name](torch.arange(n // 2, dtype=torch.float64))


@pytest.mark.parametrize("name", STARTS)
def test_a_long_row_equals_the_steps_in_float32(name):
    """A thousand tokens, in double precision token by token; to the row's 1e-4, of outputs around 1."""
    module = layers.get("s4d")(dim=2, state_dim=64, start=name)
    x = torch.randn(1, 1000, 2)
    with torch.no_grad():
        wanted = reference(module.double(), x.double())
        torch.testing.assert_close(module.float()(x), wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_legs_are_the_eigenvalues_of_the_normal_part_of_hippo(n):
    """HiPPO-LegS itself: its eigenvalues are -1 ... -n, so the normal part is another matrix."""
    hippo, p = hippo_legs(n)
    assert torch.linalg.eigvals(hippo).real.sort().values.allclose(torch.arange(-n, 0.0).double(), atol=1e-6)
    found = torch.linalg.eigvals(hippo + torch.outer(p, p))
    decay, frequency = start("legs", n)
    torch.testing.assert_close(found.real, torch.full((n,), -0.5, dtype=torch.float64))
    both = torch.cat([-frequency.flip(0), frequency])
    torch.testing.assert_close(found.imag.sort().values, both, atol=1e-8, rtol=1e-8)
    assert decay.eq(0.5).all() and (frequency > 0).all()


def hippo_legs(n):
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    matrix = -torch.outer(root, root).tril(-1) - torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))
    return matrix, root / 2**0.5


def test_the_diagonal_of_legs_nears_the_basis_of_legs_as_it_grows():
    """The paper's theorem, for the Legendre functions 0 to 3 that a state of S4-LegS is made of: the layer's kernel
    with C = V^* e_n and half of B, against exp(-t) sqrt(2n + 1) P_n(1 - 2 exp(-t)) up to its sign; at dt = 0.01, for
    times from 0.2 to 5. The mean error falls by half from each N to four times that."""
    dt, length = 0.01, 500
    t = dt * (torch.arange(length, dtype=torch.float64) + 0.5)  # what holds an input for a step sees its middle
    z = 1 - 2 * torch.exp(-t)
    legendre = [torch.ones_like(z), z, (3 * z**2 - 1) / 2, (5 * z**3 - 3 * z) / 2]
    errors = []
    for n in (16, 64, 256):
        hippo, p = hippo_legs(n)
        skew = hippo + torch.outer(p, p) + torch.eye(n, dtype=torch.float64) / 2
        frequency, v = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
        b = v.conj().mT @ (2**0.5 * p).to(v.dtype) / 2
        module = layers.get("s4d")(dim=4, state_dim=n, start="legs").double()
        torch.testing.assert_close(module.frequency[0], frequency[n // 2 :].float().double(), atol=1e-4, rtol=1e-5)
        with torch.no_grad():
            module.frequency.copy_(frequency[n // 2 :])
            module.log_dt.fill_(math.log(dt))
            module.C.copy_(torch.view_as_real(v[:4, n // 2 :] * b[n // 2 :]))
            kernel = module.kernel(length) / dt
        exact = torch.stack([(2 * k + 1) ** 0.5 * f * torch.exp(-t) for k, f in enumerate(legendre)])
        sign = (kernel * exact).sum(-1, keepdim=True).sign()
        errors.append((sign * kernel - exact)[:, 20:].abs().mean().item())
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2, errors


def test_starts_are_the_paper_s():
    n = torch.arange(3, dtype=torch.float64)
    for name, decay, frequency in (
        ("lin", n * 0 + 0.5, torch.pi * n),
        ("inv", n * 0 + 0.5, 6 / torch.pi * torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)),
        ("real", n + 1, n * 0),
    ):
        torch.testing.assert_close(start(name, 6), (decay, frequency))
    module = layers.get("s4d")(dim=200, dt_min=0.01, dt_max=0.1)
    dt = module.log_dt.exp()
    assert dt.min() > 0.0099 and dt.max() < 0.101 and 0.4 < (dt < 0.1**1.5).float().mean() < 0.6


@pytest.mark.parametrize("name", STARTS)
def test_only_waves_can_wait(name):
    """A pulse that comes a thousand tokens later, as a kernel of the start with the best C of moderate size."""
    decay, frequency = start(name, 64)
    step = 0.001 * torch.complex(-decay, frequency)[:, None] * torch.arange(2000)
    waves = step.exp()
    basis = torch.cat([waves.real, waves.imag]).mT
    pulse = torch.exp(-((torch.arange(2000.0).double() - 1000) ** 2) / 5000)
    c = torch.linalg.solve(basis.mT @ basis + torch.eye(64) * 1e-3, basis.mT @ pulse)
    left = (pulse - basis @ c).norm() / pulse.norm()
    assert left > 0.7 if name == "real" else left < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_dim": 5}, "in pairs of conjugates and is even, not 5"),
        ({"start": "legt"}, "legs"),
        ({"dt_min": 0.0}, "from 0.0 to 0.1"),
        ({"dt_min": 0.2}, "from 0.2 to 0.1"),
    ],
)
def test_bad_settings_are_one_clear_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        layers.get("s4d")(dim=4, **settings)
