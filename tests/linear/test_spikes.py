"""Spiking neurons, and the attention of Spikformer V2 and STAtten over what they give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manyheads.core.batch_norm import batch_normed
from manyheads.core.spikes import fire, lif
from manyheads.layers.linear.spikformer_v2_ssa import SpikingSelfAttention
from manyheads.layers.linear.statten import STAtten


def settled(module):
    """In double, with normalisations that have seen something, so that neurons fire now and then."""
    module = module.double()
    for _ in range(20):
        module(2 * torch.randn(4, 16, module.dim, dtype=torch.float64))
    return module.eval()


def spikes(*shape, rate=0.3):
    return (torch.rand(shape) < rate).double()


# ---- neurons ----


def test_a_neuron_adds_up_leaks_fires_and_starts_anew():
    """By hand, tau 2 and threshold 1: 0.75, 1.125 fires; 0.5, 1.0 fires at the threshold itself; 0, -1, ..."""
    x = torch.tensor([1.5, 1.5, 1.0, 1.5, 0.0, -2.0, 3.0])
    assert lif(x).tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert lif(x, threshold=0.5).tolist() == [1, 1, 1, 1, 0, 0, 1]
    assert lif(torch.full((4,), 1.5), tau=3.0).tolist() == [0, 0, 1, 0]


def test_spikes_are_exactly_0_or_1_and_have_the_slope_of_a_sigmoid():
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    s = fire(x)
    assert s.equal((x >= 0).double())
    slope = torch.autograd.grad(s.sum(), x)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(torch.sigmoid(4 * x).sum(), x)[0])


def test_a_reset_passes_no_gradient():
    """The last membrane hangs on the first input only through what did not fire."""
    for first, passes in ((1.0, True), (3.0, False)):
        x = torch.tensor([first, 0.5], requires_grad=True)
        assert bool(torch.autograd.grad(lif(x)[1], x)[0][0] != 0) == passes


def test_padding_is_no_part_of_a_batchs_statistics():
    norm, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x, present = torch.randn(2, 4, 5, 3), torch.rand(4, 5) < 0.6
    x[:, ~present] = 1e6
    y = batch_normed(norm, x, present)
    expected = other(x[:, present].flatten(0, 1)).view(2, -1, 3)
    assert y[:, present].equal(expected) and y[:, ~present].eq(0).all()
    assert norm.running_var.equal(other.running_var) and norm.running_mean.equal(other.running_mean)


@pytest.mark.parametrize("layer", [SpikingSelfAttention, STAtten])
def test_padding_changes_nothing_in_training(layer):
    module = layer(12, 3, threshold=0.3).double()
    x, garbage = torch.randn(2, 11, 12).double(), torch.full((2, 5, 12), 1e3).double()
    present = torch.arange(16).expand(2, -1) < 11
    torch.testing.assert_close(module(torch.cat([x, garbage], 1), present=present)[:, :11], module(x))


# ---- Spikformer V2 ----


def test_spiking_attention_counts():
    """(q k^T) v and q (k^T v) are the same whole numbers, in float32 too."""
    module = SpikingSelfAttention(24, 3)
    q, k, v = (spikes(2, 3, 40, 24).float() for _ in range(3))
    counted = module.count(q, k, v)
    heads = (t.unflatten(-1, (3, 8)).transpose(2, 3).long() for t in (q, k, v))
    q, k, v = heads
    assert counted.long().equal(((q @ k.mT) @ v).transpose(2, 3).flatten(3)) and counted.eq(counted.round()).all()
    assert counted.min() >= 0 and counted.max() > 3


def test_all_of_it_is_spikes():
    """And there are some, and not everywhere."""
    module = settled(SpikingSelfAttention(32, 2, scale=1.0, threshold=0.5))
    x = (2 * torch.randn(2, 30, 32, dtype=torch.float64)).expand(4, -1, -1, -1)
    found = module.spikes(x)
    assert list(found) == ["q", "k", "v", "a", "y"]
    for one in found.values():
        assert one.shape == x.shape and ((one == 0) | (one == 1)).all() and 0.005 < one.mean() < 0.9
    assert module(x[0]).equal(found["y"].mean(0))


def test_steps_share_nothing_but_what_neurons_hold():
    """Attention of a step is that of the step alone."""
    module = SpikingSelfAttention(8, 2)
    q, k, v = (spikes(5, 2, 9, 8) for _ in range(3))
    alone = [module.count(q[t : t + 1], k[t : t + 1], v[t : t + 1]) for t in range(5)]
    assert module.count(q, k, v).equal(torch.cat(alone))


# ---- STAtten ----


def test_chunks_of_one_step_are_attention_in_each_step():
    """Exactly: that of Spikformer V2."""
    q, k, v = (spikes(6, 2, 9, 8) for _ in range(3))
    single, plain = STAtten(8, 2, chunk=1), SpikingSelfAttention(8, 2)
    assert single.count(q, k, v).equal(plain.count(q, k, v))


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_a_step_sees_its_chunk_and_nothing_else(chunk):
    """Both earlier and later steps, which is how two frames can be compared."""
    module = STAtten(8, 2, steps=6, chunk=chunk)
    q, k, v = (spikes(6, 1, 5, 8, rate=0.6) for _ in range(3))
    before = module.count(q, k, v)
    for t in range(6):
        k_t, v_t = k.clone(), v.clone()
        k_t[t], v_t[t] = 1 - k[t], 1 - v[t]
        moved = (module.count(q, k_t, v_t) != before).flatten(1).any(1).tolist()
        assert moved == [s // chunk == t // chunk for s in range(6)]


def test_any_chunk_costs_as_much():
    q, k, v = (spikes(6, 2, 9, 8) for _ in range(3))
    flops = set()
    for chunk in (1, 2, 3, 6):
        with FlopCounterMode(display=False) as counter:
            STAtten(8, 2, steps=6, chunk=chunk).count(q, k, v)
        flops.add(counter.get_total_flops())
    assert len(flops) == 1 and flops.pop() == 2 * 2 * 6 * 2 * 9 * 8 * 4


def test_frames_may_differ():
    """Two frames in a model's time: what comes out of the first hangs on the second with chunk 2, not with chunk 1."""
    frames = 3 * torch.randn(2, 2, 9, 16, dtype=torch.float64)
    other = torch.stack([frames[0], 3 * torch.randn_like(frames[0])])
    for chunk in (1, 2):
        torch.manual_seed(1)
        module = settled(STAtten(16, 2, steps=2, chunk=chunk, side=1, threshold=0.3))
        assert module.over_time(frames)[0].equal(module.over_time(other)[0]) == (chunk == 1)


def test_two_frames_are_compared():
    """Whether two frames differ, learned, and read off what comes out of the first of them: chunks of 2 can say so."""
    torch.manual_seed(0)
    kinds = 2 * torch.randn(2, 4, 32)
    module, head = STAtten(32, 2, steps=2, side=2, threshold=0.5), nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-2)

    def answers():
        which = torch.randint(2, (2, 128))
        frames = kinds[which] + 0.3 * torch.randn(2, 128, 4, 32)
        return head(module.over_time(frames)[0].mean(1)), which[0] ^ which[1]

    for _ in range(60):
        loss = nn.functional.cross_entropy(*answers())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    given, wanted = answers()
    assert (given.argmax(-1) == wanted).float().mean() > 0.9


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="steps 4 is not a multiple of chunk 3"):
        STAtten(8, 2, chunk=3)
    with pytest.raises(ValueError, match="x has 3 steps, which is no multiple of chunk 2"):
        STAtten(8, 2).over_time(torch.zeros(3, 1, 4, 8))
    for one in (STAtten, SpikingSelfAttention):
        with pytest.raises(ValueError, match="dim 8 is not a multiple of heads 3"):
            one(8, 3)
