"""Lightning attention: the slopes, and that blocks, the masked form and the recurrence are the same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention, get

EXACT = {"atol": 1e-11, "rtol": 1e-9}  # float64


def alibi(heads):
    """Press et al. 2021: a geometric series; with a number that is no power of two every other one of the next."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return alibi(below) + alibi(2 * below)[::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 15, 32, 40])
def test_slopes_are_those_of_alibi(heads):
    rates = -get("lightning_attention")().decay(torch.arange(heads), heads)
    torch.testing.assert_close(rates, torch.tensor(alibi(heads), dtype=torch.float64) * (1 + 1e-5), **EXACT)


def test_later_layers_forget_less_and_the_last_almost_nothing():
    rates = [-get("lightning_attention")(layer=n, layers=5).decay(torch.arange(8), 8) for n in range(5)]
    for n, rate in enumerate(rates):
        torch.testing.assert_close(rate, rates[0] * (1 - n / 4 + 1e-5) / (1 + 1e-5), **EXACT)
    with pytest.raises(ValueError, match="layer 5 is none of 5"):
        get("lightning_attention")(layer=5, layers=5)


def test_blocks_equal_the_masked_form():
    """Forward and gradients; no block divides 150 tokens, and three heads are no power of two."""
    leaves = q, k, v = [torch.randn(2, 3, 150, n, dtype=torch.float64, requires_grad=True) for n in (5, 5, 4)]
    apart = torch.arange(150)[:, None] - torch.arange(150)
    rate = torch.tensor(alibi(3), dtype=torch.float64)[:, None, None] * (0.5 + 1e-5)
    mask = torch.where(apart >= 0, torch.exp(-rate * apart), 0.0)
    masked = (F.silu(q) @ F.silu(k).mT * mask) @ v
    blocks = attention(q, k, v, "lightning_attention", layer=1, layers=3)
    weight = torch.randn_like(masked)
    for one, other in zip(
        [blocks, *torch.autograd.grad(blocks, leaves, weight)],
        [masked, *torch.autograd.grad(masked, leaves, weight)],
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_float32_is_close_to_the_masked_form():
    """1e-4, as the paper's kernels are held to."""
    q, k, v = (torch.randn(1, 4, 300, 16) for _ in range(3))
    wide = attention(q.double(), k.double(), v.double(), "lightning_attention")
    torch.testing.assert_close(attention(q, k, v, "lightning_attention").double(), wide, atol=1e-4, rtol=1e-4)
