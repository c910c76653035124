"""A convolution through Fourier space equals the sum that it stands for, and kernels of exponentials theirs."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.long_convolution import exponentials, long_conv
from tests.test_mechanisms import Memory

EXACT = {"atol": 1e-11, "rtol": 1e-9}


def summed(x, kernel):
    rows = [sum(kernel[:, c] * x[:, t - c] for c in range(min(kernel.shape[1], t + 1))) for t in range(x.shape[1])]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 17])
def test_equals_the_sum_with_its_gradients(length, size):
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, length, 3), (3, size))]
    got, wanted = long_conv(*leaves), summed(*leaves)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(o, leaves, weight) for o in (got, wanted)), **EXACT)


def test_nothing_comes_round_from_the_end_to_the_start():
    """Lengths at which the transform is just long enough."""
    for length, size in ((8, 1), (8, 9), (5, 4), (3, 2), (16, 16), (9, 9)):
        x = torch.zeros(1, length, 1, dtype=torch.float64)
        x[:, -1] = 1
        y = long_conv(x, torch.ones(1, size, dtype=torch.float64))
        assert y[0, :-1].abs().max() < 1e-14 and abs(y[0, -1] - 1) < 1e-14


def test_nothing_is_convolved_where_nothing_is():
    for shape in ((2, 0, 3), (0, 5, 3)):
        assert long_conv(torch.zeros(shape), torch.ones(3, 4)).shape == shape


def test_computes_in_float32_whatever_it_is_given():
    x, kernel = torch.randn(2, 50, 3).bfloat16(), torch.randn(3, 50)
    y = long_conv(x, kernel)
    assert y.dtype == torch.bfloat16 and y.equal(long_conv(x.float(), kernel).bfloat16())
    assert long_conv(x, kernel.bfloat16()).equal(long_conv(x.float(), kernel.bfloat16().float()).bfloat16())
    weight, step = torch.randn(3, 4), -torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert y.equal(long_conv(x, kernel))
        narrow = exponentials(weight, step, 50)
    assert narrow.dtype == torch.float32 and narrow.equal(exponentials(weight, step, 50))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_exponentials_equal_their_sum(length, dtype):
    weight, step = (torch.randn(3, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    down = -step.abs() if dtype == torch.float64 else torch.complex(-step.real.abs(), step.imag)
    wanted = (weight[..., None] * (down[..., None] * torch.arange(length)).exp()).sum(1)
    got = exponentials(weight, down, length)
    torch.testing.assert_close(got, wanted, **EXACT)
    by = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(o, (weight, step), by, retain_graph=True) for o in (got, wanted))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_kernel_takes_no_more_memory_than_it_has_numbers():
    """Rather than the 32 times as many of all exponentials; with what a gradient needs, a few times as many."""
    weight, step = torch.randn(2, 32, requires_grad=True), -torch.rand(2, 32)
    with Memory() as used:
        exponentials(weight, step, 4096).sum().backward()
    assert used.largest <= 2 * 4096 * 4 and used.peak <= 8 * 2 * 4096 * 4
