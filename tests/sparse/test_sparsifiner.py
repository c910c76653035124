"""Sparsifiner keeps exactly its budget, and what it has learned to keep is what attention looks at."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import layers
from manyheads.core.maps import attention_map
from manyheads.nn import split


def chosen(module, x):
    """The map of kept keys and the full attention map, [batch, heads, len, len]."""
    q, k = (split(p(x), module.heads) for p in (module.q, module.k))
    there = torch.ones(x.shape[:2], dtype=torch.bool)
    return module.choose(q, k, there), attention_map(q, k, q.shape[-1] ** -0.5).detach()


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.4, 1.0])
def test_every_row_keeps_its_budget_but_that_of_the_class_token(keep):
    """Also where W_up is so sparse that most guesses are 0."""
    module = layers.get("sparsifiner")(dim=12, heads=3, tokens=21, keep=keep, threshold=0.04)
    kept, _ = chosen(module, torch.randn(2, 21, 12))
    assert kept[:, :, 1:].sum(-1).eq(math.ceil(keep * 21)).all() and kept[:, :, 0].all()


def test_it_learns_to_keep_what_attention_looks_at():
    """From the reconstruction alone, on images of which each place holds one of four things and looks at its likes: of
    the mass that any quarter of the keys of an unseen image can hold. A quarter that is the same for all images, the
    best of all such, holds half of it at most."""
    torch.manual_seed(0)
    tokens, heads = 24, 2
    module = layers.get("sparsifiner")(dim=16, heads=heads, tokens=tokens, rank=16, threshold=0.0)
    with torch.no_grad():
        module.k.weight.copy_(module.q.weight)
    things, places = 3 * torch.randn(4, 16), 0.5 * torch.randn(tokens, 16)

    def images(n):
        return places + things[torch.randint(4, (n, tokens))]

    def held(test):
        kept, a = (t[:, :, 1:] for t in chosen(module, test))
        best = a.topk(tokens // 4, -1)
        fixed = torch.zeros_like(a[0]).scatter(-1, a.mean(0).topk(tokens // 4, -1).indices, 1.0)
        return [((a * m).sum(-1).mean() / best.values.sum(-1).mean()).item() for m in (kept, fixed)]

    test = images(64)
    untrained, _ = held(test)
    optimizer = torch.optim.Adam([*module.f_q.parameters(), *module.f_k.parameters(), module.down, module.up], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        module.losses(images(16))["reconstruction"].backward()
        optimizer.step()
    trained, fixed = held(test)
    assert trained > 0.75 and fixed < 0.55 and untrained < 0.4
