"""Queries in rounds on the Hopper kernels: their order, the tables, and the kernels over them, emulated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator
import test_hopper
from test_hopper import inputs, on_hopper

from manyheads import attention, get
from manyheads.core.attending import rebound
from manyheads.core.dropout import Dropout
from manyheads.core.forms import Blocks, Operand, Scores, Selection
from manyheads.core.tiling import choose
from manyheads.engines import eager, triton
from manyheads.engines.triton import hopper, launch, op
from manyheads.engines.triton.hopper import forward, moving, ordering, rounds, tables

emulated = test_hopper.emulated
CAP = 5.0

SCORES = {
    "full": Scores(),
    "causal": Scores(mask=lambda b, h, i, j: j <= i),
    "soft-cap": Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)),
    "of keys": Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: s - 0.01 * (j % 7)),
    "signed": Scores(mask=lambda b, h, i, j: j <= i, normaliser="signed"),
}


@pytest.fixture
def moved(emulated, monkeypatch):
    use_emulated(monkeypatch)


def use_emulated(monkeypatch):
    for name, kernels in (("ordering", ("mark", "count", "place")), ("moving", ("gather", "merge", "add"))):
        module = emulator.load_plain(name)
        for kernel in kernels:
            place = getattr(ordering if name == "ordering" else moving, name)
            monkeypatch.setattr(place, kernel, emulator.Kernel(getattr(module, kernel)))


def selection(scores, x, width=2, query_block=1, key_block=128, seed=0, own=0.9, fewer=0.3):
    """Lists of `width` blocks drawn at random, a query's own among them for a share of `own`, later ones for others;
    a share of `fewer` of the lists has fewer, or none."""
    draw = torch.Generator().manual_seed(seed)
    first, columns = x.q_positions.start // query_block, -(-x.kv_len // key_block)
    rows = -(-x.q_positions.stop // query_block) - first
    likes = torch.rand(x.batch, x.heads, rows, columns, generator=draw)
    at = torch.arange(first, first + rows) * query_block // key_block
    likes -= ((torch.rand(likes.shape, generator=draw) < 0.8) & (torch.arange(columns) > at[:, None])).float()
    self_too = torch.rand(likes.shape[:-1], generator=draw) < own
    likes[..., torch.arange(rows), at] += 2 * self_too
    indices = likes.topk(min(width, columns), -1).indices
    number = torch.randint(0, indices.shape[-1] + 1, self_too.shape, generator=draw)
    number = torch.where(torch.rand(number.shape, generator=draw) < fewer, number, indices.shape[-1])
    there = torch.arange(indices.shape[-1]) < number[..., None]
    blocks = Blocks.from_indices(indices.to(x.q.device), there.to(x.q.device))
    return Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=scores, query_block=query_block, key_block=key_block,
        operands=scores.operands,
    )  # fmt: skip


def rounds_of(form, x):
    assert hopper.selected.why_not(form, x) is None and rounds.able(form, x)
    return rounds.Rounds(choose(form, x), form.query_block, form.key_block)


def check(form, x):
    """o, lse and the gradients against eager in float64."""
    torch.manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, lse = eager.run(form, wide)
    do, dlse = torch.randn_like(o).to(x.q.dtype), torch.randn_like(lse).float()
    seen = lse > -torch.inf
    loss = (o * do).sum() + torch.where(seen, lse * dlse, 0).sum()
    true = torch.autograd.grad(loss, [wide.q, wide.k, wide.v])
    chosen = rounds_of(form, x)
    found_o, found_lse = hopper.run(form.scores, x, chosen)
    assert torch.isfinite(found_o).all() and torch.equal(found_lse > -torch.inf, seen)
    assert (found_o[~seen] == 0).all()
    torch.testing.assert_close(found_lse[seen].double(), lse[seen].detach(), atol=1e-4, rtol=1e-4)
    assert (found_o.double() - o).norm() <= 5e-3 * o.norm()
    found = hopper.gradients(form.scores, x, found_o, found_lse, do, torch.where(seen, dlse, 0), chosen=chosen)
    for name, a, b in zip("qkv", found, true, strict=True):
        assert a is not None and a.dtype == x.q.dtype and torch.isfinite(a).all()
        assert (a.double() - b).norm() <= 1e-2 * b.norm(), name


# ---- the order ----


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 500), st.integers(0, 300)), batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]), query_block=st.sampled_from([1, 4, 48]),
    key_block=st.sampled_from([128, 256]), width=st.integers(1, 4), past=st.booleans(), seed=st.integers(0, 99),
    cut=st.sampled_from([2**30, 900, 1]), shared=st.booleans(),
)  # fmt: skip
def test_the_order_against_brute_force(lengths, batch, heads, query_block, key_block, width, past, seed, cut, shared):
    """Each entry that has a place has one of its own, among those of its block, in the order of its rows; tables say
    whose keys each tile of places needs."""
    q_len, before = lengths
    x = inputs(q_len, q_len + before, heads=heads[0], kv_heads=heads[1], batch=batch, dim=8)
    form = selection(SCORES["causal"], x, width, query_block, key_block, seed)
    blocks, start, group = choose(form, x), before, heads[0] // heads[1]
    if shared:
        blocks = Blocks(*(t[:, :1].expand_as(t) for t in (blocks.indices, blocks.counts)))
    keep = blocks.to_map(-(-x.kv_len // key_block))
    seen = torch.zeros(x.q.shape[:3], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        use_emulated(patch)
        patch.setattr(ordering, "LEAST", cut)
        patch.setattr(ordering, "MOST", cut)
        for part in ordering.parts(x, blocks.indices.shape[3], 1):
            y = part.of(x)
            order = ordering.order_of(blocks, y, part, start, query_block, key_block, past)
            seen[part.own] = True
            i = torch.arange(y.q_positions.start, y.q_positions.stop)
            chosen = keep[part.batch, part.heads][:, :, i // query_block - start // query_block]
            number = order.ends.shape[2]
            if past:
                own = chosen.gather(-1, (i // key_block)[:, None].expand(*chosen.shape[:2], -1, 1)).squeeze(-1)
                assert order.own is not None and order.own.bool().equal(own)
                chosen = chosen & (torch.arange(chosen.shape[-1]) < (i // key_block)[:, None])
                assert not chosen[..., number:].any()
            check_order(order, chosen[..., :number], y, group)
            check_tables(order, y, key_block)
    assert seen.all()


def check_order(order, chosen, y, group):
    """chosen: bool [batch, heads, queries, blocks]."""
    places = order.rows.shape[2]
    assert places % 128 == 0 and (order.ends % 128 == 0).all() and (order.ends <= places).all()
    for b, h in product(range(y.batch), range(y.kv_heads)):
        members, rows = chosen[b, h * group : (h + 1) * group], order.rows[b, h]
        begin = 0
        for n, end in enumerate(order.ends[b, h].tolist()):
            own = members[..., n].flatten().nonzero().flatten()
            assert rows[begin : begin + len(own)].equal(own.int()) and (rows[begin + len(own) : end] == -1).all()
            assert end == begin + -(-len(own) // 128) * 128
            begin = end
        assert (rows[begin:] == -1).all()
        slots = order.slots[b, h * group : (h + 1) * group].flatten(0, 1)
        for row, line in enumerate(slots.tolist()):
            assert all(rows[slot] == row for slot in line if slot >= 0)
            at = torch.searchsorted(order.ends[b, h], torch.tensor([s for s in line if s >= 0]), right=True)
            assert at.sort().values.equal(members.flatten(0, 1)[row].nonzero().flatten())


def check_tables(order, y, key_block):
    z = y.with_(q=y.q.new_zeros(*order.rows.shape, 8), q_positions=range(order.rows.shape[2]))
    for keys in (64, 128):
        table = order.table_of(SCORES["full"].program, z, (128, keys), {})
        assert table.kind == tables.RANGES and not table.partial
        for b, h in product(range(y.batch), range(y.kv_heads)):
            for r, (lo, hi, f0, f1) in enumerate(table.values[b, h].tolist()):
                block = int((order.ends[b, h] <= r * 128).sum())
                if block == order.ends.shape[2]:
                    assert hi - lo == -1
                else:
                    assert lo == f0 == block * key_block // keys
                    assert hi == -(-min((block + 1) * key_block, y.kv_len) // keys)
                    assert f1 == min((block + 1) * key_block, y.kv_len) // keys
    for queries in (32, 64, 128):
        table = order.table_of(SCORES["full"].program, z, (queries, 128), {}, turned=True)
        assert table.kind == tables.RANGES and not table.partial
        for b, h in product(range(y.batch), range(y.kv_heads)):
            ends = [0, *order.ends[b, h].tolist()]
            for t, (lo, hi, f0, f1) in enumerate(table.values[b, h].tolist()):
                block = t * 128 // key_block
                expected = ends[block : block + 2] if block < len(ends) - 1 else [lo * queries, lo * queries]
                assert [lo * queries, hi * queries] == expected and (lo, hi) == (f0, f1)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 700), st.integers(0, 400), st.integers(0, 400)),
    key_block=st.sampled_from([128, 256, 384]), tile=st.sampled_from([(128, 64), (128, 128), (64, 128), (32, 128)]),
    turned=st.booleans(),
)  # fmt: skip
@example(lengths=(128, 126, 0), key_block=256, tile=(128, 64), turned=False)
@example(lengths=(256, 1, 0), key_block=256, tile=(64, 128), turned=True)
def test_tables_of_own_blocks(lengths, key_block, tile, turned):
    """Against the mask: queries may be a part, with keys behind them."""
    q_len, before, behind = lengths
    kv_len = before + q_len + behind
    x = inputs(q_len, kv_len, dim=8).with_(q_positions=range(before, before + q_len))
    if not turned:
        tile = 128, tile[1]
    own, _ = rounds.forms_of(SCORES["causal"], before, key_block)
    table = ordering.Own(key_block).table_of(own.program, x, tile, {}, turned)
    i, j = torch.arange(before, before + q_len)[:, None], torch.arange(kv_len)
    allowed = (j <= i) & (i // key_block == j // key_block)
    mask = own.program.mask(*torch.zeros(2), i, j)
    (rows, columns), allowed, mask = (tile[::-1], allowed.mT, mask.mT) if turned else (tile, allowed, mask)
    assert table.values.shape == (1, 1, -(-allowed.shape[0] // rows), 4)
    for r, (lo, hi, f0, f1) in enumerate(table.values[0, 0].tolist()):
        line = allowed[r * rows : (r + 1) * rows]
        parts = line.split(columns, 1)
        seen = mask[r * rows : (r + 1) * rows, lo * columns : hi * columns]
        assert seen.equal(line[:, lo * columns : hi * columns]), "the mask cuts what tiles do not"
        assert hi >= lo and [t for t, part in enumerate(parts) if part.any()] == list(range(lo, hi))
        full = [t for t, part in enumerate(parts) if part.all() and part.shape[1] == columns]
        assert [t for t in range(lo, hi) if f0 <= t < f1] == full or (turned and line.shape[0] < rows)


# ---- the kernels ----


@pytest.mark.parametrize("name", SCORES)
def test_forms(moved, name):
    x = inputs(400, 400)
    check(selection(SCORES[name], x), x)


def test_places_without_a_row_have_no_score_of_their_own(moved):
    """A score whose derivative is infinite at 0, which is what zeros would score."""
    x = inputs(64, 192)
    scores = Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: abs(s) ** 0.5)
    check(selection(scores, x), x)


def test_a_batch_of_nothing(moved):
    x = inputs(300, 300)
    x = x.with_(**{name: getattr(x, name)[:0] for name in "qkv"})
    assert not rounds.able(selection(SCORES["causal"], x), x)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1)])
def test_groups(moved, heads, kv_heads):
    x = inputs(300, 300, heads=heads, kv_heads=kv_heads, batch=2)
    check(selection(SCORES["causal"], x), x)


@pytest.mark.parametrize("lengths", [(1, 300), (129, 129), (65, 321), (200, 584), (256, 256)])
@pytest.mark.parametrize("key_block", [128, 256])
def test_lengths(moved, lengths, key_block):
    x = inputs(*lengths, batch=2, heads=2, kv_heads=1)
    check(selection(SCORES["causal"], x, key_block=key_block), x)
    check(selection(SCORES["full"], x, key_block=key_block), x)


@pytest.mark.parametrize("query_block", [4, 16, 96])
def test_blocks_of_queries(moved, query_block):
    x = inputs(300, 492, heads=2, kv_heads=1)  # from 192 on, a multiple of 32 in all of these blocks
    check(selection(SCORES["causal"], x, query_block=query_block), x)


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (256, 256), (72, 40)])
def test_sizes(moved, dim, v_dim):
    x = inputs(200, 328, heads=2, kv_heads=1, dim=dim, v_dim=v_dim)
    check(selection(SCORES["causal"], x), x)


@pytest.mark.parametrize(("most", "number"), [(2 * 4 * 260, 2), (2 * 2 * 260, 4), (1, 12)])
def test_parts(moved, monkeypatch, most, number):
    """A batch at a time, a key head, and some of the queries."""
    monkeypatch.setattr(ordering, "LEAST", most)
    monkeypatch.setattr(ordering, "MOST", most)
    x = inputs(260, 331, heads=4, kv_heads=2, batch=2)
    assert len([*ordering.parts(x, 2, 1)]) == number
    check(selection(SCORES["causal"], x), x)


def test_strides(moved):
    """Heads behind tokens, a gradient that is one number, and rows with a step."""
    x = inputs(300, 300)
    turned = {name: getattr(x, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    y = x.with_(**turned)
    wide = x.with_(q=torch.cat([x.q, x.q], -1)[..., ::2].contiguous().repeat_interleave(2, -1)[..., ::2])
    form = selection(SCORES["causal"], x)
    for a, b in ((x, y), (wide.with_(q=wide.q.contiguous()), wide)):
        found = []
        for z in (a, b):
            o, lse = hopper.run(form.scores, z, rounds_of(form, z))
            do = torch.ones((), dtype=o.dtype).expand(o.shape)
            found.append([o, lse, *hopper.gradients(form.scores, z, o, lse, do, None, chosen=rounds_of(form, z))])
        assert all(map(torch.equal, *found))


def test_scores_far_below_zero(moved):
    """A place without a row has scores of 0, and weights of 0 all the same."""
    x = inputs(300, 300, heads=2)
    check(selection(SCORES["causal"], x), x.with_(q=x.q - 5, k=x.k + 5))


@pytest.mark.parametrize("name", ["causal", "full"])
def test_rows_without_blocks(moved, name):
    x = inputs(300, 300, heads=2)
    form = selection(SCORES[name], x, own=0.2, fewer=0.9)
    assert (choose(form, x).counts == 0).any()
    check(form, x)
    nothing = Blocks(torch.full((1, 2, 300, 2), 10**6), torch.zeros(1, 2, 300, dtype=torch.long))
    check(replace(form, select=lambda q, k, *, scale, offset: nothing), x)


def test_sinks(moved, monkeypatch):
    """As many numbers as heads, one of them -inf, also for queries that see nothing else; a key head at a time."""
    monkeypatch.setattr(ordering, "LEAST", 1200)
    monkeypatch.setattr(ordering, "MOST", 1200)
    scores = Scores(mask=SCORES["causal"].mask, sink="sink", operands={"sink": Operand("heads")})
    x = inputs(300, 300).with_(operands={"sink": torch.tensor([-3.0, -torch.inf, 0.5, 4.0])})
    assert len([*ordering.parts(x, 2, 1)]) == 2
    check(selection(scores, x, fewer=0.6), x)
    check(selection(Scores(sink="sink", operands=scores.operands), x, fewer=0.6), x)


def test_only_what_is_needed(moved):
    x = inputs(200, 200, heads=2)
    form = selection(SCORES["causal"], x)
    o, lse = hopper.run(form.scores, x, rounds_of(form, x))
    run = partial(hopper.gradients, form.scores, x, o, lse, o, None, chosen=rounds_of(form, x))
    every = run()
    for needed in product([False, True], repeat=3):
        for wanted, a, b in zip(needed, run(needed=needed), every, strict=True):
            assert torch.equal(a, b) if wanted else a is None


def test_the_same_bits_every_run(moved):
    x = inputs(300, 300, heads=2)
    form = selection(SCORES["causal"], x)
    o, lse = hopper.run(form.scores, x, rounds_of(form, x))
    grads = [hopper.gradients(form.scores, x, o, lse, o, None, chosen=rounds_of(form, x)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- when ----


def test_when_they_are_run():
    """By sizes, and where copies of queries may be computed with anywhere."""
    x = inputs(8192, 8192, heads=1, kv_heads=1, dim=8)

    def how(scores=SCORES["causal"], y=x, width=2, **sizes):
        form = selection(scores, y, width, **{"key_block": 512, **sizes})
        return type(hopper.chosen_of(form, y, choose(form, y)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper.selected.quick, "launch", lambda *args, **options: None)
        assert how() is how(key_block=128) is how(SCORES["soft-cap"]) is how(SCORES["full"]) is rounds.Rounds
        assert how(width=3) is rounds.Rounds and how(width=4) is not rounds.Rounds  # 8 of 16 blocks, 1152 for 512 keys
        assert how(SCORES["full"], width=7) is rounds.Rounds and how(SCORES["full"], width=8) is not rounds.Rounds
        assert how(query_block=32) is rounds.Rounds and how(query_block=64) is not rounds.Rounds
        assert how(key_block=64) is not rounds.Rounds and how(key_block=192) is not rounds.Rounds
        for mask, score in (
            (lambda b, h, i, j: (j <= i) & (i - j < 999), None),
            (SCORES["causal"].mask, lambda s, b, h, i, j: s + i - j),
            (SCORES["causal"].mask, lambda s, b, h, i, j: s * (h + 1)), (None, lambda s, b, h, i, j: s + 0.1 * b),
        ):  # fmt: skip
            assert how(Scores(mask=mask, score=score)) is not rounds.Rounds
        assert how(Scores(mask=SCORES["causal"].mask, normaliser="none")) is not rounds.Rounds
        assert how(y=x.with_(dropout=Dropout(0.3, torch.tensor([5])))) is not rounds.Rounds


@pytest.mark.parametrize("block_size", [128, 512, 4096])
def test_moba_is_run_in_rounds(block_size):
    n = 16 * block_size
    x = inputs(1, n, heads=1, kv_heads=1, dim=8).with_(q=torch.empty(1, 1, n, 8, device="meta"), q_positions=range(n))
    blocks = Blocks(torch.empty(1, 1, n, 3, device="meta"), torch.empty(1, 1, n, device="meta"))
    assert rounds.pay(get("moba")(block_size=block_size), x, blocks) == (block_size > 128)


# ---- the engine ----


@pytest.fixture
def engine(moved, monkeypatch):
    """The Triton engine as on a Hopper GPU, where rounds always pay; says how it ran the kernels."""
    seen, run = [], forward.run
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    monkeypatch.setattr(rounds, "COPIED", -127)
    monkeypatch.setattr(forward, "run", lambda form, x, **how: seen.append(type(how["chosen"])) or run(form, x, **how))
    return seen


def test_gradients_from_loss_to_leaves(engine, monkeypatch):
    scores = Scores(mask=SCORES["causal"].mask, sink="sink", operands={"sink": Operand("heads")})
    monkeypatch.setattr(launch, "row_delta", row_delta)  # a kernel for any GPU, for the sinks
    x = inputs(300, 300).with_(operands={"sink": torch.randn(4, requires_grad=True)})
    form = selection(scores, x)
    leaves = [*(getattr(x, name).requires_grad_() for name in "qkv"), x.operands["sink"]]
    wide = x.with_(**{name: getattr(x, name).detach().double().requires_grad_() for name in "qkv"})
    sink = x.operands["sink"].detach().double().requires_grad_()
    wide = wide.with_(operands={"sink": sink})
    o, lse = triton.run(form, x)
    true, true_lse = eager.run(form, wide)
    assert engine == [ordering.Own, ordering.Order]
    for found, b in ((o, true), (lse, true_lse)):
        found = torch.autograd.grad(found.square().sum(), leaves, retain_graph=True, materialize_grads=True)
        b = torch.autograd.grad(
            b.square().sum(), [wide.q, wide.k, wide.v, sink], retain_graph=True, materialize_grads=True
        )
        for one, other in zip(found, b, strict=True):
            assert (one.double() - other).norm() <= 1e-2 * other.norm()


def row_delta(o, do, dlse, call):
    return (o.float() * do.float()).sum(-1) - (0 if dlse is None else dlse)


def test_operators_take_rounds(engine):
    """What torch.compile sees: the same bits as without it, and the backward pass in rounds too."""
    x = inputs(300, 300)
    form = selection(SCORES["causal"], x)
    leaves, found = [getattr(x, name).requires_grad_() for name in "qkv"], []
    for run in (triton.run, op.ATTEND):
        o, lse = run(form, x)
        found.append([o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)])
    assert all(map(torch.equal, *found))
    assert engine == 2 * [ordering.Own, ordering.Order]


def test_what_functions_captured_may_be_given_anew():
    """torch.compile hands over captured tensors of its own."""
    slopes, others = torch.rand(7), torch.rand(7)
    form = Scores(mask=SCORES["causal"].mask, score=lambda s, b, h, i, j: s * slopes[j % 7])
    for scores in (form, rebound(form, [others])):
        for part in (*rounds.forms_of(scores, 0, 128), *rounds.forms_of(scores, 3, 128)):
            assert part is not None and part.program.tensors[0] is scores.program.tensors[0]


def test_nothing_is_waited_for(monkeypatch):
    """A meta tensor has no values: whoever asked for one would hear of it."""
    monkeypatch.setattr(rounds.quick, "launch", lambda entry, programs, arguments, **options: None)
    x = inputs(1000, 1000, batch=2)
    form = selection(SCORES["causal"], x)
    chosen = choose(form, x)
    x = x.with_(**{name: getattr(x, name).to("meta") for name in "qkv"})
    blocks = Blocks(chosen.indices.to("meta"), chosen.counts.to("meta"))
    for part in ordering.parts(x, 2, 1):
        order = ordering.order_of(blocks, part.of(x), part, 0, 1, 128, True)
        y = moving.at_places(part.of(x), order)
        for tile, turned in (((128, 64), False), ((64, 128), True)):
            assert order.table_of(SCORES["causal"].program, y, tile, {}, turned).values.device.type == "meta"


def test_what_moves_rows_compiles(monkeypatch):
    """What is emulated here is Triton."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import compiled

    for name, make in compiled.round_kernels():
        text = make().asm["ptx"]
        moves = name.split()[0] in ("gather", "merge", "add")
        assert not moves or ("ld.global.v4" in text and "st.global.v4" in text), "16 bytes at a time"


# ---- on a GPU ----


def on_gpu(q_len, kv_len, **sizes):
    return inputs(q_len, kv_len, device="cuda", **sizes)


@on_hopper
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_forms_on_a_gpu(dim, name):
    x = on_gpu(1500, 1500, heads=8, batch=2, dim=dim)
    check(selection(SCORES[name], x, width=4), x)
    check(selection(SCORES[name], x, width=2, key_block=512, own=0.5, fewer=0.7), x)


@on_hopper
@pytest.mark.parametrize("lengths", [(1, 300), (129, 129), (65, 321), (200, 584), (2049, 3001)])
@pytest.mark.parametrize("key_block", [128, 256])
def test_lengths_on_a_gpu(key_block, lengths):
    x = on_gpu(*lengths, heads=7, kv_heads=1, dim=72)
    check(selection(SCORES["causal"], x, width=3, key_block=key_block), x)
    check(selection(SCORES["full"], x, width=3, key_block=key_block), x)


@on_hopper
def test_parts_on_a_gpu(monkeypatch):
    x = on_gpu(2000, 2500, heads=4, kv_heads=2, batch=2, dim=128)
    form = selection(SCORES["causal"], x, width=3)
    whole = hopper.run(form.scores, x, rounds_of(form, x))
    for most in (2**14, 2**12):
        monkeypatch.setattr(ordering, "LEAST", most)
        monkeypatch.setattr(ordering, "MOST", most)
        assert len([*ordering.parts(x, 3, 1)]) > 1
        check(form, x)
        assert all(map(torch.equal, whole, hopper.run(form.scores, x, rounds_of(form, x))))


@on_hopper
@pytest.mark.parametrize("block", [512, 2048])
def test_the_same_bits_every_run_on_a_gpu(block):
    x = on_gpu(16384, 16384, heads=8, kv_heads=2, dim=128)
    form = selection(SCORES["causal"], x, width=3, key_block=block)
    o, lse = hopper.run(form.scores, x, rounds_of(form, x))
    do = torch.randn_like(o)
    first = hopper.gradients(form.scores, x, o, lse, do, None, chosen=rounds_of(form, x))
    for _ in range(5):
        again = hopper.run(form.scores, x, rounds_of(form, x))
        again = *again, *hopper.gradients(form.scores, x, o, lse, do, None, chosen=rounds_of(form, x))
        assert all(torch.equal(a, b) for a, b in zip(again, (o, lse, *first), strict=True))


@on_hopper
def test_one_graph_on_a_gpu():
    """torch.compile without a break: the same bits."""
    x, found = on_gpu(16384, 16384, heads=4, dim=128), []
    leaves = [getattr(x, name).requires_grad_() for name in "qkv"]

    def run(q, k, v):
        return attention(q, k, v, "moba", block_size=512, top_k=3)

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        o = function(*leaves)
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(map(torch.equal, *found))


@on_hopper
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says of itself that it does not see all
def test_a_call_on_a_gpu_does_not_wait_for_it():
    x = on_gpu(16384, 16384, heads=4, dim=128)
    form = get("moba")(block_size=512, top_k=3)
    leaves = [getattr(x, name).requires_grad_() for name in "qkv"]
    assert rounds.pay(form, x, choose(form, x))
    torch.autograd.grad(triton.run(form, x)[0].sum(), leaves)  # compiles, and keeps tables
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.autograd.grad(triton.run(form, x)[0].sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
