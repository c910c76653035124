"""L2ViT: which tokens share a window, what bounds the divisor, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads.layers.linear.l2vit import L2ViT, windows


def test_windows_are_squares_of_the_image():
    """3 x 5 tokens in windows of 2 x 2, the last ones cut off."""
    assert windows(3, 5, 2).tolist() == [
        [0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1], [10, 11, -1, -1], [12, 13, -1, -1], [14, -1, -1, -1],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["global", "local"])
def test_a_full_image_needs_no_padding_and_gets_the_same(kind):
    """4 x 6 tokens, of which no word says what is there, and where one does. Windows of 4 x 4 go beyond the image."""
    module = L2ViT(8, 2, kind=kind, width=6, window=4, kernel=3).double().eval()
    x = torch.randn(2, 24, 8).double()
    torch.testing.assert_close(module(x), module(x, present=torch.ones(2, 24, dtype=torch.bool)))


def test_padding_changes_nothing_in_training():
    """Batch normalisation counts what is there."""
    module = L2ViT(8, 2, width=4, kernel=3).double()
    x, garbage = torch.randn(2, 11, 8).double(), torch.full((2, 5, 8), 1e3).double()
    present = torch.arange(16).expand(2, -1) < 11
    torch.testing.assert_close(module(torch.cat([x, garbage], 1), present=present)[:, :11], module(x))


def test_local_attention_stays_in_its_window_and_global_attention_does_not():
    """A change in a corner; the convolution for positions takes it one token further."""
    x, moved = torch.randn(1, 64, 8).double(), {}
    changed = x.clone()
    changed[:, 0] += 1
    for kind in ("local", "global"):
        module = L2ViT(8, 2, kind=kind, width=8, window=4, concentrate=False).double()
        moved[kind] = (module(x) != module(changed)).any(-1).view(8, 8)
    assert moved["global"].all()
    assert moved["local"][:4, :4].all() and moved["local"].sum() == 16


def test_the_divisor_is_bounded():
    """Few tokens are below the bound of 100 and are damped, which is undone by the temperature alone; many are above
    it, and twice as many of the same are the same."""
    module = L2ViT(8, 2, width=4).double()
    q, k, v = (torch.randn(1, 2, 16, 4).double() for _ in range(3))
    w = q.relu() @ k.relu().mT
    assert w.sum(-1).max() < 100
    torch.testing.assert_close(module._global(q, k, v, None), w @ v / 100 * 0.5)
    many = module._global(30 * q, k, v, None)
    above = (30 * w).sum(-1) > 100
    assert above.any() and not above.all()
    twice = module._global(30 * q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), None)
    torch.testing.assert_close(many[above], twice[above])
    torch.testing.assert_close(many[above], ((w / w.sum(-1, keepdim=True)) @ v * 0.5)[above])


@pytest.mark.parametrize("kind", ["global", "local"])
def test_four_times_the_tokens_cost_four_times_as_much(kind):
    costs = []
    for side in (14, 28):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            L2ViT(16, 2, kind=kind, width=side).eval()(torch.randn(1, side * side, 16))
        costs.append(counter.get_total_flops())
    assert costs[1] == 4 * costs[0]


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="'globl' is no kind of L2ViT's attention"):
        L2ViT(8, 2, kind="globl")
    with pytest.raises(ValueError, match="kernel 4 must be odd"):
        L2ViT(8, 2, kernel=4)
    with pytest.raises(ValueError, match="dim 8 is not a multiple of heads 3"):
        L2ViT(8, 3)
