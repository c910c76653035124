"""Sparse-vDiT: its search finds the modes that were planted in heads, and heads skip the tiles of their modes."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, get
from manyheads.core.expressions import EMPTY
from manyheads.mechanisms.sparse.sparse_vdit import MODES, search

VIDEO = {"frame": 128, "frames": 8, "reach": 64, "stripes": (5,)}
N = 1024


def near(x, reach):
    """Features whose products fall off as exp(-(x_i - x_j)^2 / (2 reach^2)), [len, 64]."""
    wave = torch.randn(32) / reach * x[:, None]
    return torch.cat([wave.cos(), wave.sin()], -1) * 32**-0.5


def planted(prompt):
    """q, k, v of five heads, one of each mode, on other values for each prompt."""
    torch.manual_seed(prompt)
    at = torch.arange(N)
    striped = torch.where(at // 128 == 5, 1.0, -1.0)[:, None] * torch.ones(64) / 8
    queries = {
        "full": torch.randn(N, 64),
        "skip": torch.randn(N, 64),
        "diagonal": near(at, 4.0),
        "multi_diagonal": near(at % 128, 1.0),
        "vertical_stripe": torch.ones(N, 64) / 8,
    }
    keys = {**queries, "full": torch.randn(N, 64), "vertical_stripe": striped}
    v = 4 * torch.randn(5, N, 64)
    v[MODES.index("skip")] *= 0.01
    sharp = 8 * 300.0
    return sharp * torch.stack([queries[m] for m in MODES])[None], torch.stack([keys[m] for m in MODES])[None], v[None]


def test_the_search_finds_what_was_planted_and_finds_it_again_in_another_prompt():
    for prompt in range(2):
        assert search(*planted(prompt), attention, **VIDEO) == MODES


def test_the_search_skips_more_heads_the_more_error_it_allows():
    q, k, v = planted(0)
    sparse = [sum(m != "full" for m in search(q, k, v, attention, limit=e, **VIDEO)) for e in (0, 0.01, 0.1, 1, 100)]
    assert sparse == [0, 1, 2, 4, 5]
    assert search(q, k, v, attention, limit=100.0, penalty=1e6, **VIDEO) == ("skip",) * 5


def test_each_head_skips_the_tiles_of_its_mode():
    """Frames of 8 tiles. Bands of one tile to either side; p moves a tile by 8 places, so within 1024 two at most."""
    form = get("sparse_vdit")(modes=MODES, frame=1024, frames=8, reach=128, stripes=(5, 6))
    tiles = form.program.tiles(range(8192), range(8192), (128, 128), 1, 5)
    computed = (tiles[0] != EMPTY).sum((-2, -1)).tolist()
    assert computed == [64 * 64, 0, 64 + 2 * 63, 64 * 3 * 8 - 2 * 64, 64 * 2]


def test_heads_that_share_a_call_get_what_each_gets_alone(make_inputs):
    form = get("sparse_vdit")(modes=MODES, frame=4, frames=3, reach=2, stripes=(1,), stripe_size=3)
    x = make_inputs(form, 14, heads=5)
    together = attention(*x.tensors, form)
    for h, mode in enumerate(MODES):
        alone = get("sparse_vdit")(modes=(mode,), frame=4, frames=3, reach=2, stripes=(1,), stripe_size=3)
        one = attention(*(t[:, h : h + 1] for t in x.tensors), alone)
        torch.testing.assert_close(together[:, h : h + 1], one, atol=1e-13, rtol=1e-12)  # the same sums, in float64


def test_an_unknown_mode_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'vertical_stripe'"):
        get("sparse_vdit")(modes=("vertical_stripes",))
