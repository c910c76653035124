"""CHELA: two branches are one kernel, blocks are the whole, and work is linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention, layers
from manyheads.core.convolution import causal_conv
from manyheads.core.long_convolution import long_conv
from manyheads.layers.linear.chela import FORM
from tests.linear.test_scans import Work


def test_the_merged_kernel_equals_its_two_branches():
    """With the gradients of both, in float32 to the row's 1e-5."""
    module, x = layers.get("chela")(dim=3, short=4, long=200), torch.randn(2, 300, 3)
    leaves = [module.long, module.branch]
    merged = long_conv(x, module.kernel())
    apart = long_conv(x, module.long) + causal_conv(x, module.branch.flip(-1))
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().mean(), leaves) for y in (merged, apart))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_blocks_equal_the_masked_product(length):
    q, k, v = torch.randn(3, 2, 2, length, 5, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, FORM), (q @ k.mT).tril() @ v, atol=1e-11, rtol=1e-9)


def test_both_convolutions_reach_as_far_as_their_kernels():
    """Through a value gate that is shut but for what Z holds: a token's own Z sees short + long - 1 tokens."""
    module = layers.get("chela")(dim=2, short=3, long=10).double()
    x = torch.randn(1, 30, 2, dtype=torch.float64, requires_grad=True)
    z = long_conv(F.silu(causal_conv(x, module.short)), module.kernel())
    (slope,) = torch.autograd.grad(z[0, 25].sum(), x)
    seen = slope[0].abs().amax(-1) > 1e-12
    assert seen.nonzero().flatten().tolist() == list(range(25 - (3 + 10 - 2), 26))


def test_work_is_linear_in_length():
    """But for the logarithm of Fourier space, whose steps are no operations of torch's."""
    module, counts = layers.get("chela")(dim=8, heads=2), []
    for length in (2048, 8192):
        with torch.no_grad(), Work() as work:
            module(torch.randn(1, length, 8))
        counts.append(work.numbers)
    assert counts[1] < 4.1 * counts[0]


def test_bad_settings_are_one_clear_sentence():
    with pytest.raises(ValueError, match="dim 8 is not a multiple of heads 3"):
        layers.get("chela")(dim=8, heads=3)
    with pytest.raises(ValueError, match="no more taps than the long one, not 4 and 3"):
        layers.get("chela")(dim=8, short=4, long=3)
