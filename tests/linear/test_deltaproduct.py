"""DeltaProduct: what it equals, and groups that it tracks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from manyheads import attention, get
from manyheads.nn import Attention

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def test_one_write_is_the_gated_delta_rule(make_inputs):
    """Kimi delta attention whose channels decay alike."""
    form = get("deltaproduct")(products=1, gated=True, negative=False)
    x = make_inputs(form, 40, 70)
    g = x.operands["g"][..., None].expand(-1, -1, -1, 6)
    expected = attention(*x.tensors, "kimi_delta_attention", g=g, beta=x.operands["beta"])
    torch.testing.assert_close(attention(*x.tensors, form, **x.operands), expected, **EXACT)


def test_several_writes_are_so_many_tokens(make_inputs):
    """Of one write each, the last of them asked."""
    form = get("deltaproduct")(products=3)
    x = make_inputs(form, 30)
    k, v = (
        torch.cat([t[:, :, :, None], x.operands[m]], 3).flatten(2, 3)
        for t, m in ((x.k, "more_keys"), (x.v, "more_values"))
    )
    q = x.q.repeat_interleave(3, 2)
    o = attention(q, k, v, "deltaproduct", products=1, beta=x.operands["beta"].flatten(2))
    torch.testing.assert_close(attention(*x.tensors, form, **x.operands), o[:, :, 2::3], **EXACT)


def swaps(permutation):
    """As at most two (i, j) one after the other."""
    at, found = list(range(3)), []
    for i in range(3):
        if at[i] != permutation[i]:
            j = at.index(permutation[i])
            at[i], at[j] = at[j], at[i]
            found.append((i, j))
    return found


def test_two_reflections_track_the_permutations_of_three():
    """By hand: a swap is a reflection, I - 2 k k^T with k = (e_i - e_j) / sqrt(2), so that 512 permutations one after
    the other are followed without a mistake. One write a token cannot: a rotation has determinant 1, and I - beta k k^T
    with beta > 0 less."""
    draw, n = random.Random(0), 512
    word = [draw.choice(list(itertools.permutations(range(3)))) for _ in range(n)]
    keys, beta = torch.zeros(2, 1, 1, n, 3, dtype=torch.float64), torch.zeros(1, 1, n, 2, dtype=torch.float64)
    expected, state = [], list(range(3))
    for t, permutation in enumerate(word):
        for j, (a, b) in enumerate(swaps(permutation)):
            keys[j, 0, 0, t, a], keys[j, 0, 0, t, b], beta[0, 0, t, j] = 1, -1, 2
        state = [state[i] for i in permutation]
        expected.append(state)
    start = torch.eye(3, dtype=torch.float64)[None, None]
    nothing = torch.zeros(1, 1, n, 3, dtype=torch.float64)
    found = []
    for i in range(3):  # what stands at place i: the state's row
        q = torch.eye(3, dtype=torch.float64)[i].expand(1, 1, n, 3)
        form = get("deltaproduct")(products=2)
        given = {
            "more_keys": keys[1][:, :, :, None],
            "more_values": nothing[:, :, :, None],
            "beta": beta,
            "state": start,
        }
        found.append(attention(q, keys[0], nothing, form, **given)[0, 0].argmax(-1))
    assert torch.stack(found, -1).tolist() == expected


@pytest.mark.parametrize(("negative", "largest"), [(True, 2), (False, 1)])
def test_strengths_reach_as_far_as_said(negative, largest):
    activation = get("deltaproduct")(negative=negative).operands["beta"].activation
    assert activation(torch.tensor([-50.0, 0.0, 50.0])).tolist() == pytest.approx([0, largest / 2, largest])


def test_a_layer_trains_every_write_from_the_start():
    """A write whose key and value both start at zero would have no gradient, and stay."""
    layer = Attention(16, 2, "deltaproduct", products=3, gated=True)
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None and g.ne(0).any() for g in grads.values())
    for name in ("more_keys", "more_values"):
        assert grads[f"operands.{name}.weight.weight"].unflatten(0, (2, 2, 8)).ne(0).any(-1).any(-1).all()
