"""SSA: its two modes, and what draws them together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.layers.sparse.ssa import SSA, draw_mode


def test_a_step_has_one_mode_for_the_whole_model():
    model = nn.Sequential(SSA(8, 2), nn.Sequential(SSA(8, 2), nn.Linear(8, 8)))
    drawn = []
    for _ in range(200):
        draw_mode(model)
        assert model[0].mode == model[1][0].mode
        drawn.append(model[0].mode)
    assert 70 < drawn.count("full") < 130 and set(drawn) == {"full", "sparse"}


def test_a_larger_budget_comes_closer_to_full_attention():
    torch.manual_seed(0)
    x, losses = torch.randn(1, 96, 16), []
    for top_k in (2, 4, 8, 24):
        torch.manual_seed(1)
        losses.append(SSA(16, 4, kv_heads=2, block_size=4, top_k=top_k).losses(x)["alignment"].item())
    assert losses[0] > losses[1] > losses[2] > losses[3] and losses[3] < 1e-12


def test_the_loss_alone_aligns_the_modes():
    """Each term passes a gradient to one mode, and a few steps bring them closer."""
    module, x = SSA(16, 2, block_size=4, top_k=2), torch.randn(4, 40, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = module.losses(x)["alignment"].item()
    for _ in range(10):
        optimizer.zero_grad()
        module.losses(x)["alignment"].backward()
        optimizer.step()
    assert module.losses(x)["alignment"].item() < 0.5 * before


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="'dense' is no mode"):
        SSA(8, 2, mode="dense")
    with pytest.raises(ValueError, match="top_k counts a query's own block and must be at least 2, not 1"):
        SSA(8, 2, top_k=1)
