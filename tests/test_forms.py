"""Forms that no mechanism is yet: operands that follow j, sums, decays of every shape; and merge."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, merge
from manyheads.core import Blocks, Function, Operand, Recurrence, Scores, Sum

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def fade(s, b, h, i, j, forget):
    """A score that reads an operand at a query's and at a key's position."""
    return s + forget[b, h, i] - forget[b, h, j]


FADING = Scores(
    mask=lambda b, h, i, j: j <= i,
    score=fade,
    operands={"forget": Operand("batch heads len", lambda x: -torch.nn.functional.softplus(x).cumsum(-1))},
)


def dense(x, bias, allowed):
    s = (x.q @ x.k.mT * x.q.shape[-1] ** -0.5 + bias).masked_fill(~allowed, -torch.inf)
    return s.softmax(-1) @ x.v


def test_a_score_reads_operands_at_positions(make_inputs):
    x = make_inputs(FADING, 9, 14, grad=True)
    f = x.operands["forget"]
    i, j = torch.arange(5, 14)[:, None], torch.arange(14)
    expected = dense(x, f[:, :, 5:, None] - f[:, :, None], j <= i)
    o = attention(*x.tensors, FADING, forget=f)
    torch.testing.assert_close(o, expected, **EXACT)
    weight = torch.randn_like(o)
    got, wanted = (torch.autograd.grad(y, x.leaves, weight) for y in (o, expected))
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_operands_follow_their_tokens_into_a_padded_batch(side, make_inputs):
    x = make_inputs(FADING, 8)
    row = slice(3, 8) if side == "left" else slice(0, 5)
    positions = torch.full((2, 8), -1)
    positions[0], positions[1, row] = torch.arange(8), torch.arange(5)
    o = attention(*x.tensors, FADING, q_positions=positions, kv_positions=positions, **x.operands)
    for b, at in ((0, slice(0, 8)), (1, row)):
        alone = [t[b : b + 1, :, at] for t in x.tensors]
        expected = attention(*alone, FADING, forget=x.operands["forget"][b : b + 1, :, at])
        torch.testing.assert_close(o[b : b + 1, :, at], expected, **EXACT)


def test_operands_follow_their_tokens_after_an_eviction(make_inputs):
    """A cache that kept keys 7, 0, 5 and 9 in this order, and a query at 9."""
    x = make_inputs(FADING, 10)
    kept = torch.tensor([7, 0, 5, 9])
    f = x.operands["forget"]
    only = Scores(
        mask=lambda b, h, i, j: (j == 7) | (j == 0) | (j == 5) | (j == 9), score=fade, operands=FADING.operands
    )
    whole = attention(*x.tensors, only, forget=f)
    q, k, v = x.q[:, :, 9:], x.k[:, :, kept], x.v[:, :, kept]
    o = attention(q, k, v, FADING, q_positions=torch.tensor([9]), kv_positions=kept, forget=f[:, :, kept])
    torch.testing.assert_close(o, whole[:, :, 9:], **EXACT)


def test_masks_may_depend_on_batch_and_head(make_inputs):
    form = Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 2 + h + 3 * b))
    x = make_inputs(form, 12, kv_heads=2)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    i, j = torch.arange(12)[:, None], torch.arange(12)
    repeated = type(x)(q=x.q, k=x.k.repeat_interleave(2, 1), v=x.v.repeat_interleave(2, 1))
    expected = dense(repeated, 0.0, (j <= i) & (i - j < 2 + h + 3 * b))
    for engine in ("sdpa", "eager"):
        torch.testing.assert_close(attention(*x.tensors, form, engine=engine), expected, **EXACT)


# ---- recurrences ----

RECURRENCES = {
    "no decay": Recurrence(),
    "a decay for each head": Recurrence(decay=lambda h, heads: -(h + 1.0) / heads),
    "a decay for each token": Recurrence(operands={"g": Operand("batch heads len", lambda x: -x.exp())}),
    "a decay for each channel": Recurrence(operands={"g": Operand("batch heads len head_dim", lambda x: -x.exp())}),
    "two decays": Recurrence(
        decay=lambda h, heads: -(h + 1.0) / heads, operands={"g": Operand("batch heads len", lambda x: -x.exp())}
    ),
    "delta": Recurrence(write="delta", operands={"beta": Operand("batch heads len", torch.sigmoid)}),
    "delta with a decay for each token": Recurrence(
        write="delta",
        operands={
            "g": Operand("batch heads len", lambda x: -x.exp()),
            "beta": Operand("batch heads len", torch.sigmoid),
        },
    ),
    "delta with features": Recurrence(
        write="delta",
        key_feature=lambda k: k.softmax(-1),
        operands={"beta": Operand("batch heads len", torch.sigmoid)},
    ),
    "features": Recurrence(query_feature=torch.exp, key_feature=lambda k: torch.nn.functional.elu(k) + 1),
}


def stepwise(form, x):
    """The recurrence as it is defined, one token at a time."""
    heads = x.q.shape[1]
    q = form.query_feature(x.q) * x.q.shape[-1] ** -0.5
    k, v = form.key_feature(x.k), x.v
    state, out = 0.0 * (k[:, :, 0, :, None] * v[:, :, 0, None]), []
    for t in range(k.shape[2]):
        g = torch.zeros(1, dtype=q.dtype)
        if form.decay:
            g = g + form.decay(torch.arange(heads), heads)[:, None]
        if "g" in x.operands:
            own = x.operands["g"][:, :, t]
            g = g + (own if own.ndim == 3 else own[..., None])
        state = g.exp()[..., None] * state
        write = v[:, :, t]
        if form.write == "delta":
            write = x.operands["beta"][:, :, t, None] * (write - (k[:, :, t, None] @ state).squeeze(2))
        state = state + k[:, :, t, :, None] * write[:, :, None]
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2), state


@pytest.mark.parametrize("length", [1, 16, 70])
@pytest.mark.parametrize("case", RECURRENCES)
def test_recurrences_equal_their_definition(case, length, make_inputs):
    form = RECURRENCES[case]
    x = make_inputs(form, length, heads=2, head_dim=4, grad=True)
    if form.write == "delta":  # long keys would make any delta rule explode
        x.k = x.leaves[1] = (x.k / x.k.norm(dim=-1, keepdim=True)).detach().requires_grad_()
    tensors = (x.q, x.k, x.v)
    expected, last = stepwise(form, x)
    o, state = attention(*tensors, form, return_state=True, **x.operands)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)
    weights = torch.randn_like(o), torch.randn_like(state)
    got, wanted = (torch.autograd.grad(y, x.leaves, weights) for y in ((o, state), (expected, last)))
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("strong", [1.0, 1e4])
def test_strong_decays_do_not_overflow(strong):
    form = RECURRENCES["a decay for each channel"]
    q, k, v = torch.randn(3, 1, 1, 50, 4, requires_grad=True).unbind()
    g = torch.full((1, 1, 50, 4), -strong, requires_grad=True)
    o = attention(q, k, v, form, g=g)
    assert o.isfinite().all() and o.ne(0).any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), (q, k, v, g)))


@pytest.mark.parametrize("case", RECURRENCES)
def test_what_an_absent_token_holds_does_not_matter(case, make_inputs):
    """Not even infinity, which a feature may make NaN of, nor a feature that is not 0 at 0."""
    form = RECURRENCES[case]
    x = make_inputs(form, 6)
    positions = torch.tensor([[-1, 0, 1, 2, -1, 3]]).expand(2, -1)
    there = positions[0] >= 0
    operands = {n: value[:, :, there] for n, value in x.operands.items()}
    expected = attention(*(t[:, :, there] for t in x.tensors), form, **operands)
    q, k, v = (t.masked_fill(~there[:, None], torch.inf).requires_grad_() for t in x.tensors)
    o = attention(q, k, v, form, q_positions=positions, kv_positions=positions, **x.operands)
    torch.testing.assert_close(o[:, :, there], expected, **EXACT)
    assert o[:, :, ~there].eq(0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


# ---- sums ----

PARTS = (Scores(mask=lambda b, h, i, j: j <= i), Recurrence(default_scale=lambda d: 2.0), FADING)
GATE = Operand("batch heads len", torch.sigmoid)
SUM = Sum(parts=PARTS, gates=(None, "gate", None), operands={"gate": GATE, **FADING.operands})


def test_a_sum_adds_its_gated_parts_each_with_its_scale(make_inputs):
    x = make_inputs(SUM, 6, 9, kv_heads=2, grad=True)
    f, gate = x.operands["forget"], x.operands["gate"]
    one, two, three = (attention(*x.tensors, p, **({"forget": f} if p is FADING else {})) for p in PARTS)
    expected = one + gate[:, :, 3:, None] * two + three
    o = attention(*x.tensors, SUM, **x.operands)
    torch.testing.assert_close(o, expected, **EXACT)
    got, wanted = (torch.autograd.grad(y.square().sum(), x.leaves) for y in (o, expected))
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_of_a_sum_equals_the_row_alone(side, make_inputs):
    x = make_inputs(SUM, 8)
    row = slice(3, 8) if side == "left" else slice(0, 5)
    positions = torch.full((2, 8), -1)
    positions[0], positions[1, row] = torch.arange(8), torch.arange(5)
    o = attention(*x.tensors, SUM, q_positions=positions, kv_positions=positions, **x.operands)
    alone = [t[1:, :, row] for t in x.tensors]
    expected = attention(*alone, SUM, **{n: value[1:, :, row] for n, value in x.operands.items()})
    torch.testing.assert_close(o[1:, :, row], expected, **EXACT)
    one = attention(q := x.q[:, :, -1:], x.k, x.v, SUM, **x.operands)
    torch.testing.assert_close(one, attention(*x.tensors, SUM, **x.operands)[:, :, -1:], **EXACT)
    assert one.shape[:3] == q.shape[:3]


def test_a_function_is_called_with_what_it_declares(make_inputs):
    form = Function(
        forward=lambda q, k, v, *, scale, shift: q * scale + shift[:, None],
        operands={"shift": Operand("heads head_dim")},
        default_scale=lambda d: 1.0 / d,
    )
    x = make_inputs(form, 3, v_head_dim=6)
    torch.testing.assert_close(attention(*x.tensors, form, **x.operands), x.q / 6 + x.operands["shift"][:, None])


# ---- lists of blocks, merge ----


def test_block_lists_and_maps_hold_the_same():
    keep = torch.rand(2, 3, 5, 7) < 0.4
    keep[0, 0, 0] = False
    keep[1, 2, 4] = True
    blocks = Blocks.from_map(keep)
    assert blocks.to_map(7).equal(keep)
    assert blocks.counts.equal(keep.sum(-1)) and blocks.indices.shape[-1] == 7
    listed = blocks.indices[0, 1, 2, : blocks.counts[0, 1, 2]].tolist()
    assert listed == sorted(listed) == keep[0, 1, 2].nonzero().flatten().tolist()
    nothing = Blocks.from_map(torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    assert nothing.indices.shape == (1, 1, 2, 0) and not nothing.to_map(3).any()


def test_merge_with_nothing_changes_nothing():
    o, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    nothing = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    for pair in (((o, lse), nothing), (nothing, (o, lse))):
        merged = merge(*pair)
        assert merged[0].equal(o) and merged[1].equal(lse)
    merged = merge(nothing, nothing)
    assert merged[0].eq(0).all() and merged[1].isneginf().all()


def test_merge_keeps_the_dtype_and_has_gradients():
    a, b = ((torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(2)) for _ in range(2))
    assert merge(a, b)[0].dtype == torch.bfloat16 and merge(a, b)[1].dtype == torch.float32
    lse = torch.tensor([0.3, -torch.inf], dtype=torch.float64)
    o = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    merged = merge((o, lse.requires_grad_()), (other, torch.full_like(lse, -torch.inf)))
    grads = torch.autograd.grad(merged[0].sum() + merged[1][0], (o, lse, other))
    assert all(g.isfinite().all() for g in grads)
