"""The k largest scores of each row on Hopper, emulated, against eager in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import test_hopper
from test_hopper import inputs, on_hopper, ragged
from test_hopper_entmax import fading, past, some_see_nothing

import manyheads
from manyheads.core.dropout import dropout_of
from manyheads.core.forms import Scores
from manyheads.core.selection import as_scores
from manyheads.engines import eager
from manyheads.engines.triton import hopper, launch, op
from manyheads.engines.triton.hopper import launching, looks, tables, top_k

emulated = test_hopper.emulated  # a fixture


def form_of(k, mask=None, score=None):
    return Scores(normaliser="top_k", top_k=k, mask=mask, score=score)


FORMS = {
    "1": form_of(1),
    "1, causal": form_of(1, past),
    "7": form_of(7),
    "64, causal": form_of(64, past),
    "399": form_of(399),
    "400 of 400": form_of(400, past),
    "empty rows": form_of(20, some_see_nothing),
    "ALiBi": form_of(20, past, fading),
    "soft-cap": form_of(20, past, lambda s, b, h, i, j: 5.0 * torch.tanh(s / 5.0)),
}


def check(form, x):
    """o, its gradients and the levels. Bounds are those of the other kernels: rounding of weights to 16 bits."""
    torch.manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, _ = eager.run(form, wide)
    do = torch.randn_like(o).to(x.q.dtype)
    true = torch.autograd.grad((o * do).sum(), [wide.q, wide.k, wide.v])
    found_o, level = hopper.run(form, x)
    assert found_o.dtype == x.q.dtype and level.dtype == torch.float32 and level.shape == x.q.shape[:3]
    assert (found_o.double() - o).norm() <= 5e-3 * o.norm()
    assert (found_o[(o == 0).all(-1)] == 0).all()
    # Where a row keeps one key dP and its mean cancel, but for the rounding of o to 16 bits: that times a key or query.
    left = torch.finfo(x.q.dtype).eps / 2 * (do.double() * o).norm() * abs(x.scale)
    lengths = {"q": wide.k.norm(dim=-1).square().mean().sqrt(), "k": wide.q.norm(dim=-1).square().mean().sqrt(), "v": 0}
    for name, a, b in zip("qkv", hopper.gradients(form, x, found_o, level, do, None), true, strict=True):
        assert a is not None and a.dtype == x.q.dtype and torch.isfinite(a).all()
        assert (a.double() - b).norm() <= 1e-2 * b.norm() + left * lengths[name], (name, (a.double() - b).norm())


@pytest.mark.parametrize("name", FORMS)
def test_forms(emulated, name):
    check(FORMS[name], inputs(400, 400))


@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (65, 129), (1, 300), (130, 500), (200, 77)])
@pytest.mark.parametrize("name", ["7", "64, causal"])
def test_lengths(emulated, name, lengths):
    check(FORMS[name], inputs(*lengths, batch=2, heads=2, kv_heads=1))


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (256, 256), (72, 72), (192, 128), (16, 40)])
def test_sizes(emulated, dim, v_dim):
    check(FORMS["64, causal"], inputs(150, 330, heads=2, dim=dim, v_dim=v_dim, dtype=torch.float16))


@pytest.mark.parametrize("scale", [-0.2, 2.0, 40.0])
def test_scales(emulated, scale):
    """At 40 what is behind a row's best few has a weight of 0."""
    check(FORMS["64, causal"], inputs(100, 200).with_(scale=scale))


def test_rows_of_their_own(emulated):
    x = inputs(300, 300, batch=3)
    check(FORMS["ALiBi"], ragged(x).with_(q_positions=range(300)))


def test_keys_at_positions_of_their_own(emulated):
    """Padding, and a cache in no order."""
    x = inputs(50, 300, batch=2)
    padded = torch.where(torch.arange(300) % 3 == 0, -1, torch.arange(300))
    at = torch.stack([padded, torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    check(FORMS["64, causal"], x.with_(kv_positions=at))


def test_lists_of_tiles_and_chosen_blocks(emulated, monkeypatch):
    monkeypatch.setattr(tables, "table", tables.lists)
    tables.KEPT.found.clear()
    check(FORMS["empty rows"], inputs(400, 400))
    tables.KEPT.found.clear()
    moba = manyheads.get("moba")(block_size=40, top_k=3)
    inner = replace(moba.scores, normaliser="top_k", top_k=9)
    check(*as_scores(replace(moba, scores=inner), inputs(150, 400)))


@pytest.mark.parametrize("name", ["7", "ALiBi"])
def test_dropout(emulated, name):
    check(FORMS[name], inputs(150, 330, batch=2).with_(dropout=dropout_of(0.3, 5, torch.device("cpu"))))


# ---- how many ----


def scores(x, score=None):
    s = (x.q.float() @ x.k.float().repeat_interleave(x.heads // x.kv_heads, 1).mT) * x.scale
    i, j = torch.arange(x.q_len)[:, None], torch.arange(x.kv_len)
    return s if score is None else score(s, None, torch.arange(x.heads)[:, None, None], i, j)


@pytest.mark.parametrize("k", [1, 2, 64, 500, 999, 1000, 5000])
def test_as_many_as_were_asked_for(emulated, k):
    """Far from the largest score and near to it, and where a few stand far above and below the others."""
    x = inputs(128, 1000, heads=4, kv_heads=4).with_(scale=0.3)
    x.q[:, 1] *= 4
    x.k[:, 2, :5] *= 8
    x.q[:, 3] *= 1e-3
    level = top_k.levels_of(form_of(k), x)
    kept = (scores(x) >= level[..., None]).sum(-1)
    # A score of a float32 product on both sides: one in a hundred rows may have another as near as its rounding.
    assert (kept >= min(k, 1000) - 1).all() and (kept != min(k, 1000)).float().mean() <= 0.01
    assert (kept <= min(k, 1000) + 2).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1000.0, 1e6])
def test_all_that_equal_the_kth_are_kept(emulated, value):
    """Five above, ten equal, the others below: of the ten all count for k = 6 to 15, and with room for rounding."""

    def score(s, b, h, i, j):
        return torch.where(j < 5, value + 20.0, torch.where(j < 15, value, value - 20.0))

    x, equal = inputs(100, 300, heads=2, kv_heads=2), torch.tensor(value)
    for k, many in ((5, 5), (6, 15), (10, 15), (15, 15)):
        level = top_k.levels_of(form_of(k, None, score), x)
        kept = (scores(x, score) >= level[..., None]).sum(-1)
        assert (kept == many).all()
        if 5 < k < 15:
            assert (level <= equal - 8 * 2.0**-23 * equal.abs()).all(), "another kernel may round them down"


def test_a_row_of_equal_scores_is_kept_whole(emulated):
    """Numbers whose products are exact in float32: numpy sums up columns in different orders."""
    x = inputs(130, 200)
    x.q[:], x.k[:] = (4 * x.q).round() / 4, (4 * x.k[:, :, :1]).round() / 4
    for scale in (0.0, 0.125, -3.0):
        assert (top_k.levels_of(form_of(7), x.with_(scale=scale)) == -math.inf).all()
        check(form_of(7), x.with_(scale=scale))


def test_scores_far_below_the_largest_have_no_weight_either_way(emulated):
    """A mask that was added: fewer than k keys are near, and the others a billion below."""

    def score(s, b, h, i, j):
        return torch.where(j % 50 == 0, s, s - 1e9)

    check(form_of(7, None, score), inputs(100, 300))
    x = inputs(100, 300)
    level = top_k.levels_of(form_of(7, None, score), x)
    assert ((scores(x, score) >= level[..., None]).sum(-1) == 6).all()


@pytest.fixture
def ahead(emulated, monkeypatch):
    """How many half tiles have not arrived after each look."""
    found, run = [], launching.Kernel.run

    def counted(kernel, programs, own, source, arguments):
        run(kernel, programs, own, source, arguments)
        found.append(int(own[4].sum()))

    monkeypatch.setattr(launching.Kernel, "run", counted)
    return found


def test_tiles_that_have_arrived_are_left_alone(ahead, monkeypatch):
    """Once none is ahead, other keys change nothing."""
    x, run = inputs(300, 300), launching.Kernel.run
    before = top_k.levels_of(FORMS["64, causal"], x)
    first, done = list(ahead), ahead.index(0)
    assert len(first) == top_k.LOOKS and done <= 10
    assert first[0] == 3 * 2 * 4 - 2 * 4, "300 queries are two and a half tiles, the first 64 keep all"

    def changing(kernel, programs, own, source, arguments):
        if len(ahead) == len(first) + done + 1:
            x.k.fill_(0.5)
        run(kernel, programs, own, source, arguments)

    monkeypatch.setattr(launching.Kernel, "run", changing)
    assert torch.equal(top_k.levels_of(FORMS["64, causal"], x), before)
    assert (x.k == 0.5).all() and not torch.equal(top_k.levels_of(FORMS["64, causal"], x), before)


def test_nobody_looks_where_all_are_kept(monkeypatch):
    monkeypatch.setattr(looks, "LEVELS", None)
    assert (top_k.levels_of(form_of(300), inputs(100, 300)) == -math.inf).all()


def test_enough_looks(ahead):
    """A row whose k-th has an equal next to it: the bracket goes from its greatest width down to its least."""

    def score(s, b, h, i, j):
        return torch.where(j == 0, 88.5, torch.where(j < 3, 1.25, -1000.0))

    x = inputs(1, 300, heads=1, kv_heads=1)
    level = top_k.levels_of(form_of(2, None, score), x)
    assert ((scores(x, score) >= level[..., None]).sum(-1) == 3).all() and level > 1.25 - 2.0**-17
    assert ahead == [1] * (top_k.LOOKS - 1) + [0]


def test_nothing_to_read():
    o, level = hopper.run(FORMS["7"], inputs(5, 0))
    assert (o == 0).all() and (level == -math.inf).all()


# ---- around the kernels ----


def test_autograd(emulated, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = FORMS["64, causal"], inputs(150, 200, heads=2)
    wide = {name: getattr(x, name).double().requires_grad_() for name in "qkv"}
    own = {name: getattr(x, name).clone().requires_grad_(name != "k") for name in "qkv"}
    true, found = eager.run(form, x.with_(**wide))[0], launch.attend(form, x.with_(**own))[0]
    given = [torch.autograd.grad(o.sum(), [at["q"], at["v"]]) for o, at in ((found, own), (true, wide))]
    for a, b in zip(*given, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_as_an_operator(emulated, monkeypatch):
    """What torch.compile calls, with the levels in place of an lse."""
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = FORMS["64, causal"], inputs(70, 100)
    found = []
    for run in (launch.attend, op.ATTEND):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        q, k, v = leaves
        o, _ = run(form, x.with_(q=q, k=k, v=v))
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_k_is_the_same_code(emulated):
    for find in (top_k.found_in, lambda form: top_k.above_level(form, 0)):
        texts = {find(form_of(k, past, fading)).program.source("gluon", ("mask", "score")).text for k in (1, 2, 16, 64)}
        assert len(texts) == 1
    assert "count" in looks.LEVELS.fixed


def test_reasons(monkeypatch):
    form, x = FORMS["7"], inputs(5, 5)
    assert top_k.why_not(form, x) is None
    slopes = torch.ones(4, requires_grad=True)
    learned = form_of(3, None, lambda s, b, h, i, j: s * slopes[h])
    assert "no gradients to what the scores of top_k read" in top_k.why_not(learned, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "captured tensors" in top_k.why_not(FORMS["ALiBi"], x)
    assert "consecutive queries" in top_k.why_not(form, x.with_(q_positions=torch.arange(5)[None]))
    moba = manyheads.get("moba")()
    assert hopper.selected.why_not(replace(moba, scores=form), x) == "top_k has no lists"


@on_hopper
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lengths", [(700, 700), (1, 1000), (200, 77), (2049, 2049)])
def test_forms_on_a_gpu(name, lengths):
    check(FORMS[name], inputs(*lengths, heads=4, kv_heads=2, batch=2, dim=128, device="cuda"))


@on_hopper
def test_the_same_bits_every_run():
    x = inputs(4000, 4000, heads=16, kv_heads=4, dim=128, device="cuda")
    form = FORMS["64, causal"]
    o, level = hopper.run(form, x)
    first = o, level, *hopper.gradients(form, x, o, level, torch.ones_like(o), None)
    again = hopper.run(form, x)
    again = *again, *hopper.gradients(form, x, *again, torch.ones_like(o), None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_hopper
def test_another_k_compiles_nothing():
    from triton import knobs

    x, compiled = inputs(200, 400, device="cuda"), []
    hopper.run(form_of(3, past), x)
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about)
    try:
        for k in (1, 2, 16, 399):
            hopper.run(form_of(k, past), x)
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled
