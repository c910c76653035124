"""Selections on the Hopper kernels: lists of tiles from lists of blocks, and the kernels over them, emulated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator
import test_hopper
from test_hopper import inputs, on_hopper

from manyheads.core.choosing import best_blocks
from manyheads.core.dropout import Dropout
from manyheads.core.expressions import EMPTY
from manyheads.core.forms import Blocks, Operand, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.selection import CHOSEN
from manyheads.core.tiling import choose
from manyheads.engines import eager, triton
from manyheads.engines.triton import hopper, launch, op
from manyheads.engines.triton.hopper import backward, forward, selected, tables

emulated = test_hopper.emulated
CAP = 5.0

SCORES = {
    "full": Scores(),
    "causal": Scores(mask=lambda b, h, i, j: j <= i),
    "window": Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 200)),
    "windows of heads": Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 130 * (h + 1))),
    "soft-cap": Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)),
    "signed": Scores(mask=lambda b, h, i, j: j <= i, normaliser="signed"),
    "products": Scores(mask=lambda b, h, i, j: j <= i, normaliser="none"),
}


@pytest.fixture
def listed(emulated, monkeypatch):
    use_emulated_lists(monkeypatch)


def use_emulated_lists(monkeypatch):
    monkeypatch.setattr(selected.listing, "listing", emulator.Kernel(emulator.load_plain("listing").listing))
    uniting = emulator.load_plain("uniting")
    for name in ("mark", "uniting"):
        monkeypatch.setattr(selected.uniting, name, emulator.Kernel(getattr(uniting, name)))
    monkeypatch.setattr(selected.turning, "turning", emulator.Kernel(emulator.load_plain("turning").turning))


def selection(scores, x, query_block=128, key_block=128, share=0.5, seed=0, empty=False, shared=False):
    """Blocks drawn at random, and a query's own among them unless `empty`: then its first and its last row of blocks
    have none. shared: all heads have the same, once in memory."""
    first = x.q_positions.start // query_block
    rows, columns = -(-x.q_positions.stop // query_block) - first, -(-x.kv_len // key_block)
    keep = torch.rand(x.batch, x.heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    own = (torch.arange(first, first + rows)[:, None] * query_block // key_block) == torch.arange(columns)
    keep = keep | own
    if empty:
        keep[..., 0, :] = keep[..., -1, :] = False
    blocks = Blocks.from_map(keep[:, : 1 if shared else None].to(x.q.device))
    blocks = Blocks(blocks.indices.expand(-1, x.heads, -1, -1), blocks.counts.expand(-1, x.heads, -1))
    return Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=scores, query_block=query_block, key_block=key_block,
        operands=scores.operands,
    )  # fmt: skip


def chosen_of(form, x):
    return selected.chosen_of(form, x, choose(form, x))


def check(form, x):
    """o, lse and the gradients against eager in float64."""
    assert hopper.selected.why_not(form, x) is None
    torch.manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, lse = eager.run(form, wide)
    do, dlse = torch.randn_like(o).to(x.q.dtype), torch.randn_like(lse).float()
    seen = lse > -torch.inf
    has_lse = form.scores.normaliser != "none"
    loss = (o * do).sum() + (torch.where(seen, lse * dlse, 0).sum() if has_lse else 0)
    true = torch.autograd.grad(loss, [wide.q, wide.k, wide.v])
    chosen = chosen_of(form, x)
    found_o, found_lse = hopper.run(form.scores, x, chosen)
    assert torch.isfinite(found_o).all() and torch.equal(found_lse > -torch.inf, seen)
    assert (found_o[~seen] == 0).all()
    if has_lse:
        torch.testing.assert_close(found_lse[seen].double(), lse[seen].detach(), atol=1e-4, rtol=1e-4)
    assert (found_o.double() - o).norm() <= 5e-3 * o.norm()
    dlse = torch.where(seen, dlse, 0) if has_lse else None
    found = hopper.gradients(form.scores, x, found_o, found_lse, do, dlse, chosen=chosen)
    for name, a, b in zip("qkv", found, true, strict=True):
        assert a is not None and torch.isfinite(a).all()
        assert (a.double() - b).norm() <= 1e-2 * b.norm(), name


# ---- the kernels ----


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("name", SCORES)
def test_forms(listed, name, key_block):
    x = inputs(400, 400)
    check(selection(SCORES[name], x, key_block=key_block), x)


@pytest.mark.parametrize(("query_block", "key_block"), [(128, 128), (16, 32)])
def test_lists_of_wide_numbers(listed, query_block, key_block):
    """As Blocks.from_indices makes them; bits are int32, or the kernel that reads them does not compile."""
    x = inputs(300, 300)
    made = selection(SCORES["causal"], x, query_block, key_block)
    blocks = choose(made, x)
    wide = Blocks(blocks.indices.long(), blocks.counts.long())
    assert selected.marked(wide, x, query_block, key_block).dtype == torch.int32
    check(replace(made, select=lambda q, k, *, scale, offset: wide), x)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1)])
@pytest.mark.parametrize("key_block", [64, 128])
def test_groups(listed, heads, kv_heads, key_block):
    x = inputs(300, 300, heads=heads, kv_heads=kv_heads)
    check(selection(SCORES["causal"], x, key_block=key_block, share=0.3), x)


@pytest.mark.parametrize("lengths", [(1, 1), (129, 129), (65, 321), (200, 584), (256, 256), (1, 385)])
@pytest.mark.parametrize("key_block", [64, 128])
def test_lengths(listed, lengths, key_block):
    x = inputs(*lengths, batch=2, heads=2, kv_heads=1)
    check(selection(SCORES["causal"], x, key_block=key_block, share=0.4), x)
    check(selection(SCORES["full"], x, key_block=key_block, share=0.4), x)


@pytest.mark.parametrize(("query_block", "key_block"), [(256, 128), (128, 256), (256, 192), (384, 64)])
def test_blocks_of_several_tiles(listed, query_block, key_block):
    x = inputs(500, 756, heads=2, kv_heads=1)
    check(selection(SCORES["causal"], x, query_block, key_block, share=0.4), x)


SMALL = [(1, 128), (4, 192), (16, 64), (32, 32), (64, 16), (64, 256), (96, 128), (128, 32), (256, 16)]
SMALL += [(32, 2), (96, 8), (4, 4)]  # whose words are of 32 key blocks


@pytest.mark.parametrize(("query_block", "key_block"), SMALL)
def test_blocks_that_are_no_tiles(listed, query_block, key_block):
    """Queries begin inside of a block of 256, and neither side ends with one."""
    x = inputs(300, 492, heads=4, kv_heads=2, batch=2)
    for name in ("causal", "full"):
        form = selection(SCORES[name], x, query_block, key_block, share=0.2)
        assert chosen_of(form, x).bits is not None
        check(form, x)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 33), (129, 129), (65, 321), (130, 258)])
@pytest.mark.parametrize(("query_block", "key_block"), [(1, 64), (16, 32), (64, 128), (16, 2)])
def test_lengths_of_small_blocks(listed, query_block, key_block, lengths):
    x = inputs(*lengths, heads=2, kv_heads=1)
    check(selection(SCORES["causal"], x, query_block, key_block, share=0.3, empty=lengths[0] > 100), x)


@pytest.mark.parametrize(("query_block", "key_block"), [(1, 128), (32, 32), (32, 2)])
@pytest.mark.parametrize("dim", [128, 256])
def test_sizes_of_small_blocks(listed, dim, query_block, key_block):
    x = inputs(200, 328, heads=2, kv_heads=1, dim=dim)
    check(selection(SCORES["causal"], x, query_block, key_block, share=0.3), x)
    check(selection(SCORES["soft-cap"], x, query_block, key_block, share=0.3), x)


@pytest.mark.parametrize(("query_block", "key_block"), [(1, 64), (16, 128)])
def test_tiles_of_short_lists(listed, query_block, key_block):
    """A tile unites more blocks than any of its lists has."""
    x = inputs(256, 512, heads=2, kv_heads=1)
    rows = torch.arange(256 // query_block)
    blocks = Blocks.from_indices((rows * 3 % (512 // key_block)).view(1, 1, -1, 1).expand(1, 2, -1, 1))
    form = Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=SCORES["full"], query_block=query_block,
        key_block=key_block,
    )  # fmt: skip
    check(form, x)


def test_whole_tiles_from_an_odd_place_on(listed):
    """Blocks are multiples of tiles, and the first query stands inside of one."""
    x = inputs(300, 364, heads=2, kv_heads=1)
    for query_block in (128, 256):
        form = selection(SCORES["causal"], x, query_block, 128)
        assert chosen_of(form, x).bits is not None
        check(form, x)


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (256, 256), (72, 40)])
def test_sizes(listed, dim, v_dim, key_block):
    x = inputs(200, 328, heads=2, kv_heads=1, dim=dim, v_dim=v_dim)
    check(selection(SCORES["causal"], x, key_block=key_block), x)


@pytest.mark.parametrize("key_block", [64, 128])
def test_rows_without_blocks(listed, key_block):
    x = inputs(500, 500, batch=2)
    check(selection(SCORES["causal"], x, key_block=key_block, empty=True), x)
    check(selection(SCORES["full"], x, key_block=key_block, share=-1, empty=True), x)


def test_nothing_is_listed(listed):
    x = inputs(130, 130)
    for n in (0, 3):
        nothing = Blocks(torch.full((1, 4, 2, n), 10**6), torch.zeros(1, 4, 2, dtype=torch.long))
        form = Selection(
            select=lambda q, k, *, scale, offset, nothing=nothing: nothing, scores=SCORES["causal"], query_block=128,
            key_block=64,
        )  # fmt: skip
        check(form, x)


@pytest.mark.parametrize("key_block", [64, 128])
def test_slots_are_used_again(listed, key_block):
    x = inputs(300, 1068, heads=2, kv_heads=1, dim=128)
    check(selection(SCORES["causal"], x, key_block=key_block, share=0.8), x)


def test_sinks(listed):
    scores = Scores(mask=SCORES["causal"].mask, sink="sink", operands={"sink": Operand("heads")})
    x = inputs(300, 300).with_(operands={"sink": torch.tensor([-3.0, -1.0, 0.5, 4.0])})
    check(selection(scores, x, empty=True), x)


@pytest.mark.parametrize("key_block", [64, 128])
def test_dropout(listed, key_block):
    x = inputs(300, 428).with_(dropout=Dropout(0.3, torch.tensor([5])))
    check(selection(SCORES["causal"], x, key_block=key_block), x)


@pytest.mark.parametrize("key_block", [64, 128])
def test_the_same_bits_every_run(listed, key_block):
    x = inputs(300, 300, heads=2)
    form = selection(SCORES["causal"], x, key_block=key_block)
    o, lse = hopper.run(form.scores, x, chosen_of(form, x))
    grads = [hopper.gradients(form.scores, x, o, lse, o, None, chosen=chosen_of(form, x)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- the engine ----


@pytest.fixture
def engine(listed, monkeypatch):
    """The Triton engine as on a Hopper GPU; says what it gave the kernels."""
    seen = []
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    run = forward.run
    monkeypatch.setattr(
        forward, "run", lambda form, x, **rest: seen.append((form, rest["chosen"])) or run(form, x, **rest)
    )
    return seen


def test_gradients_from_loss_to_leaves(engine):
    x = inputs(300, 300)
    form = selection(SCORES["causal"], x, key_block=64)
    leaves = [getattr(x, name).requires_grad_() for name in "qkv"]
    wide = x.with_(**{name: getattr(x, name).detach().double().requires_grad_() for name in "qkv"})
    o, lse = triton.run(form, x)
    true, true_lse = eager.run(form, wide)
    assert engine[0][0] is form.scores and engine[0][1] is not None
    for found, b in ((o, true), (lse, true_lse)):
        found, b = (
            torch.autograd.grad(t.square().sum(), given, retain_graph=True, materialize_grads=True)
            for t, given in ((found, leaves), (b, [wide.q, wide.k, wide.v]))
        )
        for one, other in zip(found, b, strict=True):
            assert (one.double() - other).norm() <= 1e-2 * other.norm()


def test_what_lists_do_not_take_reads_a_map(engine):
    """Blocks of 40 keys, queries from an odd place on, and a score that learns."""
    slope = torch.tensor(0.1, requires_grad=True)
    learns = Scores(mask=SCORES["causal"].mask, score=lambda s, b, h, i, j: s - slope * (i - j))
    x, sixteen = inputs(200, 300), inputs(200, 312)
    whole = inputs(300, 300)
    for form, y in (
        (selection(SCORES["causal"], whole, key_block=40), whole), (selection(SCORES["causal"], x), x),
        (selection(SCORES["causal"], sixteen), sixteen), (selection(learns, whole), whole),
    ):  # fmt: skip
        engine.clear()
        assert hopper.why_no_lists(form, y) is not None
        o, _ = triton.run(form, y)
        assert engine[0][1] is None and CHOSEN in engine[0][0].operands
        torch.testing.assert_close(o, eager.run(form, y)[0], atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        assert hopper.why_no_lists(selection(learns, whole), whole) is None


@pytest.mark.parametrize(("query_block", "key_block"), [(128, 64), (16, 128)])
def test_operators_take_lists(engine, query_block, key_block):
    """What torch.compile sees: the same bits as without it, and the backward pass over lists too."""
    x = inputs(300, 300)
    form = selection(SCORES["causal"], x, query_block, key_block)
    leaves, found = [getattr(x, name).requires_grad_() for name in "qkv"], []
    for run in (triton.run, op.ATTEND):
        o, lse = run(form, x)
        found.append([o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)])
    assert all(map(torch.equal, *found))
    assert len(engine) == 2 and all(chosen is not None for _, chosen in engine)


def test_operators_of_scores_that_learn(engine, monkeypatch):
    """The forward pass of an operator takes lists, as nobody asks for gradients there; its backward pass a map."""
    x = inputs(300, 300)
    slope = torch.tensor(0.05, requires_grad=True)
    learns = Scores(mask=SCORES["causal"].mask, score=lambda s, b, h, i, j: s - slope * (i - j))
    form, seen = selection(learns, x), []

    def backward(scores, x, o, lse, do, dlse, own, needed, heads_needed, sources, chosen):
        seen.append((CHOSEN in x.operands, sources, chosen, needed, heads_needed))
        return (None, None, None), None, {source: torch.ones(()) for source in sources}

    monkeypatch.setattr(launch, "run_backward", backward)
    o, _ = op.ATTEND(form, x)
    assert torch.autograd.grad(o.sum(), slope)[0] == 1
    assert engine[0][1] is not None and seen == [(True, [0], None, (False, False, False), False)]


# ---- lists ----


def rows_of(table, batch, heads, rows):
    """[[(tile, partial)]] of each row, from the numbers that a kernel reads."""
    flat = table.values.flatten()
    b_step, h_step, row_step = tables.steps_of(table, (batch, heads, rows))
    found = {}
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                at = b * b_step + h * h_step + r * row_step
                at += int(flat[at]) if table.kind == tables.JUMPS else 0
                entries = flat[at + 1 : at + 1 + int(flat[at])].tolist()
                found[b, h, r] = [(entry >> 1, bool(entry & 1)) for entry in entries]
    return found


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 700), st.integers(0, 6)), batch=st.integers(1, 2), heads=st.integers(1, 3),
    blocks=st.tuples(st.sampled_from([1, 16, 64, 96, 128, 256]), st.sampled_from([2, 8, 16, 32, 64, 128, 192, 256])),
    name=st.sampled_from(list(SCORES)), share=st.sampled_from([0.0, 0.2, 0.6, 1.0]), seed=st.integers(0, 99),
    turned=st.booleans(), empty=st.booleans(), narrow=st.booleans(), slots=st.sampled_from([2, 16]),
    shared=st.booleans(),
)  # fmt: skip
def test_lists_against_brute_force(
    lengths, batch, heads, blocks, name, share, seed, turned, empty, narrow, slots, shared
):  # fmt: skip
    """All that is chosen and allowed is listed, nothing else is, in ascending order, and tiles called full are. Where
    blocks are smaller than tiles, a tile may have chosen pairs and allowed pairs, and none that is both."""
    (q_len, before), (query_block, key_block) = lengths, blocks
    kv_len = q_len + 128 * before
    x = inputs(q_len, kv_len, heads=heads, kv_heads=1, batch=batch, dim=8)
    form = selection(SCORES[name], x, query_block, key_block, share, seed, empty, shared)
    tile = (64 if turned and narrow else 128), (64 if narrow or key_block % 128 else 128)
    with pytest.MonkeyPatch.context() as patch:
        use_emulated_lists(patch)
        patch.setattr(selected, "SLOTS", slots)
        patch.setattr(selected, "MARKED", (slots, 2 * slots))
        patch.setattr(selected, "TURNED", (1, slots))
        chosen = chosen_of(form, x)
        found = chosen.table_of(form.scores.program, x, tile, {}, turned)

    i, j = torch.arange(kv_len - q_len, kv_len), torch.arange(kv_len)
    keep = choose(form, x).to_map(-(-kv_len // key_block))
    allowed = keep[:, :, i // query_block - int(i[0]) // query_block][..., j // key_block]
    either = [allowed, torch.ones_like(allowed)]
    if form.scores.program.has_mask:
        b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
        either[1] = form.scores.program.mask(b, h, i[:, None], j).expand_as(allowed)
        allowed = allowed & either[1]
    if chosen.bits is None:
        either = [allowed, allowed]
    step, across = tile[::-1] if turned else tile
    allowed, *either = (m.mT if turned else m for m in (allowed, *either))
    rows = -(-allowed.shape[2] // step)
    tall = -(-allowed.shape[2] // 128) * (128 // step) if turned else rows  # of halves there are always two
    for (b, h, r), entries in rows_of(found, batch, heads, tall).items():
        line = allowed[b, h, r * step : (r + 1) * step]
        tiles = range(-(-allowed.shape[3] // across))
        parts = [line[:, t * across : (t + 1) * across] for t in tiles]
        some = [
            [m[b, h, r * step : (r + 1) * step, t * across : (t + 1) * across].any() for m in either] for t in tiles
        ]
        assert [t for t, _ in entries] == [t for t in tiles if all(some[t])], (b, h, r)
        for t, part in entries:
            whole = parts[t].all() and parts[t].shape == (min(step, parts[t].shape[0]), across)
            assert part != whole, "the masks here have exact tiles"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("query_block", "key_block"), [(1, 64), (32, 16), (64, 128), (32, 4)])
def test_one_block_alone(listed, query_block, key_block, turned):
    """A single pair of blocks has its tiles listed, in part; a single one that is missing makes its tiles partial."""
    x = inputs(256, 256, heads=1, kv_heads=1, dim=8)
    tile = (64, 64) if turned else (128, 64)
    for row in {at // query_block for at in (0, 31, 32, 63, 64, 127, 128, 159, 255)}:
        for column in (0, 128 // key_block, 255 // key_block):
            keep = torch.zeros(1, 1, 256 // query_block, 256 // key_block, dtype=torch.bool)
            keep[..., row, column] = True
            own = {
                (i // tile[0], j // tile[1])
                for i in range(row * query_block, (row + 1) * query_block)
                for j in range(column * key_block, (column + 1) * key_block)
            }
            filled = {t for t in own if query_block >= tile[0] and key_block >= tile[1]}
            for blocks, tiles, partly in (
                (Blocks.from_map(keep), own, own - filled),
                (Blocks.from_map(~keep), set(product(range(256 // tile[0]), range(4))) - filled, own - filled),
            ):
                form = Selection(
                    select=lambda q, k, *, scale, offset, blocks=blocks: blocks, scores=SCORES["full"],
                    query_block=query_block, key_block=key_block,
                )  # fmt: skip
                table = chosen_of(form, x).table_of(SCORES["full"].program, x, tile, {}, turned)
                lines = rows_of(table, 1, 1, table.values.shape[2])
                entries = {(t, r) if turned else (r, t): part for (_, _, r), line in lines.items() for t, part in line}
                assert entries == {t: t in partly for t in tiles}


def test_bits_say_what_is_listed(listed):
    """Of lists with anything behind what they mean, 1500 query blocks, and a first query inside of a block."""
    x = inputs(6000, 6016, heads=2, dim=8)
    keep = torch.rand(1, 2, 1504, 47) < 0.2
    blocks = Blocks.from_map(keep)
    blocks.indices.masked_fill_(torch.arange(47) >= blocks.counts[..., None], 10**6)
    bits = selected.marked(blocks, x, 4, 128)
    assert bits.shape == (1, 2, 47, 47)
    found = (bits[:, :, :, None] >> torch.arange(32)[:, None]) & 1
    assert found.flatten(2, 3)[:, :, :1504].bool().equal(keep)


def test_states_are_kept(monkeypatch):
    selected.KEPT.found.clear()
    x = inputs(400, 400)
    made = selected.states_of(SCORES["causal"].program, x, (128, 128), {}, False)
    assert made is not None and made.shape == (1, 1, 4, 4) and int((made != EMPTY).sum()) == 10
    assert selected.states_of(SCORES["causal"].program, x, (128, 128), {}, False) is made
    assert selected.states_of(SCORES["causal"].program, x, (128, 128), {}, True) is not made
    assert selected.states_of(SCORES["full"].program, x, (128, 128), {}, False) is None


@pytest.mark.parametrize("key_block", [32, 64, 128])
@pytest.mark.parametrize("made", ["from a map", "from indices"])
def test_nothing_is_waited_for(monkeypatch, key_block, made):
    """A meta tensor has no values: whoever asked for one would hear of it."""
    monkeypatch.setattr(selected.quick, "launch", lambda entry, programs, arguments, **options: None)
    x = inputs(1000, 1000, batch=2)
    x = x.with_(**{name: getattr(x, name).to("meta") for name in "qkv"})
    likes = torch.rand(2, 4, 8, -(-1000 // key_block), device="meta")
    blocks = Blocks.from_map(likes < 0.5) if made == "from a map" else best_blocks(likes, 3)
    form = Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=SCORES["causal"], query_block=128, key_block=key_block
    )
    assert selected.why_not(form, x) is None
    find = partial(chosen_of(form, x).table_of, SCORES["causal"].program, x, operands={})
    for tile, turned in (((128, 64), False), ((64, 64), True)):
        assert find(tile=tile, turned=turned).values.device.type == "meta"


def test_too_many_for_one_table(monkeypatch, listed):
    monkeypatch.setattr(selected, "MOST", 100)
    x = inputs(400, 400)
    with pytest.raises(ValueError, match="listed blocks are too many for one table"):
        chosen_of(selection(SCORES["causal"], x), x).table_of(SCORES["causal"].program, x, (64, 128), {}, True)


def test_tilings_fit_blocks(listed):
    x = inputs(128, 128, dim=128)
    for key_block, keys, halves in ((64, 128, True), (128, 128, False), (192, 128, True), (256, 128, False)):
        chosen = chosen_of(selection(SCORES["causal"], x, key_block=key_block), x)
        assert forward.tiling_of(SCORES["causal"], x, chosen).keys == keys
        assert backward.keys_tiling_of(SCORES["causal"], x, chosen).halves == halves
    united = chosen_of(selection(SCORES["causal"], x, query_block=64, key_block=64), x)
    assert forward.tiling_of(SCORES["causal"], x, united).keys == 64


# ---- the benchmark ----


@pytest.mark.parametrize(("queries", "block"), [(1, 256), (16, 64), (64, 32), (128, 64), (128, 128), (256, 32)])
def test_the_benchmark_counts_pairs(monkeypatch, queries, block):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import selections

    n, i = 1280, torch.arange(1280)
    blocks = selections.liked(torch.rand(1, 4, n // queries, n // block), block, 0.25, queries)
    keep = blocks.to_map(n // block)
    allowed = keep[:, :, i // queries][..., i // block] & (i <= i[:, None])
    assert selections.pairs(blocks, block, queries) == allowed.sum()
    own = max(1, queries // block)
    before = torch.arange(n // queries) * queries // block
    assert (blocks.counts - own <= before).all() and keep.sum(-1).equal(blocks.counts)


@pytest.mark.parametrize("block", [64, 128])
def test_the_benchmark_counts_what_it_gives_to_all(monkeypatch, block):
    """Pairs, FlexAttention's mask, and the truth about the last queries."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import selections

    n, i = 1280, torch.arange(1280)
    blocks = selections.liked(torch.rand(1, 4, n // 128, n // block), block, 0.25)
    keep = blocks.to_map(n // block)
    allowed = keep[:, :, i // 128][..., i // block] & (i <= i[:, None])
    assert selections.pairs(blocks, block) == allowed.sum()
    mask = selections.block_mask(blocks, block)
    assert (mask.to_dense() != 0).equal(keep)
    own = 128 // block
    assert (mask.kv_num_blocks == own).all() and mask.full_kv_num_blocks is not None
    assert (mask.full_kv_num_blocks + own).equal(blocks.counts)

    q, k, v = (torch.randn(1, heads, n, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    do, form = torch.zeros_like(q), selections.selection(blocks, block)
    do[:, :2, -selections.LAST :] = 1
    o, _ = eager.run(form, Inputs(q, k, v, 8**-0.5, *default_positions(n, n)))
    found = o, *torch.autograd.grad(o, (q, k, v), do)
    for a, b in zip(found, selections.truth(form, q, k, v, do), strict=True):
        assert selections.attention.error(a, b) < 1e-12


# ---- on a GPU ----


def on_gpu(q_len, kv_len, **sizes):
    return inputs(q_len, kv_len, device="cuda", **sizes)


@on_hopper
@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("name", SCORES)
def test_forms_on_a_gpu(name, key_block):
    x = on_gpu(1500, 1500, heads=8, batch=2, dim=128)
    check(selection(SCORES[name], x, key_block=key_block, share=0.3), x)


@on_hopper
@pytest.mark.parametrize("lengths", [(1, 1), (129, 129), (65, 321), (200, 584), (2049, 2049)])
@pytest.mark.parametrize("key_block", [64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lengths_on_a_gpu(dim, key_block, lengths):
    x = on_gpu(*lengths, heads=7, kv_heads=1, dim=dim)
    check(selection(SCORES["causal"], x, key_block=key_block, share=0.3, empty=lengths[0] > 1000), x)
    check(selection(SCORES["full"], x, key_block=key_block, share=0.3), x)


@on_hopper
@pytest.mark.parametrize(("query_block", "key_block"), SMALL)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_small_blocks_on_a_gpu(dim, query_block, key_block):
    x = on_gpu(1300, 2548, heads=8, batch=2, dim=dim)  # from 1248 on, a multiple of 32 in all of these blocks
    for name in ("causal", "window", "soft-cap", "full"):
        check(selection(SCORES[name], x, query_block, key_block, share=0.1, empty=True), x)


@on_hopper
@pytest.mark.parametrize(("query_block", "key_block"), [(128, 64), (128, 128), (1, 512), (32, 32)])
def test_the_same_bits_every_run_on_a_gpu(query_block, key_block):
    x = on_gpu(16384, 16384, heads=8, kv_heads=2, dim=128)
    form = selection(SCORES["causal"], x, query_block, key_block, share=0.1)
    o, lse = hopper.run(form.scores, x, chosen_of(form, x))
    do = torch.randn_like(o)
    run = partial(hopper.gradients, form.scores, x, o, lse, do, None)
    first = run(chosen=chosen_of(form, x))
    for _ in range(5):
        again = *hopper.run(form.scores, x, chosen_of(form, x)), *run(chosen=chosen_of(form, x))
        assert all(torch.equal(a, b) for a, b in zip(again, (o, lse, *first), strict=True))


@on_hopper
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it says of itself that it does not see all
@pytest.mark.parametrize("key_block", [32, 40, 64, 128])
def test_a_call_on_a_gpu_does_not_wait_for_it(key_block):
    x = on_gpu(1024, 1024, heads=4, dim=128)
    form = selection(SCORES["causal"], x, key_block=key_block)
    leaves = [getattr(x, name).requires_grad_() for name in "qkv"]
    torch.autograd.grad(triton.run(form, x)[0].sum(), leaves)  # compiles, and keeps the mask's tiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.autograd.grad(triton.run(form, x)[0].sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
