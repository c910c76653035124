"""Combiner: what its weights on keys are, and what they cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads import attention, get

PATTERNS = ["fixed", "log", "axial"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_earlier_key_has_some_weight_and_rows_sum_to_one(pattern):
    q, k = torch.randn(2, 1, 2, 27, 4, dtype=torch.float64)
    eye = torch.eye(27, dtype=torch.float64).expand(1, 2, 27, 27)
    p = attention(q, k, eye, "combiner", pattern=pattern, block_size=5)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, 27, dtype=torch.float64))
    earlier = torch.ones(27, 27, dtype=torch.bool).tril()
    assert (p[..., earlier] > 0).all() and p[..., ~earlier].eq(0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_costs_less_than_dense(pattern):
    """Products counted at 16k tokens, on tensors without memory; those of `log` with keys of spans are sums."""
    n, dim = 16384, 64
    q, k, v = (torch.empty(1, 1, n, dim, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        get("combiner")(pattern=pattern, block_size=128).forward(q, k, v, scale=1.0)
    assert 0 < counter.get_total_flops() < 0.15 * 4 * n * n * dim


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match=r"'fixt' is no pattern of combiner\. Did you mean 'fixed'"):
        get("combiner")(pattern="fixt")
