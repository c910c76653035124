"""SpargeAttn: what its means find, and what its guard keeps."""

from __future__ import annotations

import torch

from manyheads import attention, get

SIZES = {"query_block": 8, "key_block": 8}


def kept(q, k, **settings):
    """The map [query blocks, key blocks] of one head."""
    form = get("spargeattn")(**{**SIZES, **settings})
    return form.select(q, k, scale=1.0, offset=0).to_map(k.shape[2] // form.key_block)[0, 0]


def topics(*numbers, noise=0.0):
    """Blocks of 8 tokens, all near one of 8 directions each: [1, 1, len, 8]."""
    x = 4 * torch.eye(8)[list(numbers)].repeat_interleave(8, 0)
    return (x + noise * torch.randn_like(x))[None, None]


def test_finds_the_blocks_of_the_same_topic():
    q, k = topics(0, 1, 2, 3, 1, 2, 0, 1, noise=0.3), topics(0, 1, 2, 3, 4, 2, 0, 1, noise=0.3)
    wanted = {0: [0], 1: [1], 2: [2], 3: [3], 4: [1, 4], 5: [2, 5], 6: [0, 6], 7: [1, 7]}
    keep = kept(q, k, tau=0.9)
    assert {m: keep[m].nonzero().flatten().tolist() for m in wanted} == wanted


def test_blocks_of_unlike_tokens_are_never_left_out():
    """A block of keys, and one of queries, with a token of each topic: a mean would hide the one that matters."""
    q, k = topics(0, 1, 2, 3), topics(0, 1, 2, 3)
    k[0, 0, :8] = 4 * torch.eye(8)
    q[0, 0, 16:24] = 4 * torch.eye(8)
    assert kept(q, k, theta=0.2).tolist() == [[True, False, False, False], [True, True, False, False],
                                              [True, True, True, False], [True, False, False, True]]  # fmt: skip
    assert not kept(q, k, theta=0.1)[1, 0]  # eight directions at right angles have a mean cosine of 1/8


def test_more_mass_comes_closer_to_dense():
    q, k, v = (torch.randn(1, 4, 128, 8) for _ in range(3))
    dense = attention(q, k, v)
    errors = [(attention(q, k, v, "spargeattn", theta=0.0, tau=t, **SIZES) - dense).norm() for t in (0.1, 0.5, 0.9, 1)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-5
