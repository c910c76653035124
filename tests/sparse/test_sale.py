"""SALE: what four bits find, and what they may miss."""

from __future__ import annotations

import torch

from manyheads import attention, get
from manyheads.core.low_bits import four_bits

SIZES = {"query_block": 8, "key_block": 8, "sink": 8, "local": 16, "dense_len": 0}


def kept(q, k, **settings):
    """The map [query blocks, key blocks] of one head, for queries at the end of k."""
    form = get("sale")(**{**SIZES, **settings})
    chosen = form.select(q, k, scale=q.shape[-1] ** -0.5, offset=k.shape[2] - q.shape[2])
    return chosen.to_map(-(-k.shape[2] // form.key_block))[0, 0]


def test_four_bits_are_fifteen_steps():
    x = torch.tensor([[7.0, -6.6, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0], [-14.0, 0.9, 1.1, 13.1]])
    steps, size = four_bits(x)
    assert (steps * size).tolist() == [[7, -7, 0, 1], [0, 0, 0, 0], [-14, 0, 2, 14]]


def test_finds_a_single_key():
    """One key of 256 that one query of its block likes; sink and window stay whatever they hold."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8, 32), torch.randn(1, 1, 256, 32)
    assert kept(q, k, tau=2.0)[0].nonzero().flatten().tolist() == [0, 30, 31]
    k[0, 0, 101] = 2 * q[0, 0, 5]
    assert kept(q, k, tau=2.0)[0].nonzero().flatten().tolist() == [0, 12, 30, 31]
    k[0, 0, 101] *= -1
    assert not kept(q, k, tau=2.0)[0, 12]


def test_what_all_keys_share_does_not_matter():
    """Softmax does not see it, nor do four bits that stand for what is left: a block is as good as before."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 256, 32)
    assert kept(q, k + 50 * torch.randn(32), tau=0.2).equal(kept(q, k, tau=0.2))


def test_a_lower_tau_keeps_more_and_comes_closer_to_dense():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 32) for _ in range(3))
    dense, errors, shares = attention(q, k, v), [], []
    for tau in (1.0, 0.3, 0.1, 0.0):
        errors.append((attention(q, k, v, "sale", tau=tau, **SIZES) - dense).norm().item())
        shares.append(kept(q, k, tau=tau).float().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    assert shares == sorted(shares) and shares[0] < 0.5 * shares[-1]


def test_short_prompts_are_dense():
    q, k = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 256, 8)
    assert kept(q, k, tau=99.0, dense_len=64).tolist() == kept(q, k, tau=0.0).tolist()
    assert kept(q, k, tau=99.0, dense_len=63).sum(-1).eq(3).all()
