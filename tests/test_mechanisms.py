"""What every mechanism must do, written once: a new file in manyheads/mechanisms is tested without a line here."""

from __future__ import annotations

import inspect
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manyheads import attention, explain, get, merge, names
from manyheads.core import Function, Recurrence, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.tiling import choose
from manyheads.dispatch import ENGINES

CASES = [(name, dict(settings)) for name in names() for settings in get(name).examples]
LAWS = [(name, law) for name in names() for law in get(name).laws]

# Nothing but rounding in float64 stands between two ways to the same number.
EXACT = {"atol": 1e-12, "rtol": 1e-10}

# A softmax over -inf only, or 0 / 0, shows as NaN; a leak of what must not be read shows as a huge number.
GARBAGE = 1e6


def label(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return str(value) if isinstance(value, str) else ""


def cases(*kinds, causal: bool | None = None, looks_ahead: bool = True):
    """The (name, settings) of mechanisms whose form is of one of these kinds."""
    chosen = [
        (name, settings)
        for name, settings in CASES
        if (not kinds or isinstance(get(name)(**settings), kinds))
        and (causal is None or settings.get("causal", get(name).causal) == causal)
        and (looks_ahead or not get(name).sees_future)
    ]
    return pytest.mark.parametrize(("name", "settings"), chosen, ids=label)


def close(a, b, mechanism=None, **bounds):
    bounds = bounds or EXACT
    factor = mechanism.tolerance if mechanism else 1.0
    torch.testing.assert_close(a, b, **{k: bound * factor for k, bound in bounds.items()})


# ---- right ----


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (17, 17, 6, 5), (5, 17, 4, 7), (1, 13, 3, 3), (2, 3, 1, 1)], ids=str)
@cases()
def test_equals_its_reference(name, settings, shape, make_inputs):
    """Outputs and every gradient, in float64."""
    check_against_reference(name, settings, make_inputs, *shape)


@cases(Scores, Selection)
def test_equals_its_reference_over_many_tiles(name, settings, make_inputs):
    check_against_reference(name, settings, make_inputs, 290, 300, 4, 4, batch=1, heads=2)


@cases(Recurrence)
def test_equals_its_reference_over_many_chunks(name, settings, make_inputs):
    check_against_reference(name, settings, make_inputs, 131, 140, 4, 3, batch=1, heads=2)


def check_against_reference(name, settings, make_inputs, q_len, kv_len, head_dim, v_head_dim, **sizes):
    mechanism = get(name)
    form = mechanism(**settings)
    x = make_inputs(form, q_len, kv_len, head_dim=head_dim, v_head_dim=v_head_dim, grad=True, **sizes)
    expected = mechanism.reference(*x.tensors, **settings, **x.operands)
    assert expected.shape == (*x.q.shape[:3], v_head_dim)
    o = attention(*x.tensors, form, engine="eager", **x.operands)
    close(o, expected, mechanism)
    weight = torch.randn_like(o)
    wanted = torch.autograd.grad(expected, x.leaves, weight, allow_unused=True)
    got = torch.autograd.grad(o, x.leaves, weight, allow_unused=True)
    for leaf, a, b in zip(x.leaves, got, wanted, strict=True):
        zero = torch.zeros_like(leaf)  # one token needs no query: one side may not even ask
        close(zero if a is None else a, zero if b is None else b, mechanism)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "flex"])
@cases()
def test_every_engine_is_as_exact_as_plain_torch(name, settings, engine, dtype, make_inputs):
    check_engine(name, settings, engine, dtype, make_inputs)


@cases(Scores, Selection, Recurrence)
def test_eager_computes_in_float32(name, settings, make_inputs):
    """In bfloat16, nothing but inputs and outputs is rounded."""
    form = get(name)(**settings)
    x = make_inputs(form, 21, 26, head_dim=16, dtype=torch.bfloat16)
    wide = attention(*(t.float() for t in x.tensors), form, engine="eager", **x.operands)
    assert attention(*x.tensors, form, engine="eager", **x.operands).equal(wide.bfloat16())


@pytest.mark.slow
@cases(Scores)
def test_flex_is_as_exact_as_plain_torch(name, settings, make_inputs):
    """By itself, for it compiles each structure for seconds."""
    check_engine(name, settings, "flex", torch.float32, make_inputs)


def check_engine(name, settings, engine, dtype, make_inputs):
    """The error against float64 is at most twice what the equation itself makes in that dtype.

    Roundings of the largest number come on top, for the equation may be exact by luck: one in 16 bits, and four in
    float32, where processors sum in orders of their own (2.9 at most with AVX-512, AVX2 and neither). With the
    gradients, where the engine has them.
    """
    mechanism = get(name)
    form = mechanism(**settings)
    grad = engine != "flex"
    x = make_inputs(form, 21, 26, head_dim=16, v_head_dim=16, dtype=dtype, grad=grad)
    try:
        explain(*x.tensors, form, engine=engine, **x.operands)
    except ValueError as error:
        if not str(error).startswith("no engine runs this"):
            raise
        pytest.skip(str(error))
    exact = [leaf.detach().double().requires_grad_(grad) for leaf in x.leaves]
    weight = torch.randn(*x.q.shape[:3], 16, dtype=dtype)

    def outcomes(run, leaves):
        operands = dict(zip(x.operands, leaves[3:], strict=True))
        o = run(*leaves[:3], operands)
        assert o.dtype == leaves[0].dtype
        if not grad:
            return [o]
        grads = torch.autograd.grad(o, leaves, weight.to(o.dtype), allow_unused=True)
        return [o, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True))]

    truth = outcomes(lambda q, k, v, operands: attention(q, k, v, form, engine="eager", **operands), exact)
    plain = outcomes(lambda q, k, v, operands: mechanism.reference(q, k, v, **settings, **operands), x.leaves)
    ours = outcomes(lambda q, k, v, operands: attention(q, k, v, form, engine=engine, **operands), x.leaves)
    for have, usual, want in zip(ours, plain, truth, strict=True):
        roundings = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * want.abs().max().item()
        bound = mechanism.tolerance * (2 * (usual - want).abs().max().item() + roundings)
        assert (have - want).abs().max().item() <= bound


@cases(Scores, Selection, Function)
def test_scale_multiplies_the_scores(name, settings, make_inputs):
    """The scale of four times the channels is what the equation has when three quarters of them are zero."""
    mechanism = get(name)
    form = mechanism(**settings)
    x = make_inputs(form, 9, 12, head_dim=4)
    q, k = (torch.nn.functional.pad(t, (0, 12)) for t in (x.q, x.k))
    wide = {
        n: value if form.operands[n].per_token else widened(value, form.operands[n].names)
        for n, value in x.operands.items()
    }
    expected = mechanism.reference(q, k, x.v, **settings, **wide)
    close(attention(*x.tensors, form, scale=form.default_scale(16), **x.operands), expected)


def widened(operand, names):
    """A parameter with 12 more channels, zeros, wherever it has head_dim."""
    return torch.nn.functional.pad(operand, [n for name in reversed(names) for n in (0, 12 * (name == "head_dim"))])


@cases(Recurrence)
def test_scale_multiplies_what_is_read(name, settings, make_inputs):
    """Unless it is divided by a sum with the same factor, or is a score of slots: then the features are multiplied."""
    form = get(name)(**settings)
    x = make_inputs(form, 9, 12, head_dim=4)
    o = attention(*x.tensors, form, scale=3 * form.default_scale(4), **x.operands)
    if form.write == "slots":
        tripled = replace(form, query_feature=lambda q: 3 * form.query_feature(q))
        close(o, attention(*x.tensors, tripled, **x.operands))
    else:
        factor = 1 if form.normaliser == "sum" and form.least is None else 3
        close(o, factor * attention(*x.tensors, form, **x.operands))


@pytest.mark.parametrize(("name", "law"), LAWS, ids=label)
@pytest.mark.parametrize("shape", [(17, 17), (6, 17), (1, 1)], ids=str)
def test_laws(name, law, shape, make_inputs):
    """Operands that are parameters stand as a layer starts them."""
    form, other = get(name)(**law.settings), get(law.equals)(**law.other)
    x = make_inputs(form, *shape, kv_heads=2)
    for operand_name, operand in form.operands.items():
        if not operand.per_token:
            operand.init(x.operands[operand_name])
            x.operands[operand_name] = operand.activation(x.operands[operand_name])
    shared = {operand_name: x.operands[operand_name] for operand_name in other.operands}
    one, two = attention(*x.tensors, form, engine="eager", **x.operands), attention(*x.tensors, other, **shared)
    close(one, two, get(name))


def test_power_attention_sees_what_the_paper_draws():
    """Blocks 9, 8, 7, 5, 1 and 0 from block 9: distances 0, 1, 2, 4, 8, and the first block."""
    mask = get("power_attention")(block_size=2, window_blocks=1).program.mask
    b = h = torch.zeros((), dtype=torch.long)
    seen = mask(b, h, torch.tensor(19), torch.arange(20))
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11, 14, 15, 16, 17, 18, 19]


def test_flexprefill_examples_take_both_patterns_and_leave_blocks_out(make_inputs):
    form = get("flexprefill")
    shares = {}
    for tau in (0.0, 1.0):
        one = form(gamma=0.5, tau=tau, block_size=2, min_budget=2)
        x = make_inputs(one, 40)
        blocks = one.select(x.q, x.k, scale=x.q.shape[-1] ** -0.5, offset=0)
        shares[tau] = blocks.to_map(20).sum((-2, -1)) / (20 * 21 / 2)
    assert (shares[0.0] < 0.95).all() and (shares[1.0] < 0.95).all()
    assert not shares[0.0].equal(shares[1.0])


# ---- the future, and step by step ----


@cases(causal=True, looks_ahead=False)
def test_ignores_the_future(name, settings, make_inputs):
    """Bitwise: later keys enter as products with zero, or not at all."""
    form = get(name)(**settings)
    x = make_inputs(form, 19)
    before = attention(*x.tensors, form, engine="eager", **x.operands)
    for cut in (1, 7, 18):
        changed = [t.clone() for t in x.tensors]
        for t in changed:
            t[:, :, cut:] = torch.randn_like(t[:, :, cut:]) * 100
        operands = {n: later(form.operands[n], value, cut) for n, value in x.operands.items()}
        after = attention(*changed, form, engine="eager", **operands)
        assert after[:, :, :cut].equal(before[:, :, :cut])
        assert not after[:, :, cut:].equal(before[:, :, cut:])


def later(operand, value, cut):
    """The operand with other values from token `cut` on."""
    if not operand.per_token:
        return value
    dim = operand.names.index("len")
    old, new = value.narrow(dim, 0, cut), value.narrow(dim, cut, value.shape[dim] - cut)
    return torch.cat([old, operand.activation(torch.randn_like(new))], dim)


@pytest.mark.parametrize("name", [n for n in names() if get(n).sees_future])
def test_says_that_it_sees_the_future_only_if_it_does(name, make_inputs):
    """Some output before a change moves, in one of the examples at least."""
    moved = False
    for settings in get(name).examples:
        x = make_inputs(get(name)(**settings), 19)
        before = attention(*x.tensors, get(name)(**settings))
        x.q[:, :, 18:] = torch.randn_like(x.q[:, :, 18:]) * 10
        moved |= not attention(*x.tensors, get(name)(**settings))[:, :, :17].equal(before[:, :, :17])
    assert moved


@pytest.mark.parametrize("name", [n for n in names() if not get(n).causal])
def test_says_that_it_is_not_causal_only_if_it_is_not(name, make_inputs):
    form = get(name)(**get(name).examples[0])
    x = make_inputs(form, 9)
    before = attention(*x.tensors, form, **x.operands)
    x.v[:, :, 8:] += 1
    assert not attention(*x.tensors, form, **x.operands)[:, :, 0].equal(before[:, :, 0])


@cases(Scores, Selection, Function, causal=True, looks_ahead=False)
def test_decoding_step_by_step_equals_the_whole(name, settings, make_inputs):
    form = get(name)(**settings)
    x = make_inputs(form, 14, kv_heads=2)
    whole = attention(*x.tensors, form, engine="eager", **x.operands)
    context = form.query_context if isinstance(form, Function) else 0
    for n in range(1, 15):
        operands = {
            name: value.narrow(form.operands[name].names.index("len"), 0, n) if form.operands[name].per_token else value
            for name, value in x.operands.items()
        }
        q, k, v = x.q[:, :, max(0, n - 1 - context) : n], x.k[:, :, :n], x.v[:, :, :n]
        close(attention(q, k, v, form, engine="eager", **operands)[:, :, -1], whole[:, :, n - 1])


@cases(Recurrence, causal=True)
@pytest.mark.parametrize("step", [1, 5])
def test_decoding_with_a_state_equals_the_whole(name, settings, step, make_inputs):
    form = get(name)(**settings)
    x = make_inputs(form, 14, kv_heads=2)
    whole, last = attention(*x.tensors, form, engine="eager", return_state=True, **x.operands)
    state, outputs = None, []
    for start in range(0, 14, step):
        q, k, v = (t[:, :, start : start + step] for t in x.tensors)
        operands = {
            n: value.narrow(form.operands[n].names.index("len"), start, q.shape[2]) for n, value in x.operands.items()
        }
        o, state = attention(q, k, v, form, engine="eager", state=state, return_state=True, **operands)
        outputs.append(o)
    close(torch.cat(outputs, 2), whole)
    close(state, last)


# ---- shapes of batches ----


@cases()
def test_grouped_heads_equal_repeated_heads(name, settings, make_inputs):
    """Shared heads are read in place; their gradients are the sums over the heads that share them."""
    form = get(name)(**settings)
    x = make_inputs(form, 13, 17, kv_heads=2, grad=True)
    repeated = [x.q, *(t.repeat_interleave(2, 1) for t in (x.k, x.v))]
    operands = {
        n: value.repeat_interleave(2, form.operands[n].names.index("kv_heads"))
        if "kv_heads" in form.operands[n].names
        else value
        for n, value in x.operands.items()
    }
    a = attention(*x.tensors, form, engine="eager", **x.operands)
    b = attention(*repeated, form, engine="eager", **operands)
    close(a, b)
    weight = torch.randn_like(a)
    shared, several = (torch.autograd.grad(o, x.leaves, weight, materialize_grads=True) for o in (a, b))
    for left, right in zip(shared, several, strict=True):
        close(left, right)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("side", ["left", "right"])
@cases()
def test_a_padded_row_equals_the_row_alone(name, settings, side, engine, make_inputs):
    """A batch of lengths 12, 5 and 1, then one decoding step; garbage where no token is."""
    form = get(name)(**settings)
    x = make_inputs(form, 12, batch=3, kv_heads=2, grad=True)
    lengths = [12, 5, 1]
    rows = [slice(12 - n, 12) if side == "left" else slice(0, n) for n in lengths]
    positions = torch.full((3, 12), -1)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        positions[b, row] = torch.arange(n)
    with torch.no_grad():
        for t in x.tensors:
            t[(positions < 0)[:, None, :, None].expand_as(t)] = GARBAGE

    for steps in (12, 1):  # the whole prompt; then the last token of each row alone
        q_rows = rows if steps == 12 else [slice(0, 1)] * 3
        q = x.q if steps == 12 else torch.stack([x.q[b, :, row][:, -1:] for b, row in enumerate(rows)])
        q_positions = positions if steps == 12 else torch.tensor(lengths)[:, None] - 1
        o = attention(q, x.k, x.v, form, engine=engine, q_positions=q_positions, kv_positions=positions, **x.operands)
        grads = torch.autograd.grad(o.square().sum(), x.leaves, allow_unused=True)
        for b, row in enumerate(rows):
            operands = {key: alone(form.operands[key], value, b, row) for key, value in x.operands.items()}
            leaves = (q[b : b + 1, :, q_rows[b]], x.k[b : b + 1, :, row], x.v[b : b + 1, :, row])
            expected = attention(*leaves, form, engine="eager", **operands)
            close(o[b : b + 1, :, q_rows[b]], expected)
            assert o[b, :, [c for c in range(q.shape[2]) if positions[b, c] < 0 and steps == 12]].eq(0).all()
            own = torch.autograd.grad(expected.square().sum(), x.v)[0]
            close(grads[2][b], own[b])
        for grad, leaf in zip(grads[1:3], x.leaves[1:3], strict=True):
            grad = torch.zeros_like(leaf) if grad is None else grad
            assert grad[(positions < 0)[:, None, :, None].expand_as(grad)].eq(0).all()


def alone(operand, value, b, row):
    if operand.names[0] == "batch":
        value = value[b : b + 1]
    if not operand.per_token:
        return value
    dim = operand.names.index("len")
    return value.narrow(dim, row.start, row.stop - row.start)


def has_lse(form):
    return (form.scores if isinstance(form, Selection) else form).has_lse


@cases(Scores)
def test_split_and_merged_equals_whole(name, settings, make_inputs):
    """Keys in three uneven parts, out of order, each known by its positions. One part has the sink."""
    form = get(name)(**settings)
    if form.normaliser in ("entmax", "top_k"):
        pytest.skip(f"{form.normaliser} looks at all keys at once")
    x = make_inputs(form, 9, 20, kv_heads=2)
    asked = {"return_lse": True} if has_lse(form) else {}
    whole = attention(*x.tensors, form, engine="eager", **asked, **x.operands)
    q_positions = torch.arange(11, 20)
    parts = []
    for keys in torch.randperm(20).split([1, 12, 7]):
        operands = {
            n: value.index_select(form.operands[n].names.index("len"), keys) if form.operands[n].per_token else value
            for n, value in x.operands.items()
        }
        if form.sink is not None and parts:
            operands[form.sink] = torch.full_like(operands[form.sink], -torch.inf)
        k, v, at = x.k[:, :, keys], x.v[:, :, keys], {"q_positions": q_positions, "kv_positions": keys}
        parts.append(attention(x.q, k, v, form, engine="eager", **at, **asked, **operands))
    if not has_lse(form):
        close(sum(parts), whole)
        return
    o, lse = merge(merge(parts[0], parts[1]), parts[2])
    close(o, whole[0])
    close(lse, whole[1])


@cases(Scores, causal=True)
def test_queries_without_a_key_give_zero(name, settings, make_inputs):
    """Seven queries, four keys that stand at the end: the first three see nothing, and pass nothing back."""
    form = get(name)(**settings)
    x = make_inputs(form, 7, 4, kv_heads=2, grad=True)
    o = attention(*x.tensors, form, engine="eager", **x.operands)
    assert o[:, :, :3].eq(0).all()
    at = torch.arange(3, 7)
    q, k, v = x.q[:, :, 3:], x.k, x.v
    close(o[:, :, 3:], attention(q, k, v, form, engine="eager", q_positions=at, kv_positions=at, **x.operands))
    for engine in ("auto", "eager"):
        o = attention(*x.tensors, form, engine=engine, **x.operands)
        grads = torch.autograd.grad(o.sum(), x.leaves)
        assert all(g.isfinite().all() for g in grads) and grads[0][:, :, :3].eq(0).all()
    if not has_lse(form):
        return
    lse = attention(*x.tensors, form, return_lse=True, **x.operands)[1]
    seen_nothing = lse[:, :, :3]
    assert seen_nothing.isneginf().all() if form.sink is None else seen_nothing.eq(x.operands[form.sink][:, None]).all()
    assert lse[:, :, 3:].isfinite().all()
    grads = torch.autograd.grad(lse[:, :, 3:].sum(), x.leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@cases()
def test_a_row_without_tokens_gives_zero(name, settings, engine, make_inputs):
    form = get(name)(**settings)
    x = make_inputs(form, 6, kv_heads=2, grad=True)
    positions = torch.stack([torch.full((6,), -1), torch.arange(6)])
    for at in (positions, torch.full_like(positions, -1)):
        o = attention(*x.tensors, form, engine=engine, q_positions=at, kv_positions=at, **x.operands)
        assert o.transpose(1, 2)[at < 0].eq(0).all()
        assert o[1].ne(0).any() == (at is positions)
        grads = torch.autograd.grad(o.square().sum(), x.leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@cases()
def test_takes_no_tokens_at_all(name, settings, engine, make_inputs):
    form = get(name)(**settings)
    x = make_inputs(form, 3, grad=True)
    operands = {
        n: value.narrow(form.operands[n].names.index("len"), 0, 0) if form.operands[n].per_token else value
        for n, value in x.operands.items()
    }
    q, k, v = (t[:, :, :0] for t in x.tensors)
    o = attention(q, k, v, form, engine=engine, **operands)
    assert o.shape == (2, 4, 0, 5)
    o.sum().backward()


@pytest.mark.parametrize("engine", ["eager", "auto"])
@cases()
def test_takes_tensors_that_are_not_contiguous(name, settings, engine, make_inputs):
    form = get(name)(**settings)
    x = make_inputs(form, 11)
    expected = attention(*x.tensors, form, engine="eager", **x.operands)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x.tensors]
    strided = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in x.tensors]
    operands = {n: torch.stack([value, value + 1], -1)[..., 0] for n, value in x.operands.items()}
    for tensors in (transposed, strided):
        assert not any(t.is_contiguous() for t in tensors)
        close(attention(*tensors, form, engine=engine, **operands), expected)


@cases()
def test_an_operand_may_be_the_same_for_all(name, settings, make_inputs):
    """Size 1 stands for any size."""
    form = get(name)(**settings)
    x = make_inputs(form, 20, batch=2)
    for key, value in x.operands.items():
        for dim in range(value.ndim):
            one = value.narrow(dim, 0, 1)
            a = attention(*x.tensors, form, engine="eager", **{**x.operands, key: one})
            close(a, attention(*x.tensors, form, engine="eager", **{**x.operands, key: one.expand_as(value).clone()}))


# ---- memory, lse ----


class Memory(TorchDispatchMode):
    """The bytes of all storages that operations made and that are alive: at their peak, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.alive:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


LONG = 3000  # no multiple of any tile


def memory(form, length, engine, grad, make_inputs) -> Memory:
    x = make_inputs(form, length, batch=1, heads=1, head_dim=4, v_head_dim=4, dtype=torch.float32, grad=grad)
    with Memory() as used:
        o = attention(*x.tensors, form, engine=engine, **x.operands)
        if grad:
            o.sum().backward()
    return used


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("engine", ["eager", "auto"])
@cases(Scores, Selection, Recurrence)
def test_memory_is_linear(name, settings, engine, grad, make_inputs):
    """Twice the length takes twice the memory, what waits for the backward pass included."""
    mechanism = get(name)
    form = mechanism(**(mechanism.at(LONG) if isinstance(mechanism(), Selection) else settings))
    few, many = (memory(form, length, engine, grad, make_inputs) for length in (LONG // 2, LONG))
    assert many.peak <= 2.3 * few.peak
    assert many.largest <= LONG * LONG * 4 / 4, "no matrix of scores, nor a quarter of one"


def test_a_window_computes_its_window_only(make_inputs):
    """Not a chunk of queries against all keys, nor half of that."""
    used = memory(get("sliding_window")(window=100, sinks=2), LONG, "eager", True, make_inputs)
    assert used.largest <= 256 * LONG * 4 / 2


@cases(Scores, Selection)
def test_lse_is_differentiable(name, settings, make_inputs):
    form = get(name)(**settings)
    if not has_lse(form):
        pytest.skip("weights that nothing divides have no lse")
    x = make_inputs(form, 5, batch=1, heads=2, kv_heads=1, head_dim=3, v_head_dim=2, grad=True)

    def lse(q, k, *operands):
        given = dict(zip(x.operands, operands, strict=True))
        return attention(q, k, x.v.detach(), form, engine="eager", return_lse=True, **given)[1]

    assert torch.autograd.gradcheck(lse, (x.q, x.k, *x.operands.values()))


@cases(Scores)
def test_lse_is_the_logarithm_of_the_sum(name, settings, make_inputs):
    form = get(name)(**settings)
    if not has_lse(form):
        pytest.skip("weights that nothing divides have no lse")
    x = make_inputs(form, 9, 12)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(4)[None, :, None, None]
    i, j = torch.arange(3, 12)[None, None, :, None], torch.arange(12)
    s = form.program.score(x.q @ x.k.mT * form.default_scale(6), b, h, i, j, **x.operands)
    s = s.abs() if form.normaliser == "signed" else s
    mask = form.program.mask(b, h, i, j)
    s = s.masked_fill(~mask, -torch.inf)
    if form.sink is not None:
        s = torch.cat([s, x.operands[form.sink][:, None, None].expand(*s.shape[:-1], 1)], -1)
    expected = s.logsumexp(-1)
    close(attention(*x.tensors, form, return_lse=True, **x.operands)[1], expected)


# ---- what a file says about itself ----


@pytest.mark.parametrize("name", names())
def test_a_file_says_what_it_is(name):
    mechanism = get(name)
    module = inspect.getmodule(mechanism.factory)
    assert mechanism.name == name == mechanism.factory.__name__ == module.__name__.rpartition(".")[2]
    assert mechanism.family == module.__name__.split(".")[-2]
    assert re.fullmatch(r"[a-z0-9-]*", mechanism.system)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", mechanism.arxiv)
    text = mechanism.text
    assert re.fullmatch(r"[^\n].*\.", mechanism.summary), "the first paragraph is one sentence"
    assert ". " not in mechanism.summary
    assert re.search(r"^ {4}.*=", text, re.MULTILINE), "an equation, indented"
    assert f"arXiv:{mechanism.arxiv}" in text
    assert mechanism.factory.__doc__ and mechanism.examples
    assert mechanism.tolerance == 1.0 or mechanism.tolerance_reason


@pytest.mark.parametrize("name", names())
def test_equal_settings_give_the_same_form(name):
    mechanism = get(name)
    assert mechanism() is mechanism(**mechanism.settings)
    settings = mechanism.examples[-1]
    assert mechanism(**settings) is mechanism(**{**mechanism.settings, **settings})


@pytest.mark.parametrize("name", names())
def test_reference_takes_the_settings_and_operands(name):
    """An operand that only some settings have is None by default."""
    mechanism = get(name)
    taken = inspect.signature(mechanism.reference).parameters
    forms = [mechanism(**settings) for settings in ({}, *mechanism.examples)]
    operands = {operand: None for form in forms for operand in form.operands}
    always = {operand: inspect.Parameter.empty for operand in operands if all(operand in f.operands for f in forms)}
    expected = {**mechanism.settings, **operands, **always}
    assert {n: p.default for n, p in taken.items() if n not in ("q", "k", "v")} == expected


@pytest.mark.parametrize("name", [n for n in names() if get(n).at and not isinstance(get(n)(), Function)])
def test_settings_for_a_context_keep_about_a_quarter(name, make_inputs):
    """Of the keys that the last query of 2048 may see."""
    form = get(name)(**get(name).at(2048))
    x = make_inputs(form, 2048, batch=1, dtype=torch.float32, head_dim=8)
    if isinstance(form, Selection):
        inputs = Inputs(*x.tensors, 8**-0.5, *default_positions(2048, 2048))
        kept = choose(form, inputs).counts[..., -1].float().mean().item() * form.key_block
    else:
        zero = torch.zeros((), dtype=torch.long)
        kept = form.program.mask(zero, zero, torch.tensor(2047), torch.arange(2048)).sum().item()
    assert 0.2 < kept / 2048 < 0.3 or (get(name).sees_future and kept < 2048)
