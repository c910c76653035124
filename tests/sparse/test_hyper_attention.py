"""HyperAttention: hashes in Gray's order, sums without bias, errors that shrink, heavy keys that are found."""

import pytest
import torch

from manyheads import attention
from manyheads.core.builders import hashed
from manyheads.mechanisms.sparse.hyper_attention import directions
from tests.test_mechanisms import Memory


def test_buckets_beside_each_other_differ_in_one_sign():
    signs = torch.tensor([[(n >> bit & 1) * 2.0 - 1 for bit in range(4)] for n in range(16)])
    ranks = hashed(signs[None, None], signs[None, None], torch.eye(4))[0].flatten()
    assert ranks.sort().values.tolist() == list(range(16))
    assert ((signs[ranks.argsort()].diff(dim=0) != 0).sum(1) == 1).all()


def test_directions_are_normal_and_the_same_for_more_channels():
    g = directions(512, 16, 3)
    assert g[:64].equal(directions(64, 16, 3)) and not g.equal(directions(512, 16, 4))
    error = g.numel() ** -0.5
    assert abs(g.mean()) < 4 * error and abs(g.var() - 1) < 4 * 2**0.5 * error


def estimates(q, k, samples, seeds=1000):
    """Of the sum of exp(s) over 64 keys, by one query, in units of the sum: [seeds]. The key of lowest rank is in the
    query's own block whatever is drawn, so its weight is its own e^s over that sum."""
    e = (q @ k.mT * 8**-0.5).exp().flatten()
    found = []
    for seed in range(seeds):
        lowest = hashed(q, k, directions(8, 7, seed))[1].flatten().argsort(stable=True)[0]
        v = torch.zeros(1, 1, 64, 1, dtype=torch.float64)
        v[:, :, lowest] = 1.0
        settings = {"block_size": 8, "samples": samples, "min_len": 1, "causal": False, "draw": seed}
        found.append(e[lowest] / attention(q, k, v, "hyper_attention", **settings).item() / e.sum())
    return torch.stack(found)


def test_sums_have_no_bias_and_errors_shrink_with_the_root_of_the_samples():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 64, 8, dtype=torch.float64)
    few, many = estimates(q, k, 4), estimates(q, k, 64)
    for found in (few, many):
        assert abs(found.mean() - 1) < 3 * found.std() / len(found) ** 0.5
    assert 3.2 < few.std() / many.std() < 4.8


def test_hashes_find_heavy_keys():
    """Each query has one key of its own direction, which holds most of its mass; sampling alone rarely meets it."""
    k = torch.randn(1, 1, 512, 32, dtype=torch.float64)
    q, v = 1.5 * k[:, :, torch.randperm(512)], torch.randn_like(k)
    exact = attention(q, k, v, "full")

    def error(projections):
        settings = {"block_size": 32, "samples": 32, "min_len": 1, "causal": False, "projections": projections}
        return (attention(q, k, v, "hyper_attention", **settings) - exact).norm() / exact.norm()

    assert error(7) < 0.6 * error(1)


def test_short_texts_are_exact_and_hold_no_square_of_scores():
    q, k, v = torch.randn(3, 1, 1, 600, 4, dtype=torch.float64, requires_grad=True)
    with Memory() as used:
        o = attention(q, k, v, "hyper_attention")
        (grad,) = torch.autograd.grad(o.square().sum(), k)
    assert used.largest < 600 * 600 * 8 / 2
    expected = attention(q, k, v, "causal")
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), k)[0])


@pytest.mark.parametrize(("length", "queries"), [(3, 1), (6, 4), (9, 1)])
def test_halves_down_to_single_keys(length, queries):
    """Some parts of a size then have the same queries. Blocks hold all keys, so that it is plain causal attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (queries, length, length))
    o = attention(q, k, v, "hyper_attention", min_len=1, block_size=64)
    torch.testing.assert_close(o, attention(q, k, v, "causal"), rtol=1e-5, atol=1e-5)


def test_what_nobody_differentiates_is_merged_as_it_comes():
    """A query has eleven parts, which are not held together."""
    tensors = *torch.randn(2, 1, 1, 4096, 4), torch.randn(1, 1, 4096, 128)
    settings = {"min_len": 128, "block_size": 16, "samples": 16}
    expected = attention(*(t.clone().requires_grad_() for t in tensors), "hyper_attention", **settings)
    with Memory() as used:
        o = attention(*tensors, "hyper_attention", **settings)
    torch.testing.assert_close(o, expected.detach(), rtol=1e-5, atol=1e-5)
    assert used.peak < 8 * o.numel() * o.element_size()
