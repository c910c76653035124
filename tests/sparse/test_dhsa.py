"""DHSA: where it cuts, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from manyheads import get
from manyheads.mechanisms.sparse.dhsa import _chunk_numbers

SIZES = {"query_block": 8, "chunk_size": 8, "local": 8, "first": 4, "instruction": 0}


def kept(q, k, **settings):
    """The map [heads, query blocks, keys], for queries at the end of k."""
    form = get("dhsa")(**{**SIZES, **settings})
    chosen = form.select(q, k, scale=1.0, offset=k.shape[2] - q.shape[2])
    return chosen.to_map(-(-k.shape[2] // form.key_block))[0]


def pieces(*lengths):
    """Runs of keys of these lengths, each near a direction of its own: [1, 1, n, 16]."""
    directions = torch.linalg.qr(torch.randn(16, 16)).Q[: len(lengths)]
    runs = directions.repeat_interleave(torch.tensor(lengths), 0)
    return (4 * runs + 0.2 * torch.randn_like(runs))[None, None]


def test_cuts_where_keys_change():
    torch.manual_seed(0)
    lengths = [11, 30, 17, 13, 25]
    numbers = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    assert _chunk_numbers(pieces(*lengths), 24)[0].tolist() == numbers.tolist()
    assert _chunk_numbers(pieces(4, 4), 4)[0].tolist() == [0] * 4 + [1] * 4
    assert _chunk_numbers(pieces(4, 3), 4)[0].tolist() == [0] * 7, "a side of a boundary has four keys"


def test_cuts_at_least_nine_keys_apart_and_no_more_often_than_asked():
    torch.manual_seed(0)
    k = torch.randn(2, 3, 400, 5)
    for size in (4, 20, 100):
        ends = _chunk_numbers(k, size).diff(dim=-1)
        assert ends.unique().tolist() == [0, 1] and (ends.sum(-1) <= 400 // size).all()
        for row in ends:
            assert row.nonzero().flatten().diff().min() > 8


def test_keeps_the_chunk_that_is_asked_for():
    torch.manual_seed(0)
    k = pieces(20, 20, 20, 20, 32)
    q = k[:, :, 45:46].expand(-1, -1, 8, -1)
    found = kept(q, k, keys=4 + 8 + 20, chunk_size=20)[0, 0].nonzero().flatten().tolist()
    assert found == [*range(4), *range(40, 60), *range(104, 112)]


def test_counts_its_budget_and_shares_it_between_heads():
    q, k = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 200, 8)
    keep = kept(q, k, keys=50)
    assert keep.sum(-1).eq(50).all() and keep[:1].expand_as(keep).equal(keep)
    assert keep[:, :, :4].all() and kept(q, k, keys=1).sum(-1).eq(12).all()
    whole = kept(q, k, keys=50, instruction=9).sum(-1)
    assert whole[0].tolist() == [50, 50, 50, 192, 200]
    for n in (1, 9):
        assert kept(q[:, :, -n:], k, keys=50, instruction=9).sum(-1).eq(50).all()


def test_a_grain_moves_boundaries_to_its_multiples():
    torch.manual_seed(0)
    numbers = torch.arange(5).repeat_interleave(torch.tensor([3, 7, 5, 3, 6]))  # 11, 41, 58, 71 to 12, 40, 60, 72
    assert _chunk_numbers(pieces(11, 30, 17, 13, 25), 24, 4)[0].tolist() == numbers.tolist()


def test_counts_its_budget_in_grains():
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 200, 8)
    keep = kept(q, k, keys=50, grain=4).sum(-1)
    assert keep.eq(52 // 4).all()
    assert kept(q, k, keys=1, grain=4).sum(-1).eq((8 + 4) // 4).all()
    whole = kept(q, k, keys=50, instruction=9, grain=4).sum(-1)
    assert whole[0].tolist() == [13, 13, 13, 48, 50]
    with pytest.raises(ValueError, match="grain 3 must divide query_block 8"):
        kept(q, k, grain=3)


def test_lists_are_as_short_as_the_budget():
    """A long prompt's memory is linear in it."""
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 4096, 8)
    form = get("dhsa")(**{**SIZES, "keys": 64, "grain": 4})
    blocks = form.select(q, k, scale=1.0, offset=4032)
    assert blocks.indices.shape == (1, 2, 8, 16) and blocks.indices.stride(1) == 0, "heads share one list"
