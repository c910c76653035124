"""Forms that no mechanism is yet: operands that follow j, normalisers, sinks, sums, decays; and merge."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from manyheads import attention, explain, merge
from manyheads.core import Blocks, Function, Operand, Recurrence, Scores, Selection, Sum
from manyheads.core.choosing import best, best_blocks, block_means
from manyheads.core.entmax import entmax
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import plain
from manyheads.engines import eager

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


# ---- weights that nothing divides, and sinks ----

BIAS = {"bias": Operand("heads")}


def past(b, h, i, j):
    return j <= i


def squared(s, b, h, i, j):
    return torch.relu(s) * torch.relu(s)


def sigmoid_over_n(s, b, h, i, j, bias):
    """i + 1 keys are seen: sigmoid(s - log n), which starts near a mean."""
    return torch.sigmoid(s + bias[h] - torch.log(i + 1.0))


WEIGHTS = {
    "sigmoid": Scores(mask=past, score=sigmoid_over_n, normaliser="none", operands=BIAS),
    "squared ReLU": Scores(mask=past, score=squared, normaliser="none"),
    "squared ReLU of everything": Scores(score=squared, normaliser="none"),
    "no score": Scores(mask=past, normaliser="none"),
}
SINK = {"sink": Operand("heads")}
SINKS = {
    "a sink": Scores(mask=past, sink="sink", operands=SINK),
    "a sink beside everything": Scores(sink="sink", operands=SINK),
    "a sink and a window": Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 3), sink="sink", operands=SINK),
    "a sink and a score": Scores(mask=past, score=fade, sink="sink", operands={**SINK, **FADING.operands}),
}
UNEVEN = {**WEIGHTS, **SINKS}


def written_out(case, x, q_len, kv_len, offset=None):
    """(o, lse) by the equation, with the whole matrix."""
    i, j = torch.arange(q_len)[:, None] + (kv_len - q_len if offset is None else offset), torch.arange(kv_len)
    group = x.q.shape[1] // x.k.shape[1]
    k, v = x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1)
    s = x.q @ k.mT / x.q.shape[-1] ** 0.5
    allowed = (j <= i) | ("everything" in case)
    if case in WEIGHTS:
        w = s if case == "no score" else s.clamp(min=0) ** 2
        if case == "sigmoid":
            w = 1 / (1 + (i + 1) * (-s - x.operands["bias"][:, None, None]).exp())
        return torch.where(allowed, w, 0.0) @ v, None
    if "window" in case:
        allowed = allowed & (i - j < 3)
    if "score" in case:
        forget = x.operands["forget"]
        s = s + forget.take_along_dim(i.clamp(min=0).flatten()[None, None], 2)[..., None] - forget[:, :, None]
    sink = x.operands["sink"][:, None, None]
    e = torch.where(allowed, s.exp(), 0.0)
    total = sink.exp() + e.sum(-1, keepdim=True)
    return e / total @ v, total.log().squeeze(-1)


def at_once_and_in_chunks(monkeypatch, chunked):
    """Three queries a chunk, so that a dozen tokens are several, and a chunk without keys is left out."""
    if chunked:
        from manyheads.core import tiling

        monkeypatch.setattr(tiling, "QUERY_TILE", 3)
        monkeypatch.setattr(tiling, "SMALL", 0)


@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "in chunks"])
@pytest.mark.parametrize("case", UNEVEN)
def test_weights_and_sinks_equal_their_equations(case, chunked, make_inputs, monkeypatch):
    at_once_and_in_chunks(monkeypatch, chunked)
    x = make_inputs(UNEVEN[case], 9, 14, kv_heads=2, grad=True)
    expected, lse = written_out(case, x, 9, 14)
    if lse is None:
        o = attention(*x.tensors, UNEVEN[case], **x.operands)
    else:
        o, got = attention(*x.tensors, UNEVEN[case], return_lse=True, **x.operands)
        torch.testing.assert_close(got, lse, **EXACT)
    torch.testing.assert_close(o, expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(attention(*x.tensors, UNEVEN[case], **x.operands), expected, **EXACT)
    weights = torch.randn_like(o), None if lse is None else torch.randn_like(lse)
    pairs = [((o, expected), weights[0])] + ([] if lse is None else [((got, lse), weights[1])])
    for pair, weight in pairs:
        a, b = (torch.autograd.grad(y, x.leaves, weight, retain_graph=True, allow_unused=True) for y in pair)
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("case", UNEVEN)
def test_weights_and_sinks_have_the_gradients_of_finite_differences(case, make_inputs):
    form = UNEVEN[case]
    x = make_inputs(form, 4, batch=1, heads=2, kv_heads=1, head_dim=3, v_head_dim=2, grad=True)

    def outputs(*leaves):
        given = dict(zip(x.operands, leaves[3:], strict=True))
        return attention(*leaves[:3], form, engine="eager", return_lse=case in SINKS, **given)

    assert torch.autograd.gradcheck(outputs, x.leaves)


@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "in chunks"])
@pytest.mark.parametrize("case", [case for case in UNEVEN if "everything" not in case])
def test_a_query_without_a_key_sees_the_sink_alone(case, chunked, make_inputs, monkeypatch):
    """Nine queries, four keys at their end: five queries see nothing."""
    at_once_and_in_chunks(monkeypatch, chunked)
    form = UNEVEN[case]
    x = make_inputs(form, 9, 4, kv_heads=2, grad=True)
    o = attention(*x.tensors, form, **x.operands)
    assert o[:, :, :5].eq(0).all() and o[:, :, 8].ne(0).any(-1).any(-1).all()
    grads = torch.autograd.grad(o.sum(), x.leaves)
    assert all(g.isfinite().all() for g in grads) and grads[0][:, :, :5].eq(0).all()
    if case in WEIGHTS:  # what an engine gives: the logarithm of 1, seen or not
        inputs = Inputs(*x.tensors, 1.0, range(9), range(5, 9), x.operands)
        assert eager.run(form, inputs)[1].eq(0).all()
        return
    sink = x.operands["sink"]
    lse = attention(*x.tensors, form, return_lse=True, **x.operands)[1]
    assert lse[:, :, :5].eq(sink[:, None]).all()
    (grad,) = torch.autograd.grad(lse[:, :, :5].sum(), sink)
    assert grad.eq(2 * 5).all(), "each of five queries in two rows adds one"
    own = {n: value[:, :, :0] if form.operands[n].per_token else value for n, value in x.operands.items()}
    nothing, lse = attention(x.q, x.k[:, :, :0], x.v[:, :, :0], form, return_lse=True, **own)
    assert nothing.eq(0).all() and lse.eq(sink[:, None]).all()


@pytest.mark.parametrize("case", UNEVEN)
def test_weights_and_sinks_in_a_padded_batch(case, make_inputs):
    form = UNEVEN[case]
    x = make_inputs(form, 8, kv_heads=2)
    positions = torch.full((2, 8), -1)
    positions[0], positions[1, 3:] = torch.arange(8), torch.arange(5)
    for t in x.tensors:
        t[1, :, :3] = 1e6
    o = attention(*x.tensors, form, q_positions=positions, kv_positions=positions, **x.operands)
    alone = [t[1:, :, 3:] for t in x.tensors]
    own = {n: value[1:, :, 3:] if form.operands[n].per_token else value for n, value in x.operands.items()}
    torch.testing.assert_close(o[1:, :, 3:], attention(*alone, form, **own), **EXACT)
    assert o[1, :, :3].eq(0).all()


@pytest.mark.parametrize("case", [case for case in UNEVEN if "everything" not in case])
def test_weights_and_sinks_step_by_step(case, make_inputs):
    form = UNEVEN[case]
    x = make_inputs(form, 9, kv_heads=2)
    whole = attention(*x.tensors, form, **x.operands)
    for n in range(1, 10):
        own = {name: v[:, :, :n] if form.operands[name].per_token else v for name, v in x.operands.items()}
        o = attention(x.q[:, :, n - 1 : n], x.k[:, :, :n], x.v[:, :, :n], form, **own)
        torch.testing.assert_close(o, whole[:, :, n - 1 : n], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", UNEVEN)
def test_weights_and_sinks_are_computed_in_float32(case, dtype, make_inputs):
    """Nothing but inputs and outputs is rounded."""
    x = make_inputs(UNEVEN[case], 9, 14, dtype=dtype)
    wide = attention(*(t.float() for t in x.tensors), UNEVEN[case], engine="eager", **x.operands)
    o = attention(*x.tensors, UNEVEN[case], engine="eager", **x.operands)
    assert o.dtype == dtype and o.equal(wide.to(dtype))


def test_parts_with_one_sink_merge_and_weights_that_nothing_divides_add(make_inputs):
    sinks, weights = SINKS["a sink"], WEIGHTS["squared ReLU"]
    x = make_inputs(sinks, 6, 11)
    at, sink = torch.arange(5, 11), x.operands["sink"]
    parts = {"merged": [], "added": []}
    for n, keys in enumerate(torch.randperm(11).split([4, 1, 6])):
        k, v, where = x.k[:, :, keys], x.v[:, :, keys], {"q_positions": at, "kv_positions": keys}
        once = sink if n == 1 else torch.full_like(sink, -torch.inf)
        parts["merged"].append(attention(x.q, k, v, sinks, return_lse=True, sink=once, **where))
        parts["added"].append(attention(x.q, k, v, weights, **where))
    o, lse = merge(merge(*parts["merged"][:2]), parts["merged"][2])
    expected = attention(*x.tensors, sinks, return_lse=True, sink=sink)
    torch.testing.assert_close((o, lse), expected, **EXACT)
    torch.testing.assert_close(sum(parts["added"]), attention(*x.tensors, weights), **EXACT)


def test_a_sink_far_above_and_far_below_the_scores(make_inputs):
    """No overflow: weights vanish beside a huge sink, and a sink of -inf is none, gradients included."""
    x = make_inputs(SINKS["a sink"], 5, grad=True)
    for value, expected in ((1e4, torch.zeros_like(x.v)), (-1e4, attention(*x.tensors)), (-torch.inf, None)):
        sink = torch.full((4,), value, dtype=torch.float64, requires_grad=True)
        o, lse = attention(*x.tensors, SINKS["a sink"], sink=sink, return_lse=True)
        torch.testing.assert_close(o, attention(*x.tensors) if expected is None else expected, **EXACT)
        grads = torch.autograd.grad(o.sum() + lse.sum(), (*x.leaves[:3], sink))
        assert all(g.isfinite().all() for g in grads)
    empty = attention(x.q, x.k[:, :, :2], x.v[:, :, :2], SINKS["a sink"], sink=sink, return_lse=True)
    assert empty[0][:, :, :3].eq(0).all() and empty[1][:, :, :3].isneginf().all()


@pytest.mark.parametrize("case", ["sigmoid", "a sink"])
def test_weights_and_sinks_inside_a_selection(case, make_inputs):
    """Every second block of two, in a padded batch; the row alone equals the mask written out."""
    inner = UNEVEN[case]

    def even(q, k, *, scale, offset):
        rows = -(-(offset + q.shape[2]) // 2) - offset // 2
        columns = torch.arange(-(-k.shape[2] // 2)) % 2 == 0
        return Blocks.from_map(columns.expand(q.shape[0], q.shape[1], rows, -1))

    form = Selection(select=even, scores=inner, query_block=2, key_block=2, operands=inner.operands)
    masked = Scores(
        mask=lambda b, h, i, j: (j <= i) & (j // 2 % 2 == 0), score=inner.score, normaliser=inner.normaliser,
        sink=inner.sink, operands=inner.operands,
    )  # fmt: skip
    x = make_inputs(form, 9)
    positions = torch.full((2, 9), -1)
    positions[0], positions[1, 4:] = torch.arange(9), torch.arange(5)
    where = {"q_positions": positions, "kv_positions": positions}
    asked = {"return_lse": True} if case in SINKS else {}
    got = attention(*x.tensors, form, **where, **x.operands, **asked)
    torch.testing.assert_close(got, attention(*x.tensors, masked, **where, **x.operands, **asked), **EXACT)


def test_a_sink_is_declared_and_has_a_softmax():
    for normaliser in ("signed", "none"):
        with pytest.raises(ValueError, match=f"'{normaliser}' has none"):
            Scores(sink="sink", normaliser=normaliser, operands=SINK)
    for operands in ({}, {"other": Operand("heads")}, {"sink": Operand("batch heads len")}):
        with pytest.raises(ValueError, match=r"'sink' must be declared.*Operand\('heads'\)"):
            Scores(sink="sink", operands=operands)


ALPHA = {"a": Operand("heads")}


def test_an_alpha_is_declared_and_has_an_entmax():
    for given in ({"alpha": 1.5}, {"normaliser": "entmax"}, {"normaliser": "none", "alpha": 2.0}):
        with pytest.raises(ValueError, match="entmax takes an alpha, others none"):
            Scores(**given)
    for alpha in (0.9, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a finite number >= 1"):
            Scores(normaliser="entmax", alpha=alpha)
    for operands in ({}, {"b": Operand("heads")}, {"a": Operand("batch heads len")}):
        with pytest.raises(ValueError, match=r"alpha 'a' must be declared.*Operand\('heads'\)"):
            Scores(normaliser="entmax", alpha="a", operands=operands)
    with pytest.raises(ValueError, match="'entmax' has none"):
        Scores(normaliser="entmax", alpha=2.0, sink="sink", operands=SINK)


def test_entmax_with_a_score_a_mask_and_an_alpha_of_each_head(make_inputs):
    """Over several chunks of queries, against the whole matrix."""
    form = Scores(
        mask=lambda b, h, i, j: (j <= i) & (i - j < 140) & (i != 27), score=fade, normaliser="entmax", alpha="a",
        operands={**ALPHA, **FADING.operands},
    )  # fmt: skip
    x = make_inputs(form, 280, 300, kv_heads=2, grad=True)
    alpha = torch.tensor([1.2, 1.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x.operands["a"] = alpha
    got = attention(*x.tensors, form, engine="eager", **x.operands)
    i, j = torch.arange(20, 300)[:, None], torch.arange(300)
    b, h = torch.arange(2).view(-1, 1, 1, 1), torch.arange(4).view(-1, 1, 1)
    s = x.q @ x.k.repeat_interleave(2, 1).mT / x.q.shape[-1] ** 0.5
    s = form.program.score(s, b, h, i[None, None], j, **{n: x.operands[n] for n in FADING.operands})
    s = s.masked_fill((j > i) | (i - j >= 140) | (i == 27), -torch.inf)
    expected = entmax(s, alpha[:, None, None]) @ x.v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected, **EXACT)
    weight = torch.randn_like(got)
    leaves = [*x.tensors, *x.operands.values()]
    for a, e in zip(*(torch.autograd.grad(o, leaves, weight) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, e, **EXACT)


def test_entmax_inside_of_a_selection(make_inputs):
    def even(q, k, *, scale, offset):
        return Blocks.from_map((torch.arange(3) % 2 == 0).expand(q.shape[0], q.shape[1], -(-q.shape[2] // 4), -1))

    inner = Scores(mask=past, normaliser="entmax", alpha=1.5)
    form = Selection(select=even, scores=inner, query_block=4, key_block=4)
    masked = Scores(mask=lambda b, h, i, j: (j <= i) & (j // 4 % 2 == 0), normaliser="entmax", alpha=1.5)
    x = make_inputs(form, 12)
    torch.testing.assert_close(attention(*x.tensors, form), attention(*x.tensors, masked), **EXACT)


def test_a_top_k_is_a_number_of_scores():
    for given in ({"top_k": 3}, {"normaliser": "top_k"}, {"normaliser": "none", "top_k": 2}):
        with pytest.raises(ValueError, match="top_k takes a number top_k, others none"):
            Scores(**given)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"whole number of scores, 1 or more, not {k}"):
            Scores(normaliser="top_k", top_k=k)
    with pytest.raises(ValueError, match="'top_k' has none"):
        Scores(normaliser="top_k", top_k=2, sink="sink", operands=SINK)


@pytest.mark.parametrize("k", [1, 5, 100, 139, 140, 1000])
def test_top_k_with_a_score_and_a_mask(k, make_inputs):
    """Over several chunks of queries, against a whole matrix in which the k-th is found by sorting. Some rows see fewer
    than k keys, and one sees none."""
    form = Scores(
        mask=lambda b, h, i, j: (j <= i) & (i - j < 140) & (i != 27), score=fade, normaliser="top_k", top_k=k,
        operands=FADING.operands,
    )  # fmt: skip
    x = make_inputs(form, 280, 300, kv_heads=2, grad=True)
    got = attention(*x.tensors, form, engine="eager", **x.operands)
    i, j = torch.arange(20, 300)[:, None], torch.arange(300)
    b, h = torch.arange(2).view(-1, 1, 1, 1), torch.arange(4).view(-1, 1, 1)
    s = x.q @ x.k.repeat_interleave(2, 1).mT / x.q.shape[-1] ** 0.5
    s = form.program.score(s, b, h, i[None, None], j, **x.operands)
    s = s.masked_fill((j > i) | (i - j >= 140) | (i == 27), -torch.inf)
    rows = torch.arange(280) != 7
    order = s.argsort(-1, descending=True).argsort(-1)
    weights = s.masked_fill(order >= k, -torch.inf)[:, :, rows].softmax(-1)
    expected = weights @ x.v.repeat_interleave(2, 1)
    assert got[:, :, 7].eq(0).all()
    torch.testing.assert_close(got[:, :, rows], expected, **EXACT)
    weight = torch.randn_like(got)
    leaves = [*x.tensors, *x.operands.values()]
    pairs = zip(
        torch.autograd.grad(got, leaves, weight), torch.autograd.grad(expected, leaves, weight[:, :, rows]), strict=True
    )
    for a, e in pairs:
        torch.testing.assert_close(a, e, **EXACT)


def test_top_k_keeps_all_that_equal_the_kth():
    """Scores 3, 2, 2, 2, 1: the twos count all from k = 2 to 4."""
    k = torch.tensor([2.0, 3.0, 1.0, 2.0, 2.0], dtype=torch.float64).view(1, 1, 5, 1)
    q, v = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.eye(5, dtype=torch.float64).view(1, 1, 5, 5)
    for top, kept in ((1, [1]), (2, [0, 1, 3, 4]), (3, [0, 1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        form = Scores(normaliser="top_k", top_k=top)
        weights = attention(q, k, v, form, scale=1.0)[0, 0, 0]
        assert weights.nonzero().flatten().tolist() == kept
        torch.testing.assert_close(weights[kept], k[0, 0, kept, 0].softmax(0))


def test_top_k_inside_of_a_selection(make_inputs):
    """The largest of what was chosen."""

    def even(q, k, *, scale, offset):
        return Blocks.from_map((torch.arange(3) % 2 == 0).expand(q.shape[0], q.shape[1], -(-q.shape[2] // 4), -1))

    form = Selection(select=even, scores=Scores(mask=past, normaliser="top_k", top_k=2), query_block=4, key_block=4)
    masked = Scores(mask=lambda b, h, i, j: (j <= i) & (j // 4 % 2 == 0), normaliser="top_k", top_k=2)
    x = make_inputs(form, 12)
    torch.testing.assert_close(attention(*x.tensors, form), attention(*x.tensors, masked), **EXACT)


@pytest.mark.parametrize("engine", ["triton", "sdpa", "flex"])
@pytest.mark.parametrize("given", [{"normaliser": "entmax", "alpha": 1.5}, {"normaliser": "top_k", "top_k": 2}])
def test_only_eager_finds_levels_on_a_cpu(given, engine, make_inputs):
    form = Scores(**given)
    x = make_inputs(form, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"no '{form.normaliser}' normaliser"):
        explain(*x.tensors, form, engine=engine)


@pytest.mark.parametrize("engine", ["sdpa", "flex"])
@pytest.mark.parametrize("case", ["a sink", "squared ReLU"])
def test_engines_of_torch_run_neither_weights_nor_sinks_on_a_cpu(case, engine, make_inputs):
    """In float32, so that it is the form they object to."""
    x = make_inputs(UNEVEN[case], 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"sink|no 'none' normaliser|no score function"):
        explain(*x.tensors, UNEVEN[case], engine=engine, **x.operands)


def test_no_library_kernel_is_taken_for_one_with_a_sink(make_inputs):
    for form, expected in ((Scores(), True), (SINKS["a sink beside everything"], False), (WEIGHTS["no score"], False)):
        x = make_inputs(form, 5)
        assert plain(form, Inputs(*x.tensors, 1.0, range(5), range(5))) == expected


@pytest.mark.parametrize("case", ["a sink", "a sink and a window"])
def test_flex_puts_sinks_on_top_of_its_lse(case, make_inputs, monkeypatch):
    """On a GPU. Traced as there but run by torch's plain operations, which have the lse on a CPU too. Queries 0 to 2
    see nothing but the sink."""
    from functools import partial

    from manyheads.engines import flex

    def without_a_kernel(program, lse):
        return torch.compile(partial(flex._attend, program=program, lse=True), backend="eager", fullgraph=True)

    monkeypatch.setattr(flex, "_compile", without_a_kernel)
    monkeypatch.setattr(flex, "_COMPILED", {})
    x = make_inputs(SINKS[case], 150, 147, kv_heads=2)
    inputs = Inputs(*x.tensors, 6**-0.5, range(150), range(3, 150), x.operands)
    expected = attention(*x.tensors, SINKS[case], engine="eager", return_lse=True, **x.operands)
    torch.testing.assert_close(flex.run(SINKS[case], inputs), expected, **EXACT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", ["a sink", "a sink and a window"])
def test_flex_has_sinks_on_a_gpu(case, make_inputs):
    """(o, lse) and gradients; float32 on both sides, summed in another order."""
    x = make_inputs(SINKS[case], 150, 200, head_dim=32, v_head_dim=32, dtype=torch.float32)
    leaves = [t.cuda().requires_grad_() for t in x.leaves]
    outcomes = []
    for engine in ("flex", "eager"):
        o, lse = attention(*leaves[:3], SINKS[case], engine=engine, return_lse=True, sink=leaves[3])
        outcomes.append((o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)))
    torch.testing.assert_close(*outcomes, atol=1e-4, rtol=1e-3)


# ---- recurrences ----


def twice(t):
    return torch.cat([t.cos(), t.sin()], -1)


def writes(n):
    return {
        "more_keys": Operand(f"batch kv_heads len {n - 1} head_dim"),
        "more_values": Operand(f"batch kv_heads len {n - 1} v_head_dim"),
        "beta": Operand(f"batch heads len {n}", lambda x: 2 * torch.sigmoid(x)),
    }


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
    "wider features": Recurrence(query_feature=twice, key_feature=twice),
    "a sum": Recurrence(query_feature=torch.exp, key_feature=torch.exp, normaliser="sum"),
    "a sum with two decays": Recurrence(
        query_feature=torch.exp, key_feature=torch.exp, normaliser="sum", decay=lambda h, heads: -(h + 1.0) / heads,
        operands={"g": Operand("batch heads len head_dim", lambda x: -x.exp())},
    ),
    "a sum of at least 2": Recurrence(
        query_feature=torch.sigmoid, key_feature=torch.sigmoid, normaliser="sum", least=2.0,
        operands={"g": Operand("batch heads len", lambda x: -x.exp())},
    ),
    "delta with a sum": Recurrence(
        write="delta", query_feature=lambda q: q.softmax(-1), key_feature=lambda k: k.softmax(-1), normaliser="sum",
        operands={"beta": Operand("batch heads len", torch.sigmoid)},
    ),
    "two writes": Recurrence(write="delta", key_feature=lambda k: k.softmax(-1), operands=writes(2)),
    "three writes with a decay for each token": Recurrence(
        write="delta", key_feature=lambda k: k.softmax(-1), default_scale=lambda d: d**-0.5,
        operands={"g": Operand("batch heads len", lambda x: -x.exp()), **writes(3)},
    ),
    "two writes with a decay for each channel and a sum": Recurrence(
        write="delta", query_feature=lambda q: q.softmax(-1), key_feature=lambda k: k.softmax(-1), normaliser="sum",
        operands={"g": Operand("batch heads len head_dim", lambda x: -x.exp()), **writes(2)},
    ),
    "slots": Recurrence(write="slots", operands={"g": Operand("batch heads len 3", lambda x: -x.exp())}),
}  # fmt: skip


def stepwise(form, x, state=None):
    """The recurrence as it is defined, one token at a time: o of every token, and the state behind the last."""
    heads = x.q.shape[1]
    q = form.query_feature(x.q) * x.q.shape[-1] ** -0.5
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (x.k, x.v))
    if form.write == "slots":
        return slotwise(q, k, v, x.operands["g"], state)
    k, v, beta = k[:, :, :, None], v[:, :, :, None], x.operands.get("beta")
    if "more_keys" in x.operands:
        k, v = (
            torch.cat([t, x.operands[m].repeat_interleave(heads // x.k.shape[1], 1)], 3)
            for t, m in ((k, "more_keys"), (v, "more_values"))
        )
    elif beta is not None:
        beta = beta[..., None]
    k = form.key_feature(k)
    if form.normaliser == "sum":
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = 0.0 * (k[:, :, 0, 0, :, None] * v[:, :, 0, 0, None]) if state is None else state
    out = []
    for t in range(k.shape[2]):
        g = torch.zeros(1, dtype=q.dtype)
        if form.decay:
            g = g + form.decay(torch.arange(heads), heads)[:, None]
        if "g" in x.operands:
            own = x.operands["g"][:, :, t]
            g = g + (own if own.ndim == 3 else own[..., None])
        state = g.exp()[..., None] * state
        for n in range(k.shape[3]):
            write = v[:, :, t, n]
            if form.write == "delta":
                write = beta[:, :, t, n, None] * (write - (k[:, :, t, n, None] @ state).squeeze(2))
            state = state + k[:, :, t, n, :, None] * write[:, :, None]
        if t >= k.shape[2] - q.shape[2]:
            out.append(q[:, :, t - k.shape[2], None] @ state)
    o = torch.cat(out, 2)
    if form.normaliser == "none":
        return o, state
    total = o[..., -1:]
    return o[..., :-1] / (total if form.least is None else total.clamp(min=form.least)), state


def slotwise(q, k, v, g, state):
    """The same for slots: K~ and V~ side by side."""
    alpha = g.exp()
    rows = torch.cat([k, v], -1)
    state = 0.0 * alpha[:, :, 0, :, None] * rows[:, :, 0, None] if state is None else state
    out = []
    for t in range(k.shape[2]):
        a = alpha[:, :, t, :, None]
        state = a * state + (1 - a) * rows[:, :, t, None]
        if t >= k.shape[2] - q.shape[2]:
            keys, values = state.split([k.shape[3], v.shape[3]], -1)
            weights = (keys @ q[:, :, t - k.shape[2], :, None]).softmax(2)
            out.append(weights.mT @ values)
    return torch.cat(out, 2), state


@pytest.mark.parametrize("given", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (70, 70), (19, 40)], ids=str)
@pytest.mark.parametrize("case", RECURRENCES)
def test_recurrences_equal_their_definition(case, sizes, given, make_inputs):
    form = RECURRENCES[case]
    x = make_inputs(form, *sizes, heads=2, kv_heads=1, head_dim=4, grad=True)
    if form.write == "delta":  # long keys would make any delta rule explode
        x.k = x.leaves[1] = (x.k / x.k.norm(dim=-1, keepdim=True)).detach().requires_grad_()
    tensors, leaves, state = (x.q, x.k, x.v), x.leaves, None
    if given:
        shape = attention(*tensors, form, return_state=True, **x.operands)[1].shape
        state = torch.rand(shape, dtype=torch.float64).requires_grad_()  # positive: a sum is divided by
        leaves = [*leaves, state]
    expected, last = stepwise(form, x, state)
    o, end = attention(*tensors, form, state=state, return_state=True, **x.operands)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(end, last, **EXACT)
    weights = torch.randn_like(o), torch.randn_like(end)
    got, wanted = (torch.autograd.grad(y, leaves, weights) for y in ((o, end), (expected, last)))
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("case", RECURRENCES)
def test_recurrences_step_by_step(case, make_inputs):
    """Each call with the state of the one before it."""
    form = RECURRENCES[case]
    x = make_inputs(form, 9, kv_heads=2)
    whole, last = attention(*x.tensors, form, return_state=True, **x.operands)
    state, found = None, []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        own = {name: t[:, :, start:stop] for name, t in x.operands.items()}
        o, state = attention(
            *(t[:, :, start:stop] for t in x.tensors), form, state=state, return_state=True, **own
        )  # fmt: skip
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)
    with pytest.raises(ValueError, match="state must be a tensor"):
        attention(*x.tensors, form, state=state[..., 1:], **x.operands)


def test_a_decay_is_not_kept_from_a_call_without_numbers():
    form = Recurrence(decay=lambda h, heads: -(h + 1.0) / heads)
    with FakeTensorMode():
        assert attention(*torch.ones(3, 1, 2, 5, 4), form).shape == (1, 2, 5, 4)
    o = attention(*torch.ones(3, 1, 2, 5, 4), form)
    assert type(o) is torch.Tensor and o.isfinite().all()


@pytest.mark.parametrize("least", [None, 3.0])
def test_without_causal_a_sum_divides_too(least, make_inputs):
    form = Recurrence(
        query_feature=torch.exp, key_feature=torch.sigmoid, normaliser="sum", least=least, causal=False
    )  # fmt: skip
    x = make_inputs(form, 5, 8, kv_heads=2, grad=True)
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    weights = x.q.exp() @ k.sigmoid().mT * 6**-0.5
    total = weights.sum(-1, keepdim=True)
    expected = weights @ v / (total if least is None else total.clamp(min=least))
    o = attention(*x.tensors, form)
    torch.testing.assert_close(o, expected, **EXACT)
    weight = torch.randn_like(o)
    got, wanted = (torch.autograd.grad(y, x.leaves, weight) for y in (o, expected))
    torch.testing.assert_close(got, wanted, **EXACT)


def test_a_sum_over_nothing_gives_zero(make_inputs):
    """No key seen: 0 and no NaN, in gradients neither, whether causal or not."""
    positions = torch.tensor([[-1, -1, -1, -1], [-1, -1, 0, 1]])
    for causal in (True, False):
        form = Recurrence(query_feature=torch.exp, key_feature=torch.exp, normaliser="sum", causal=causal)
        x = make_inputs(form, 4, grad=True)
        o = attention(*x.tensors, form, q_positions=positions, kv_positions=positions)
        assert o.transpose(1, 2)[positions < 0].eq(0).all() and o[1, :, 2:].ne(0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.square().sum(), x.leaves))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"write": "delta"}, "beta goes with write='delta'"),
        ({"operands": {"beta": Operand("batch heads len")}}, "beta goes with write='delta'"),
        (
            {"operands": {"more_keys": Operand("batch kv_heads len 1 head_dim")}},
            "more_keys and more_values go together",
        ),
        ({"write": "slots"}, "slots have an operand g"),
        ({"least": 1.0}, "'none' has none"),
        ({"key_softmax": True}, "causal=False"),
        ({"causal": False, "decay": lambda h, heads: -h}, "no decay"),
        ({"causal": False, "operands": {"g": Operand("batch heads len")}}, "no decay"),
    ],
)
def test_a_recurrence_says_what_does_not_go_together(given, match):
    with pytest.raises(ValueError, match=match):
        Recurrence(**given)


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
    for name in x.operands.keys() & {"more_keys", "more_values"}:
        x.operands[name] = x.operands[name].masked_fill(~there[:, None, None], torch.inf)
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


def test_parts_of_a_sum_each_take_the_engine_that_they_take_alone(make_inputs):
    x = make_inputs(SUM, 6)
    found = explain(*x.tensors, SUM, **x.operands)
    assert found.engine == "sdpa + eager + eager"
    assert "Recurrence" in found.objections["sdpa, part 2"] and "sdpa, part 1" not in found.objections
    assert explain(*x.tensors, SUM, engine="eager", **x.operands).engine == "eager + eager + eager"
    with pytest.raises(ValueError, match="no engine runs this: sdpa"):
        attention(*x.tensors, SUM, engine="sdpa", **x.operands)
    with pytest.raises(ValueError, match="at least one part"):
        attention(*x.tensors, Sum(parts=(), gates=()))


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
    shared = Blocks(*(t[:, :1].expand_as(t) for t in (blocks.indices, blocks.counts)))
    assert blocks.shared is blocks and shared.shared.indices.shape[1] == 1
    assert shared.to_map(7).equal(keep[:, :1].expand_as(keep)) and shared.to_map(7).stride(1) == 0
    nothing = Blocks.from_map(torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    assert not nothing.counts.any() and not nothing.to_map(3).any()


@pytest.mark.parametrize(("length", "start"), [(12, 0), (13, 0), (3, 1), (1, 1), (1, 3), (11, 2), (8, 3), (2, 0)])
def test_means_of_blocks(length, start):
    x = torch.randn(2, 3, length, 5, dtype=torch.float64)
    found = block_means(x, 4, start)
    number = (torch.arange(length) + start) // 4
    means = [x[..., number == n, :].mean(-2) for n in range(int(number[-1]) + 1)]
    torch.testing.assert_close(found, torch.stack(means, -2))
    assert block_means(x.bfloat16(), 4, start).dtype == torch.float32


def test_blocks_are_listed_in_order():
    keep = torch.rand(2, 3, 5, 7) < 0.4
    ranked = torch.where(keep, torch.rand(keep.shape), -torch.inf)
    top = ranked.topk(7)
    blocks = Blocks.from_indices(top.indices, ~top.values.isneginf())
    assert blocks.to_map(7).equal(keep) and blocks.counts.equal(keep.sum(-1))
    listed = blocks.indices[1, 0, 3, : blocks.counts[1, 0, 3]].tolist()
    assert listed == keep[1, 0, 3].nonzero().flatten().tolist()
    for count in (3, 9):
        assert best_blocks(ranked, count).to_map(7).equal(best(ranked, count))
        assert best_blocks(ranked, count).indices.shape[-1] == min(count, 7)
    every = Blocks.from_indices(torch.tensor([[[[4, 1], [0, 3]]]]))
    assert every.indices.tolist() == [[[[1, 4], [0, 3]]]] and every.counts.tolist() == [[[2, 2]]]


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
