"""Audio Mamba's directions: what each variant sees, and that turning a row round turns its outputs round."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads import layers
from manyheads.layers.linear.audio_mamba import VARIANTS, reference
from tests.linear.test_scans import Work


def made(variant, **settings):
    module = layers.get("audio_mamba")(dim=6, variant=variant, state_dim=4, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def test_forward_only_equals_its_reference_and_ignores_the_future():
    module, x = made("fo-fo"), torch.randn(2, 13, 6, dtype=torch.float64)
    before = module(x)
    torch.testing.assert_close(before, reference(module, x), atol=1e-11, rtol=1e-9)
    x[:, 7:] = 10
    torch.testing.assert_close(module(x)[:, :7], before[:, :7], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("present", [False, True])
def test_a_row_turned_round_gives_what_it_gives_turned_round(present):
    """If both directions of bi-bi have the same numbers, with padding in the row, too."""
    module, x = made("bi-bi"), torch.randn(2, 14, 6, dtype=torch.float64)
    module.back.load_state_dict(module.forth.state_dict())
    there = torch.rand(2, 14) < 0.7 if present else None
    turned = module(x.flip(1), present=None if there is None else there.flip(1)).flip(1)
    torch.testing.assert_close(turned, module(x, present=there), atol=1e-11, rtol=1e-9)


def test_a_token_in_the_middle_reads_both_sides_unless_it_looks_back_alone():
    x, far = torch.randn(1, 21, 6, dtype=torch.float64), 9
    for variant in VARIANTS:
        module = made(variant)
        changed = [x.clone(), x.clone()]
        changed[0][:, 10 - far] += 1
        changed[1][:, 10 + far] += 1
        before, after = (module(c)[0, 10].sub(module(x)[0, 10]).abs().max() for c in changed)
        assert before > 1e-12 and (after > 1e-12) == (variant != "fo-fo"), variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_work_is_linear_in_length_where_attention_is_quadratic(variant):
    module = layers.get("audio_mamba")(dim=6, variant=variant, state_dim=4)
    counts, dense = [], []
    for length in (1024, 4096):
        with torch.no_grad(), Work() as work:
            module(torch.randn(1, length, 6))
        counts.append(work.numbers)
        q = torch.empty(1, 1, length, 8, device="meta")
        with FlopCounterMode(display=False) as flops:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        dense.append(flops.get_total_flops())
    assert counts[1] < 4.1 * counts[0] and dense[1] == 16 * dense[0]
