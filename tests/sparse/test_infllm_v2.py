"""InfLLM-V2: what its choice keeps."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, get

SMALL = {"block_size": 8, "window": 16, "kernel": 4, "stride": 2, "dense_len": 0}


def kept(q, k, **settings):
    """The blocks [batch, heads, queries, blocks] that queries at the end of k see."""
    form = get("infllm_v2")(**{**SMALL, **settings})
    chosen = form.select(q, k, scale=q.shape[-1] ** -0.5, offset=k.shape[2] - q.shape[2])
    return chosen.to_map(-(-k.shape[2] // form.key_block))


def test_finds_planted_keys():
    """Four equal keys far back, which one mean holds, draw their block in; no other settings of them do."""
    torch.manual_seed(0)
    k = 0.1 * torch.randn(1, 1, 160, 16)
    q = torch.nn.functional.normalize(torch.randn(1, 1, 1, 16), dim=-1) * 8
    k[:, :, 74:78] = q
    assert kept(q, k, top_k=2)[0, 0, 0].nonzero().flatten().tolist() == [0, 9, 18, 19]
    k[:, :, 74:78] = -q
    assert not kept(q, k, top_k=2)[0, 0, 0, 9]


def test_a_mean_speaks_for_every_block_that_it_overlaps():
    """The keys 70 to 73 lie in blocks 8 and 9: of two equally good blocks the first comes first."""
    k, q = torch.zeros(1, 1, 160, 4), torch.ones(1, 1, 1, 4)
    k[:, :, 70:74] = 5.0
    assert kept(q, k, top_k=3)[0, 0, 0].nonzero().flatten().tolist() == [0, 8, 9, 18, 19]
    assert kept(q, k, top_k=2)[0, 0, 0].nonzero().flatten().tolist() == [0, 8, 18, 19]


@pytest.mark.parametrize(("group", "alike"), [(None, True), (4, True), (2, True), (1, False)])
def test_heads_that_share_a_key_head_choose_together(group, alike):
    q, k = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 160, 8)
    blocks = kept(q, k, top_k=4, group=group)
    assert blocks[:, 0].equal(blocks[:, 1]) == alike
    assert blocks[:, 1].equal(blocks[:, 2]) == (group == 4)


def test_keeps_as_many_blocks_as_the_paper():
    """64 and those of the window: 96 of 64 keys, or 6144."""
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 9000, 4)
    form = get("infllm_v2")()
    assert form.select(q, k, scale=0.5, offset=8997).counts.tolist() == [[[96, 96, 96]]]
    form = get("infllm_v2")(dense_len=8999)
    assert form.select(q, k, scale=0.5, offset=8997).counts.tolist() == [[[141, 141, 96]]]


def test_more_blocks_come_closer_to_dense():
    q, k, v = (torch.randn(1, 2, 160, 8) for _ in range(3))
    dense = attention(q, k, v)
    errors = [(attention(q, k, v, "infllm_v2", **SMALL, top_k=n) - dense).norm().item() for n in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2] and errors[3] > 0


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="stride 5 must divide kernel 4"):
        get("infllm_v2")(**{**SMALL, "stride": 5})
    q = torch.randn(1, 3, 5, 4)
    with pytest.raises(ValueError, match="group 2 must divide the 3 heads"):
        attention(q, q, q, "infllm_v2", **SMALL, group=2)
