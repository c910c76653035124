"""Dense layers: what their papers promise beyond what every layer is tested for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from manyheads import attention, layers
from manyheads.layers.dense.dependency_attention import DependencyAttention
from manyheads.layers.dense.dual_attention import DualAttention
from manyheads.layers.dense.multi_source_attention import STRATEGIES, MultiSourceAttention
from manyheads.layers.dense.rcmha import RCMHA
from manyheads.layers.dense.set_transformer import PMA, SetAttention
from manyheads.nn import split


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


# ---- Set Transformer ----


@pytest.mark.parametrize("points", [None, 4])
def test_members_of_a_set_have_no_order(points):
    module, summary = SetAttention(12, 3, points=points).double(), PMA(12, 3, seeds=2).double()
    x, order = torch.randn(2, 9, 12, dtype=torch.float64), torch.randperm(9)
    close(module(x[:, order]), module(x)[:, order])
    close(summary(x[:, order]), summary(x))
    assert summary(x).shape == (2, 2, 12)


def test_a_padded_set_comes_down_to_the_same():
    summary = PMA(12, 3, seeds=2).double()
    x, present = torch.randn(2, 9, 12, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    present[1, 4:] = False
    out = summary(x, present=present)
    close(out[0], summary(x)[0])
    close(out[1], summary(x[1:, :4])[0])


def test_learned_points_make_a_set_linear():
    """Every product counted: twice the members take twice the work with points, and more without."""

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter knows the GPU's alone
    counts = {fused: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)}

    def work(module, n):
        with FlopCounterMode(display=False, custom_mapping=counts) as counter:
            module(torch.randn(1, n, 12))
        return counter.get_total_flops()

    points, all_pairs = SetAttention(12, 3, points=4), SetAttention(12, 3, points=None)
    fixed = 2 * work(points, 64) - work(points, 128)  # the points' own projections
    assert work(points, 256) - fixed == 4 * (work(points, 64) - fixed)
    assert work(all_pairs, 128) > 2.5 * work(all_pairs, 64)


# ---- several sources ----


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sources_of_several_lengths_and_their_padding(strategy):
    module = MultiSourceAttention(8, 2, sources=3, strategy=strategy).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    sources = [torch.randn(2, n, 8, dtype=torch.float64) for n in (4, 7, 1)]
    found = layers.get("multi_source_attention")
    close(module(x, sources), found.reference(module, x, sources))
    present = torch.ones(2, 7, dtype=torch.bool)
    present[0, :3] = False
    out = module(x, sources, sources_present=[None, present, None])
    close(out[1], module(x, sources)[1])
    close(out[0], module(x[:1], [sources[0][:1], sources[1][:1, 3:], sources[2][:1]])[0])


def test_flat_is_attention_to_all_sources_in_a_row():
    module = MultiSourceAttention(8, 2, strategy="flat").double()
    x, one, two = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 4, 7))
    read, both = module.reads[0], torch.cat([one, two], 1)
    q, k, v = (
        p(t).unflatten(-1, (2, 4)).transpose(1, 2)
        for p, t in zip((read.q, read.k, read.v), (module.norms[0](x), both, both), strict=True)
    )
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    close(module(x, [one, two]), x + read.o(o.transpose(1, 2).flatten(2)))


def test_a_hierarchy_without_preferences_takes_the_mean_of_its_contexts():
    module = MultiSourceAttention(8, 1, strategy="hierarchical").double()
    x, one, two = (torch.randn(1, n, 8, dtype=torch.float64) for n in (5, 4, 7))
    with torch.no_grad():
        module.choose.q.weight[:], module.choose.k.weight[:] = 0.0, 0.0
        even = module(x, [one, two])
        contexts = [
            read(module.norms[0](x), source, None) for read, source in zip(module.reads, (one, two), strict=True)
        ]
        close(even, x + module.choose.o(module.choose.v(sum(contexts) / 2)))


def test_another_number_of_sources_is_refused():
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="reads 2 sources, not 1"):
        MultiSourceAttention(8, 2)(x, [x])
    with pytest.raises(ValueError, match=r"'flet' is no strategy of multi_source_attention\. Did you mean 'flat'"):
        MultiSourceAttention(8, 2, strategy="flet")


# ---- dual attention ----


def test_relations_are_never_stored():
    """Four of them for every pair of tokens would be four times what scores take."""
    module, sizes = DualAttention(8, 2, relational=1, relations=4, library=4), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with torch.no_grad(), Sizes():
        module(torch.randn(1, 300, 8))
    assert max(sizes) <= 300 * 300


def test_its_heads_are_those_of_relational_attention():
    module = DualAttention(16, 4, relational=2, relations=4, library=5, rope_theta=None).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k = (split(p(x), 4)[:, 2:] for p in (module.q, module.k))
    o = attention(
        q, k, split(module.s(module.symbols(x, None)), 2), "relational_attention", relations=4, width=2,
        x=split(module.left(x), 4), y=split(module.right(x), 4), w_r=module.mix.mT,
    )  # fmt: skip
    with torch.no_grad():
        module.o.weight[:] = torch.eye(16)
    close(module(x)[..., 8:], o.transpose(1, 2).flatten(2))


def test_dual_attention_says_what_does_not_fit():
    with pytest.raises(ValueError, match="relational=3 must leave one of heads=3"):
        DualAttention(12, 3, relational=3)
    with pytest.raises(ValueError, match="no equal parts for 3 heads, 3 symbol heads, 5 relations"):
        DualAttention(12, 3, relational=2, relations=5)
    with pytest.raises(ValueError, match=r"'positions' is no kind of symbols\. Did you mean 'position'"):
        DualAttention(12, 3, relational=2, symbols="positions")
    with pytest.raises(ValueError, match="5 tokens, more than the 4 symbols"):
        DualAttention(12, 3, relational=2, symbols="position", library=4)(torch.randn(1, 5, 12))


# ---- dependency attention, RCMHA ----


def test_a_token_sends_as_much_as_its_message_allows():
    module = DependencyAttention(12, 3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    first = module.messages(x)
    close(module.dependencies(x).sum(-1), first)
    close(module.messages(x, first), first**2)
    close(module.dependencies(x, first).sum(-1), first**2)
    silent = torch.zeros_like(first)
    close(module(x, silent), module.o.bias.expand_as(x))
    silent[:, 3] = 1  # only this one speaks: what comes out is what it sends
    o = module.dependencies(x, silent)
    assert o[:, [0, 1, 2, 4, 5, 6]].eq(0).all() and (o[:, 3] > 0).all()


def test_rcmha_refuses_distances_that_it_has_not_learned():
    with pytest.raises(ValueError, match="5 tokens, more than max_len 4"):
        RCMHA(12, 3, max_len=4)(torch.randn(1, 5, 12))
