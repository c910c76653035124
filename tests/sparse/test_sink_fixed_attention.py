"""Sink fixed attention beside the rolled groups of LongLoRA, and what its heads exchange."""

from __future__ import annotations

import torch

from manyheads import attention, get
from manyheads.core.expressions import EMPTY

ZERO = torch.zeros((), dtype=torch.long)


def rolled(q, k, v, size):
    """Shifted sparse attention as LongLoRA computes it: roll every second head, cut into groups, roll back."""

    def cut(x):
        return torch.stack([h.roll(-size // 2, -2) if n % 2 else h for n, h in enumerate(x.unbind(1))], 1).unflatten(
            2, (-1, size)
        )

    o = torch.nn.functional.scaled_dot_product_attention(cut(q), cut(k), cut(v), is_causal=True).flatten(2, 3)
    return torch.stack([h.roll(size // 2, -2) if n % 2 else h for n, h in enumerate(o.unbind(1))], 1)


def test_without_sinks_and_with_half_of_the_heads_it_is_longloras_but_for_what_wraps_around(make_inputs):
    form = get("sink_fixed_attention")(group_size=6, shifted=2, sinks=0)
    x = make_inputs(form, 24)
    o, theirs = attention(*x.tensors, form), rolled(*x.tensors, 6)
    torch.testing.assert_close(o[:, :, 3:], theirs[:, :, 3:], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(o[:, ::2], theirs[:, ::2], atol=1e-12, rtol=1e-10)
    assert not torch.allclose(o[:, 1::2, :3], theirs[:, 1::2, :3]), "there the first tokens read the last"


def test_one_head_in_four_carries_from_group_to_group():
    """Token 8 opens a group of 8: three heads see it and the sinks alone, the fourth half a group before it."""
    mask = get("sink_fixed_attention")(group_size=8, sinks=2).program.mask
    at = torch.arange(24)
    seen = [mask(ZERO, torch.tensor(h), torch.tensor(8), at).nonzero().flatten().tolist() for h in range(8)]
    alone, carries = [0, 1, 8], [0, 1, 4, 5, 6, 7, 8]
    assert seen == [alone, alone, alone, carries] * 2


def test_tiles_between_groups_are_skipped():
    form = get("sink_fixed_attention")(group_size=1024)
    tiles = form.program.tiles(range(4096), range(4096), (128, 128), 1, 4)
    at = torch.arange(4096)
    seen = form.program.mask(ZERO, torch.arange(4)[:, None, None], at[:, None], at)
    blocks = seen.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)
    assert (tiles[0] != EMPTY).equal(blocks)
    assert blocks.float().mean() < 0.2
