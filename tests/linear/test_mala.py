"""MALA's weights, read off with values that are one-hot: how they add up, and what a longer query does to them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads import attention


def inputs(n=12, d=6):
    return torch.randn(2, 3, n, d).double(), torch.randn(2, 3, n, d).double()


def weights(q, k):
    return attention(q, k, torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1), "mala")


def test_rows_sum_to_one_and_may_be_negative():
    q, k = inputs()
    w = weights(5 * q, k)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, 12).double())
    assert w.min() < 0


@pytest.mark.parametrize("c", [1.0, 2.0, 10.0])
def test_a_longer_query_has_sharper_weights(c):
    """w_j = s_j / S + c (s_j - S / n), for a feature that is c times as long: exact, and linear in c."""
    q, k = inputs()
    q = q.abs()  # where the feature is q + 1
    s = (q + 1) @ (F.elu(k) + 1).mT / (12 * 6**0.5)
    total = s.sum(-1, keepdim=True)
    torch.testing.assert_close(weights(c * (q + 1) - 1, k), s / total + c * (s - total / 12))


def test_equals_the_authors_computation():
    """Of their code without rotary positions: a mean of keys, one product of keys and values, a mean of values."""
    q, k = inputs(n=49)
    v = torch.randn(2, 3, 49, 5).double()
    features, keys = F.elu(q) + 1, F.elu(k) + 1
    z = features @ keys.mean(-2, keepdim=True).mT * 6**-0.5
    o = features @ (keys.mT @ v) * (6**-0.5 / 49) * (1 + 1 / z) - z * v.mean(-2, keepdim=True)
    torch.testing.assert_close(attention(q, k, v, "mala"), o)
