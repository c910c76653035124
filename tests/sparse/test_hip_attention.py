"""HiP attention: what its tournament finds, and where it must fail."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, get

SIZES = {"top_k": 16, "query_block": 4, "key_block": 2}


def kept(q, k, **settings):
    """The map [query blocks, key blocks] of one head, for queries at the end of k."""
    form = get("hip_attention")(**{**SIZES, **settings})
    chosen = form.select(q, k, scale=1.0, offset=k.shape[2] - q.shape[2])
    return chosen.to_map(-(-k.shape[2] // form.key_block))[0, 0]


def smooth(n, rho):
    """Keys that remember the one before: [1, 1, n, 16]."""
    x = torch.randn(n, 16)
    for j in range(1, n):
        x[j] = rho * x[j - 1] + (1 - rho**2) ** 0.5 * x[j]
    return x[None, None]


def recall(k):
    """How much of the mass that the best 64 of 1024 keys hold is held by the 64 that HiP keeps, for single queries."""
    shares = []
    for _ in range(20):
        q = 2 * torch.randn(1, 1, 1, 16)
        mass = (q @ k.mT).softmax(-1).flatten()
        found = kept(q, k, top_k=62, query_block=1)[0].repeat_interleave(2)
        shares.append((mass[found].sum() / mass.topk(64).values.sum()).item())
    return sum(shares) / len(shares)


def test_finds_keys_as_far_as_neighbours_are_alike():
    torch.manual_seed(0)
    alike, unlike = recall(smooth(1024, 0.98)), recall(smooth(1024, 0.0))
    assert alike > 0.9 and unlike < 0.6


def test_follows_a_gradient_to_its_top():
    """Scores that rise towards one key: each round keeps the half that it is in."""
    j = torch.arange(512.0)
    for top in (3, 100, 257, 500):
        k = -(j - top).abs()[None, None, :, None]
        keep = kept(torch.ones(1, 1, 1, 1), k, top_k=2, query_block=1)[0]
        assert keep.nonzero().flatten().tolist() == [top // 2, 255]


def test_plays_until_no_chunk_is_longer_than_a_block():
    """The 17 keys before the last query are chunks of 4, 4, 4 and 5: the last one needs a third round."""
    for top in range(17):
        k = -(torch.arange(18.0) - top).abs()[None, None, :, None]
        assert kept(torch.ones(1, 1, 1, 1), k, top_k=4, query_block=1, key_block=1)[0, top]


def test_keeps_top_k_keys_beside_the_own_block():
    q, k = torch.randn(1, 1, 41, 8), torch.randn(1, 1, 101, 8)
    keep = kept(q, k)
    past = torch.arange(51) < 2 * (torch.arange(len(keep)) + 15)[:, None]
    assert (keep & past).sum(-1).eq(8).all() and (keep & ~past).sum(-1).tolist() == [2] * 10 + [1]


def test_of_a_block_that_has_begun_the_first_query_that_is_there_is_scored():
    """A step of decoding chooses for itself, wherever it stands in its block."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 103, 8)
    assert kept(q, k, query_stride=4).equal(kept(q, k))


def test_some_key_of_a_block_is_scored():
    with pytest.raises(ValueError, match="key_stride 3"):
        get("hip_attention")(key_block=2, key_stride=3)


def test_single_queries_ignore_the_future():
    q, k, v = (torch.randn(1, 2, 60, 8) for _ in range(3))
    before = attention(q, k, v, "hip_attention", top_k=8, query_block=1, key_block=2)
    for x in (q, k, v):
        x[:, :, 41:] = 100 * torch.randn_like(x[:, :, 41:])
    after = attention(q, k, v, "hip_attention", top_k=8, query_block=1, key_block=2)
    torch.testing.assert_close(before[:, :, :41], after[:, :, :41])
    assert not torch.allclose(before[:, :, 41:], after[:, :, 41:])


def test_more_keys_come_closer_to_dense():
    q, k, v = torch.randn(1, 2, 96, 8), torch.randn(1, 2, 96, 8), torch.randn(1, 2, 96, 8)
    dense = attention(q, k, v)
    errors = [
        (attention(q, k, v, "hip_attention", **{**SIZES, "top_k": n}) - dense).norm() for n in (2, 16, 48, 96)
    ]  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-5
