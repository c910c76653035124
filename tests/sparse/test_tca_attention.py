"""TCA-Attention: which keys stay, and in which heads."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, get

SIZES = {"block_size": 8, "window": 8}


def kept(likes, **settings):
    """The keys that the last query keeps, of keys that it likes that much: bool [heads, n]."""
    k = likes[None, :, :, None]
    form = get("tca_attention")(**{**SIZES, **settings})
    q = torch.ones(1, len(likes), 1, 1)
    return form.select(q, k, scale=1.0, offset=likes.shape[1] - 1).to_map(likes.shape[1])[0, :, -1]


def test_a_block_with_one_peak_keeps_it_alone():
    """One key holds nearly all of every other block. Of 16 blocks 9 keep one key, 6 keep two, one keeps four."""
    likes = torch.zeros(1, 128)
    likes[0, 3:112:16] = 6.0
    keep = kept(likes, tau=0.7)[0, :112].view(14, 8)
    assert keep[0::2].sum(-1).tolist() == [1] * 7 and keep[0::2, 3].all()
    assert keep[1::2].sum(-1).tolist() == [1, 1, 2, 2, 2, 2, 2]


def test_each_head_keeps_what_it_needs():
    torch.manual_seed(0)
    likes = torch.randn(2, 256) * torch.tensor([[6.0], [0.5]])
    peaked, flat = kept(likes, tau=0.8).sum(-1).tolist()
    assert peaked < 0.4 * flat
    assert kept(likes, tau=1.0).all()


def test_holds_tau_of_the_attention():
    torch.manual_seed(0)
    likes = 2 * torch.randn(4, 256)
    mass, before = likes.softmax(-1), 0
    for tau in (0.3, 0.6, 0.9, 0.95):
        keep = kept(likes, tau=tau)
        assert ((mass * keep).sum(-1) >= tau).all() and keep.sum() >= before
        before = keep.sum()


def test_scores_far_apart_are_no_trouble():
    """exp of most of these is 0 in float32."""
    likes = torch.linspace(0, 4000, 64)[None]
    assert kept(likes, tau=0.9)[0, -1] and kept(likes, tau=0.9).sum() < 64
    assert kept(likes, tau=1.0).all()


def test_block_size_is_a_power_of_2():
    with pytest.raises(ValueError, match="block_size must be a power of 2, not 12"):
        attention(*(torch.randn(1, 1, 4, 2) for _ in range(3)), "tca_attention", block_size=12)
