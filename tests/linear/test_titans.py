"""Titans: what its memory is in limits that are known, what it remembers, and how far."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads import attention
from manyheads.core import Operand, Recurrence, one
from manyheads.core.gradient_steps import Memory, memorise, recall
from manyheads.core.neural_memory import NeuralMemory
from manyheads.layers.linear.titans import Titans

DELTA = Recurrence(
    write="delta", default_scale=one,
    operands={"g": Operand("batch heads len"), "beta": Operand("batch heads len")},
)  # fmt: skip


def memory(*sizes, batch=2, heads=3):
    weights = tuple(torch.randn(batch, heads, a, b).double() * a**-0.5 for a, b in pairwise(sizes))
    return Memory(weights, tuple(torch.zeros_like(w) for w in weights))


def tokens(n, width=4, batch=2, heads=3):
    """q, k, v, and theta, log(1 - alpha), log(eta)."""
    q, k, v = (torch.randn(batch, heads, n, width).double() for _ in range(3))
    gates = [torch.rand(batch, heads, n).double() for _ in range(3)]
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 0.3 * gates[0], -0.2 * gates[1], gates[2].log()


def test_a_linear_memory_without_momentum_is_a_gated_delta_rule():
    """Gradients are taken before the memory decays, the delta rule corrects behind the decay a = 1 - alpha:
    a M - 2 theta (M k - v) k^T = a M - beta (a M k - a v) k^T with beta = 2 theta / a. Gradients as well."""
    start, (q, k, v, theta, keep, _) = memory(4, 4), tokens(23)
    leaves = [t.requires_grad_() for t in (q, k, v, theta, keep, start.weights[0])]
    o, end = memorise(start, q, k, v, theta, keep, None, chunk=1)
    a = keep.exp()
    wanted, state = attention(
        q, k, a[..., None] * v, DELTA, g=keep, beta=2 * theta / a, state=start.weights[0], return_state=True
    )
    bounds = {"atol": 1e-12, "rtol": 1e-10}  # float64, two orders of the same sums
    torch.testing.assert_close(o, wanted, **bounds)
    torch.testing.assert_close(end.weights[0], state, **bounds)
    weight = torch.randn_like(o)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, weight) for y in (o, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, **bounds)


def test_orthogonal_keys_are_stored_exactly_and_overwritten():
    """theta = 1/2 is the step to the value itself."""
    start = memory(4, 4)
    k = torch.eye(4).double().expand(2, 3, 4, 4)
    k, v = torch.cat([k, k], 2), torch.randn(2, 3, 8, 4).double()
    full = torch.zeros(2, 3, 8).double()
    _, end = memorise(start, k, k, v, full + 0.5, full, None, chunk=1)
    torch.testing.assert_close(recall(end, k[:, :, 4:]), v[:, :, 4:])


@pytest.mark.parametrize("sizes", [(4, 4), (4, 7, 4), (4, 5, 5, 5, 4)], ids=str)
def test_in_pieces_of_whole_chunks_it_is_the_same(sizes):
    """Momenta are carried on; with chunk 1 every piece is whole."""
    given = tokens(17)
    for chunk, pieces in ((1, (1, 5, 11)), (4, (8, 4, 5)), (64, (17,))):
        whole, end = memorise(memory_now := memory(*sizes), *given, chunk=chunk)
        parts, at = [], 0
        for n in pieces:
            cut = [t[:, :, at : at + n] for t in given]
            part, memory_now = memorise(memory_now, *cut, chunk=chunk)
            parts.append(part)
            at += n
        torch.testing.assert_close(torch.cat(parts, 2), whole)
        for ours, theirs in zip(memory_now.weights + memory_now.momenta, end.weights + end.momenta, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_no_momentum_is_the_limit_of_little():
    q, k, v, theta, keep, carry = tokens(9)
    start = memory(4, 6, 4)
    little, _ = memorise(start, q, k, v, theta, keep, torch.full_like(carry, -80.0), chunk=4)
    none, _ = memorise(start, q, k, v, theta, keep, None, chunk=4)
    torch.testing.assert_close(little, none, atol=1e-30, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 16, 8), (8, 16, 16, 16, 8)], ids=str)
@pytest.mark.parametrize("chunk", [1, 16])
def test_it_learns_what_it_reads(sizes, chunk):
    """16 pairs that come again and again, of which nothing is forgotten: the loss goes down. Steps from one place are
    smaller, as they add up."""
    start = memory(*sizes)
    k, v = F.normalize(torch.randn(2, 3, 16, 8).double(), dim=-1), torch.randn(2, 3, 16, 8).double()
    q, k_all, v_all = (t.repeat(1, 1, 20, 1) for t in (k, k, v))
    theta = torch.full(q.shape[:3], 0.02 if chunk == 1 else 0.005).double()
    _, end = memorise(start, q, k_all, v_all, theta, torch.zeros_like(theta), torch.full_like(theta, 0.5).log(), chunk)
    before, after = ((recall(m, k) - v).square().mean() for m in (start, end))
    assert after < 0.9 * before


def test_a_module_goes_on_where_it_stopped():
    """The short convolutions as well."""
    module = NeuralMemory(12, 2, depth=2, widen=2, conv=4, chunk=4, momentum=True, largest=0.1).double()
    x = torch.randn(2, 22, 12).double()
    whole, _ = module(x, module.start(x))
    state, parts = module.start(x), []
    for part in x.split([8, 4, 10], 1):
        y, state = module(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_the_memory_sees_beyond_the_window(variant):
    """A change of the first token reaches the last one, twelve windows later, if the memory learns; and does not if it
    takes no steps, nor forgets, as then there are short convolutions and windows alone."""
    for largest in (0.1, 0.0):
        torch.manual_seed(0)
        module = Titans(8, 2, variant=variant, window=4, persistent=2, chunk=4, largest=largest).double()
        nn.init.constant_(module.memory.forget.bias, -1e4)
        x = torch.randn(1, 48, 8).double()
        changed = x.clone()
        changed[:, 0] = torch.randn(8).double()
        gap = (module(x) - module(changed))[:, -4:].abs().max()
        assert gap > 1e-6 if largest else gap == 0


def test_the_state_stays_in_float32():
    """With weights in bfloat16, and under autocast."""
    for module, mixed in ((Titans(8, 2, window=4).bfloat16(), False), (Titans(8, 2, window=4), True)):
        x = torch.randn(1, 9, 8, dtype=module.persistent.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y, state = module.memory(x, module.memory.start(x))
            assert module(x).isfinite().all() and y.isfinite().all()
        assert all(w.dtype == torch.float32 for w in state.memory.weights + state.memory.momenta)


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="'mak' is no variant"):
        Titans(8, 2, variant="mak")
    with pytest.raises(ValueError, match="dim 8 is not a multiple of memory_heads 3"):
        Titans(8, 2, memory_heads=3)
