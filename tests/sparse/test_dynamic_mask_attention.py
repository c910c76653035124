"""Dynamic mask attention: which keys it keeps, what it learns, what it holds."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention
from manyheads.nn import Attention


def seen(t, window, a=1.0):
    """The keys that each query looks at, read off a value for each key."""
    n = len(t)
    q, v = torch.zeros(1, 1, n, 4), torch.eye(n)[None, None]
    o = attention(q, q, v, "dynamic_mask_attention", window=window, t=torch.tensor(t)[None, None], a=torch.tensor([a]))
    return [row.nonzero().flatten().tolist() for row in o[0, 0]]


def test_keeps_what_matters_most_so_far():
    assert seen([0.5, 3.0, 1.0, 2.0, 0.1], 2) == [[0], [0, 1], [1, 2], [1, 3], [1, 3]]


def test_of_equal_keys_the_later_one_stays():
    assert seen([1.0] * 5, 2) == seen([9.0, 1.0, 5.0, 2.0, 3.0], 2, a=0.0)
    assert seen([1.0] * 5, 2) == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]


def test_a_layer_learns_what_matters():
    """The bias passes gradients to both of its factors once a has left 0."""
    layer = Attention(8, 2, "dynamic_mask_attention", window=3)
    with torch.no_grad():
        layer.operands["a"].weight += 1
    layer(torch.randn(2, 12, 8)).square().sum().backward()
    for source in (layer.operands["a"].weight, layer.operands["t"].weight.weight):
        assert source.grad.abs().sum() > 0


@pytest.mark.parametrize("n", [127, 128, 129, 300])
def test_runs_of_queries_meet_without_a_seam(n):
    q, k, v, t = torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4), torch.rand(1, 1, n)
    whole = attention(q, k, v, "dynamic_mask_attention", window=9, t=t, a=torch.ones(1))
    last = attention(q[:, :, -5:], k, v, "dynamic_mask_attention", window=9, t=t, a=torch.ones(1))
    torch.testing.assert_close(whole[:, :, -5:], last)
