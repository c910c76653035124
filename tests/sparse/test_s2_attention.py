"""What S2-attention promises: heads cover the past together, what one drops stays dropped, stripes skip tiles."""

from __future__ import annotations

import pytest
import torch

from manyheads import get
from manyheads.core.expressions import EMPTY

ZERO = torch.zeros((), dtype=torch.long)


def masks(form, heads, length):
    at = torch.arange(length)
    return form.program.mask(ZERO, torch.arange(heads)[:, None, None], at[:, None], at).expand(heads, length, length)


@pytest.mark.parametrize(("stride", "group"), [(8, 1), (4, 2), (1, 3)])
def test_as_many_heads_as_the_stride_see_the_whole_past_and_no_fewer_do(stride, group):
    seen = masks(get("s2_attention")(block_size=3, local_blocks=1, stride=stride, group=group), stride * group, 60)
    assert seen.any(0)[-1].all()
    assert not seen[:-group].any(0)[-1].all()
    for first in range(0, stride * group, group):
        assert seen[first : first + group].eq(seen[first]).all(), "query heads of a key head share its stripes"


def test_fewer_heads_than_the_stride_spread_evenly():
    """Four heads, one block in 8 each: every second block is some head's."""
    seen = masks(get("s2_attention")(block_size=1, local_blocks=1, stride=8, step=2), 4, 17)
    assert seen.any(0)[-1].nonzero().flatten().tolist() == [*range(0, 17, 2)]
    assert seen[:, -1, :16].sum(-1).eq(2).all()


def test_a_key_that_was_dropped_is_never_read_again():
    """So a cache may free its place: between a key's own block and the end, a head's column changes at most once."""
    seen = masks(get("s2_attention")(block_size=2, local_blocks=3, stride=4), 4, 40)
    for j in range(40):
        column = seen[:, j:, j].int()
        assert (column.diff(dim=-1) <= 0).all()


def test_a_cache_holds_the_recent_blocks_and_one_in_stride_of_the_others():
    seen = masks(get("s2_attention")(block_size=2, local_blocks=4, stride=4), 4, 2 * 32)
    assert seen[:, -1].sum(-1).tolist() == [2 * (4 + (32 - 4) // 4)] * 4


def test_dense_heads_come_last():
    form = get("s2_attention")(block_size=2, local_blocks=1, stride=4, group=2, sparse_heads=3)
    seen, past = masks(form, 8, 20), torch.ones(20, 20, dtype=torch.bool).tril()
    assert [bool(head.equal(past)) for head in seen] == [False] * 6 + [True] * 2


def test_tiles_between_stripes_are_skipped():
    """Blocks of a tile's size: as many tiles are left as the pattern has blocks, without a mask being built."""
    form = get("s2_attention")(block_size=128, local_blocks=2, stride=8)
    tiles = form.program.tiles(range(128 * 32), range(128 * 32), (128, 128), 1, 8)
    blocks = masks(form, 8, 128 * 32)[:, 127::128, ::128]
    assert (tiles[0] != EMPTY).equal(blocks)
    assert (tiles != EMPTY).float().mean() < 0.12
