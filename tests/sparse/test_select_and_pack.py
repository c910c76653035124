"""Select and pack attention: images do not see each other, what is not kept costs nothing, gates learn from labels."""

from __future__ import annotations

import pytest
import torch

from manyheads import layers
from manyheads.core.expressions import EMPTY
from manyheads.layers.sparse.select_and_pack import TOGETHER


def made(**settings):
    module = layers.get("select_and_pack")(dim=8, heads=2, **settings).double().eval()
    with torch.no_grad():
        module.gate.weight.normal_()
    return module


def test_no_image_hangs_on_another():
    module, x = made(container=3), torch.randn(3, 20, 8, dtype=torch.float64, requires_grad=True)
    y = module(x)
    for n in range(3):
        (grad,) = torch.autograd.grad(y[n].square().sum(), x, retain_graph=True)
        assert grad[n].abs().sum() > 0 and grad[torch.arange(3) != n].eq(0).all()
        torch.testing.assert_close(module(x[n : n + 1])[0], y[n], atol=1e-12, rtol=1e-10)


def test_containers_of_an_image_do_not_see_each_other():
    module, x = made(container=4), torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    kept = (module.scores(x)[0] > 0).nonzero().flatten()
    assert len(kept) > 8
    (grad,) = torch.autograd.grad(module(x)[0, kept[4:8]].sum(), x)
    assert grad[0].abs().sum(-1).nonzero().flatten().equal(kept[4:8])


def test_what_is_not_kept_is_not_computed_and_passes_by():
    module, x = made(), torch.randn(2, 50, 8, dtype=torch.float64)
    kept, seen = module.scores(x) > 0, []
    module.qkv.register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    y = module(x)
    assert seen == [(int(kept.sum()), 8)] and 0 < kept.sum() < 80
    assert y[~kept].eq(0).all() and y[kept].ne(0).all()


def test_padding_is_never_kept():
    module, x = made(container=3), 10 * torch.randn(2, 30, 8, dtype=torch.float64)
    present = (torch.arange(30) < 21).expand(2, -1)
    assert (module.scores(x) > 0)[~present].any()
    y = module(x, present=present)
    assert y[~present].eq(0).all()
    torch.testing.assert_close(y[:, :21], module(x[:, :21]), atol=1e-12, rtol=1e-10)


def test_tiles_between_containers_are_skipped():
    """Four images that keep 600, 0, 30 and 100 of 1000 tokens: 730 tokens, containers of 128."""
    module = made(container=128)
    kept = torch.arange(1000) < torch.tensor([600, 0, 30, 100])[:, None]
    place = module.places(kept)[kept]
    assert place.unique_consecutive(return_counts=True)[1].tolist() == [128] * 4 + [88, 30, 100]
    tiles = TOGETHER.program.tiles(range(730), range(730), (128, 128), place=place[None])
    assert (tiles != EMPTY).sum() == 4 + 4  # four whole containers; what is left shares two tiles


def test_scores_of_the_stage_above_keep_what_it_kept():
    module, x = made(), torch.randn(1, 30, 8, dtype=torch.float64)
    own = module.scores(x)
    least = int(own.argmin())
    above = torch.where(torch.arange(30) == least, 9.0, -99.0).double()[None]
    assert module(x)[0, least].eq(0).all() and module(x, above)[0, least].ne(0).all()
    assert module.scores(x, above)[0, least] == 9
    assert module(x, torch.full_like(own, -99.0)).equal(module(x))


@pytest.mark.parametrize("score", [-1.0, 0.0, 2.0])
def test_training_draws_with_the_probability_that_the_gate_gives(score):
    """Of 4000 tokens; four standard errors are 0.032 at most."""
    module, x = made().train(), torch.zeros(4, 1000, 8, dtype=torch.float64)
    with torch.no_grad():
        module.gate.bias.fill_(score)
        module.o.bias.fill_(1.0)
    share = module(x).ne(0).all(-1).double().mean()
    assert abs(share - torch.tensor(score).sigmoid()) < 0.032
    assert not module(x).eq(0).equal(module(x).eq(0)) and module.eval()(x).equal(module(x))


def test_in_training_a_gate_learns_straight_through_the_choice():
    """One kept token attends to itself: y = W g + c, so that dy/ds = W x (sigmoid' + sigmoid sigmoid')."""
    module, x = made(noise=0.0), torch.randn(1, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        module.gate.bias.fill_(1.0)
        module.gate.weight.zero_()
    share = torch.tensor(1.0).double().sigmoid()
    slopes = []
    for mode in (False, True):
        module.train(mode)
        slopes.append(torch.autograd.grad(module(x).sum(), module.gate.bias)[0])
    torch.testing.assert_close(slopes[1], slopes[0] * (1 + share))


def test_labels_teach_the_gate_which_tokens_to_keep():
    """Objects have something that no other token has; of all tokens a new gate keeps about half."""
    torch.manual_seed(0)
    module, mark = made(), torch.randn(8, dtype=torch.float64)
    labels = (torch.arange(40) % 7 == 0).double().expand(16, -1)
    x = torch.randn(16, 40, 8, dtype=torch.float64) + 2 * labels[..., None] * mark
    optimizer = torch.optim.Adam(module.gate.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        module.selection_loss(x, labels).backward()
        optimizer.step()
    kept = module.scores(x) > 0
    assert (kept == labels.bool()).double().mean() > 0.97
    there = torch.arange(40) < 21
    alone = module.selection_loss(x[:, :21], labels[:, :21])
    torch.testing.assert_close(module.selection_loss(x, labels, present=there.expand(16, -1)), alone)
