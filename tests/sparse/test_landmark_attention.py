"""Landmark attention: rows sum to one, landmarks weigh nothing, retrieval finds a block by its landmark."""

import pytest
import torch

from manyheads import attention
from manyheads.mechanisms.sparse.landmark_attention import with_landmarks
from tests.test_mechanisms import Memory


def weights(q, k, **settings):
    n = k.shape[2]
    return attention(q, k, torch.eye(n, dtype=q.dtype).expand(*k.shape[:2], n, n), "landmark_attention", **settings)


@pytest.mark.parametrize("top_k", [None, 1])
def test_rows_sum_to_one_and_landmarks_have_no_weight(top_k):
    q, k = torch.randn(2, 1, 2, 23, 4, dtype=torch.float64)
    w = weights(q, k, block_size=5, top_k=top_k)
    torch.testing.assert_close(w.sum(-1), torch.ones(1, 2, 23, dtype=torch.float64))
    landmark = torch.arange(23) % 5 == 4
    assert w[..., landmark].eq(0).all() and w.triu(1).eq(0).all()
    blocks = (w[..., :20].unflatten(-1, (4, 5)) > 0).any(-1)[..., 20:, :].sum(-1)
    assert blocks.eq(4 if top_k is None else 1).all()


def test_one_block_of_many_is_retrieved_by_its_landmark():
    """A passkey in block 7 of 32, whose landmark points to what the last query asks for."""
    k = 0.1 * torch.randn(1, 1, 32 * 16, 8)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 30.0
    k[:, :, 7 * 16 + 15, 0] = k[:, :, 7 * 16 + 3, 0] = 2.0
    w = weights(q, k, block_size=16, top_k=2)
    assert w[..., 7 * 16 + 3] > 0.95


def test_landmarks_are_put_behind_full_blocks():
    ids = torch.arange(1, 15).view(2, 7)
    assert with_landmarks(ids, 0, 4).tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7], [8, 9, 10, 0, 11, 12, 13, 0, 14]]
    assert with_landmarks(ids[:, :2], 0, 4).tolist() == [[1, 2], [8, 9]]


def test_memory_is_linear():
    def peak(n):
        q, k, v = torch.randn(3, 1, 1, n, 4, requires_grad=True)
        with Memory() as used:
            attention(q, k, v, "landmark_attention", block_size=64).sum().backward()
        return used.peak

    assert peak(2560) < 2.3 * peak(1280)
