"""Programs of the Hopper kernels that compute several rows of tiles, and tiles that several blocks make, emulated."""

from __future__ import annotations

import gluon_emulator as emulator
import pytest
import test_hopper
import test_hopper_dropout
import test_rounds
import test_selected
import torch
from test_hopper import inputs
from test_selected import SCORES, check, chosen_of, selection

from manyheads.core.forms import Blocks, Operand, Scores, Selection
from manyheads.engines.triton import hopper
from manyheads.engines.triton.hopper import backward, forward, rounds, selected
from manyheads.engines.triton.hopper.tables import LISTS, RANGES

emulated, listed, moved = test_hopper.emulated, test_selected.listed, test_rounds.moved
MANY = (1, 2, 3, 100, 131, 132, 1055, 1056, 1583, 1584, 1585, 4751, 4752, 8192, 10**6)


@pytest.fixture(autouse=True)
def several(monkeypatch):
    """Programs of four rows, of two, and of one."""
    for name, value in (("HALVINGS", 2), ("HALVED", 1), ("LEFT", 1)):
        monkeypatch.setattr(forward, name, value)


# ---- which rows a program has ----


SHARED = ((4, 198, 264), (4, 1, 1), (2, 3, 5), (0, 1, 1))


@pytest.mark.parametrize(("halvings", "halved", "left"), SHARED)
@pytest.mark.parametrize("rows", MANY[:-2])
def test_each_row_is_computed_once(monkeypatch, rows, halvings, halved, left):
    for name, value in (("HALVINGS", halvings), ("HALVED", halved), ("LEFT", left)):
        monkeypatch.setattr(forward, name, value)
    share_of = emulator.load("common", "several")["several"].share_of
    programs, *share = forward.shares(rows, LISTS, 128)
    shares = [share_of(emulator.Int(pid), *map(emulator.Int, share)) for pid in range(programs)]
    assert [first + k for first, count in shares for k in range(count)] == list(range(rows))
    sizes = [count for _, count in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes.count(1) >= min(rows, left)
    assert all(sizes.count(2**power) == halved for power in range(1, share[1]))


@pytest.mark.parametrize("rows", MANY)
def test_there_is_work_for_all(monkeypatch, rows):
    """Programs of one row are so many that none is waited for at the end."""
    monkeypatch.undo()
    programs, several, halvings, halved = forward.shares(rows, LISTS, 64)
    assert programs >= min(rows, 264)
    assert not several or halvings
    assert forward.shares(rows, LISTS, 256) == forward.shares(rows, RANGES, 64) == (rows, 0, 0, halved)


# ---- what programs of several rows compute ----


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("name", SCORES)
def test_lists(listed, name, key_block):
    x = inputs(700, 700)
    check(selection(SCORES[name], x, key_block=key_block, share=0.4), x)


@pytest.mark.parametrize(("dim", "kv_len"), [(64, 628), (128, 640)])
@pytest.mark.parametrize("key_block", [16, 32, 64, 192])
def test_gathered_blocks(listed, key_block, dim, kv_len):
    """Of every number of blocks, none among them, and of keys whose last block sticks out or does not."""
    x = inputs(kv_len - 128, kv_len, heads=2, kv_heads=1, batch=2, dim=dim)
    for name, share in (("causal", 0.1), ("full", 0.3), ("windows of heads", 0.9)):
        form = selection(SCORES[name], x, key_block=key_block, share=share, empty=True)
        tiling = forward.tiling_of(form.scores, x, chosen_of(form, x))
        assert tiling.keys == 128
        assert selected.parts_of(chosen_of(form, x), x, 128) == max(2, 128 // key_block)
        check(form, x)


@pytest.mark.parametrize(("query_block", "key_block", "first"), [(64, 32, 0), (256, 32, 128), (128, 64, 64)])
def test_when_blocks_are_gathered(listed, query_block, key_block, first):
    """Where a tile's queries have one list."""
    x = inputs(256, 256 + first)
    found = selected.parts_of(chosen_of(selection(SCORES["causal"], x, query_block, key_block), x), x, 128)
    assert found == (1 if query_block == 64 or first % 128 else 4)


@pytest.mark.parametrize("name", ["causal", "sinks and window"])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 64), (64, 128), (128, 256), (256, 64)])
def test_sizes(emulated, name, dim, v_dim):
    """Of 64 the loop is another, of 256 programs have one row."""
    x = inputs(400, 460, heads=2, dim=dim, v_dim=v_dim)
    test_hopper.check(test_hopper.FORMS[name], x)
    test_hopper.check_gradients(test_hopper.FORMS[name], x)


@pytest.mark.parametrize("dim", [64, 128])
def test_dropout(emulated, dim):
    """A tile's weights are dropped by its own row's queries, though another row has begun."""
    form = test_hopper_dropout.FORMS["causal"]
    x = test_hopper_dropout.dropping(inputs(300, 300, dim=dim))
    test_hopper.check(form, x)
    test_hopper.check_gradients(form, x)


def test_sinks(emulated):
    x = inputs(300, 300).with_(operands={"sink": torch.tensor([-3.0, -1.0, 0.5, 4.0])})
    test_hopper.check(test_hopper_dropout.SINKS, x)
    test_hopper.check_gradients(test_hopper_dropout.SINKS, x)


def test_sinks_of_rows_without_blocks(listed):
    """A sink has a weight there, and the step that is taken must not."""
    scores = Scores(mask=SCORES["causal"].mask, sink="sink", operands={"sink": Operand("heads")})
    x = inputs(500, 500).with_(operands={"sink": torch.tensor([-3.0, -1.0, 0.5, 4.0])})
    form = selection(scores, x, share=0.3, empty=True)
    chosen, do = chosen_of(form, x), torch.randn(x.q.shape).to(x.q.dtype)
    o, lse = hopper.run(scores, x, chosen)
    dq, _, _ = hopper.gradients(scores, x, o, lse, do, None, chosen=chosen)
    assert dq is not None
    for rows in (slice(0, 128), slice(384, 500)):
        assert (o[:, :, rows] == 0).all() and (dq[:, :, rows] == 0).all()
        assert (lse[:, :, rows] == x.operands["sink"][None, :, None]).all()
    assert (dq[:, :, 128:384] != 0).any()


@pytest.mark.parametrize("length", [380, 500])
@pytest.mark.parametrize("query_block", [64, 128])
def test_what_rows_without_blocks_do_not_read(listed, query_block, length):
    """The first keys, at which their one step may look; it is the last of a program, or not."""
    x = inputs(length, length)
    x.k[:, :, :64] = x.v[:, :, :64] = torch.nan
    keep = torch.rand(1, 4, -(-length // query_block), -(-length // 64)) < 0.5
    keep[:, :, : 128 // query_block] = keep[..., 0] = False
    blocks = Blocks.from_map(keep)
    form = Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=SCORES["full"], query_block=query_block, key_block=64
    )
    chosen, do = chosen_of(form, x), torch.randn(x.q.shape).to(x.q.dtype)
    o, lse = hopper.run(form.scores, x, chosen)
    dq, _, _ = hopper.gradients(form.scores, x, o, lse, do, None, chosen=chosen)
    assert dq is not None and (lse[:, :, :128] == -torch.inf).all()
    assert (o[:, :, :128] == 0).all() and (dq[:, :, :128] == 0).all()


def test_rows_that_nobody_asks_for(moved, monkeypatch):
    """Tiles of queries in rounds that have none are not computed."""
    x = inputs(300, 640, heads=4, kv_heads=2)
    form = test_rounds.selection(Scores(), x, width=1)
    test_rounds.check(form, x)
    for engine in (forward, backward):
        monkeypatch.setattr(engine.quick, "empty", lambda *of: torch.full(of[0], torch.nan, dtype=of[1]))
    _, y, order = next(iter(rounds.ordered(form.scores, x, test_rounds.rounds_of(form, x))))
    z, do = rounds.at_places(y, order), torch.ones(1, 1, 1, 64, dtype=x.q.dtype)
    o, lse = forward.run(form.scores, z, chosen=order)
    numbers = torch.zeros_like(lse)
    dq, _, _ = backward.products(
        form.scores, z, do.expand(z.q.shape), numbers, numbers, (True, False, False), chosen=order
    )
    ranges = order.table_of(form.scores.program, z, (128, 128), {}).values
    asked = (ranges[..., 1] >= ranges[..., 0]).repeat_interleave(128, -1)
    assert asked.any() and not asked.all()
    for found in (o, lse, dq):
        assert found is not None
        assert torch.equal(found.isnan().reshape(*lse.shape, -1).any(-1), ~asked)


# ---- on a GPU ----


@test_hopper.on_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("key_block", [16, 32, 64, 128, 192])
def test_lists_on_a_gpu(key_block, dim):
    """Heads share keys, so that programs go from one to the next; the same bits twice."""
    x = inputs(1300, 2580, heads=8, kv_heads=2, batch=2, dim=dim, device="cuda")
    for name in ("causal", "full"):
        form = selection(SCORES[name], x, key_block=key_block, share=0.2, empty=True)
        check(form, x)
        chosen = chosen_of(form, x)
        first, again = (hopper.run(form.scores, x, chosen) for _ in range(2))
        assert all(map(torch.equal, first, again))


@test_hopper.on_hopper
@pytest.mark.parametrize("name", ["full", "causal", "sinks and window"])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (64, 128), (256, 64)])
def test_forms_on_a_gpu(name, dim, v_dim):
    x = inputs(1500, 1500, heads=6, kv_heads=3, batch=2, dim=dim, v_dim=v_dim, device="cuda")
    for y in (x, test_hopper_dropout.dropping(x)):
        test_hopper.check(test_hopper.FORMS[name], y)
        test_hopper.check_gradients(test_hopper.FORMS[name], y)
