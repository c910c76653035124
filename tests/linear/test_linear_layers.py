"""What all layers around states, scans and long convolutions must do beyond tests/test_layers.py."""

from __future__ import annotations

import pytest
import torch

from manyheads import layers

NAMES = ("audio_mamba", "chela", "hymba", "mega", "s4d")
CASES = [(name, dict(settings)) for name in NAMES for settings in layers.get(name).examples]
cases = pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")


def made(name, settings, dtype=torch.float64):
    module = layers.get(name)(**settings).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@cases
def test_a_row_with_gaps_equals_the_row_without(name, settings):
    """Tokens that are away in the middle: neighbours close up."""
    module, present = made(name, settings), torch.rand(3, 17) < 0.6
    x = torch.randn(3, 17, settings["dim"], dtype=torch.float64)
    x[~present] = torch.nan
    out = module(x, present=present)
    assert out[~present].eq(0).all()
    for b in range(3):
        torch.testing.assert_close(out[b, present[b]], module(x[b, present[b]][None])[0], atol=1e-11, rtol=1e-9)


@cases
def test_autocast_rounds_products_of_matrices_and_no_more(name, settings):
    """Over 300 tokens, to four roundings of the greatest number: what decays is not among what is rounded."""
    module = layers.get(name)(**settings)
    x = torch.randn(2, 300, settings["dim"])
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x)
        rounded.square().sum().backward()
    assert (rounded - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_is_one_graph_to_a_compiler(name):
    module = layers.get(name)(**layers.get(name).examples[0])
    x = torch.randn(2, 9, layers.get(name).examples[0]["dim"])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
