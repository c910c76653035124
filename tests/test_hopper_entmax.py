"""Entmax on Hopper, emulated, against eager in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import test_hopper
from test_hopper import inputs, on_hopper

import manyheads
from manyheads.core.dropout import dropout_of
from manyheads.core.forms import Operand, Scores
from manyheads.core.selection import as_scores
from manyheads.engines import eager
from manyheads.engines.triton import hopper, launch, op
from manyheads.engines.triton.hopper import entmax, given_levels, launching, tables

emulated = test_hopper.emulated  # a fixture
SLOPES = torch.tensor([0.3, 0.05, 0.01, 0.2])
ALPHA = {"a": Operand("heads")}


def past(b, h, i, j):
    return j <= i


def some_see_nothing(b, h, i, j):
    return (j <= i) & ((i < 100) | (i > 300))


def fading(s, b, h, i, j):
    return s - SLOPES[h] * abs(i - j)


def form_of(alpha, mask=None, score=None, **more):
    return Scores(normaliser="entmax", alpha=alpha, mask=mask, score=score, **more)


FORMS = {
    "sparsemax": form_of(2.0),
    "sparsemax, causal": form_of(2.0, past),
    "entmax 1.5": form_of(1.5),
    "entmax 1.5, causal": form_of(1.5, past),
    "entmax 1.3, causal": form_of(1.3, past),
    "entmax 1.05": form_of(1.05),
    "empty rows": form_of(1.5, some_see_nothing),
    "ALiBi": form_of(1.5, past, fading),
    "ALiBi, sparsemax": form_of(2.0, None, fading),
    "an alpha of each head": form_of("a", past, operands=ALPHA),
}


def check(form, x):
    """o, its gradients and the levels. Bounds are those of the other kernels: rounding of weights to 16 bits."""
    torch.manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, _ = eager.run(form, wide)
    do = torch.randn_like(o).to(x.q.dtype)
    true = torch.autograd.grad((o * do).sum(), [wide.q, wide.k, wide.v])
    found_o, tau = hopper.run(form, x)
    assert found_o.dtype == x.q.dtype and tau.dtype == torch.float32
    assert (found_o.double() - o).norm() <= 5e-3 * o.norm()
    unseen = tau == math.inf
    assert (found_o[unseen] == 0).all() and (x.dropout is not None or torch.equal(unseen, (o == 0).all(-1)))
    for name, a, b in zip("qkv", hopper.gradients(form, x, found_o, tau, do, None), true, strict=True):
        assert a is not None and a.dtype == x.q.dtype and torch.isfinite(a).all()
        # Where a row has one key, its dO V^T and their mean cancel but for float32's last bits.
        bound = 1e-2 * b.norm() + 2.0**-23 * do.double().norm() * wide.v.norm()
        assert (a.double() - b).norm() <= bound, (name, (a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", FORMS)
def test_forms(emulated, name):
    form = FORMS[name]
    x = inputs(400, 400)
    check(form, x.with_(operands={"a": torch.tensor([1.2, 1.5, 2.0, 1.0])} if form.operands else {}))


@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (65, 129), (1, 300), (130, 500), (200, 77)])
@pytest.mark.parametrize("name", ["sparsemax", "entmax 1.5, causal"])
def test_lengths(emulated, name, lengths):
    check(FORMS[name], inputs(*lengths, batch=2, heads=2, kv_heads=1))


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (256, 256), (72, 72), (192, 128), (16, 40)])
def test_sizes(emulated, dim, v_dim):
    check(FORMS["entmax 1.5, causal"], inputs(150, 330, heads=2, dim=dim, v_dim=v_dim, dtype=torch.float16))


@pytest.mark.parametrize("scale", [0.0, -0.2, 2.0])
def test_scales(emulated, scale):
    """Large ones leave a row a few keys; at zero all keys have the same weight."""
    check(FORMS["entmax 1.5, causal"], inputs(100, 200).with_(scale=scale))


def test_keys_at_positions_of_their_own(emulated):
    """Padding, and a cache in no order."""
    x = inputs(50, 300, batch=2)
    padded = torch.where(torch.arange(300) % 3 == 0, -1, torch.arange(300))
    at = torch.stack([padded, torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    check(FORMS["entmax 1.5, causal"], x.with_(kv_positions=at))


def test_lists_of_tiles_and_chosen_blocks(emulated, monkeypatch):
    monkeypatch.setattr(tables, "table", tables.lists)
    tables.KEPT.found.clear()
    check(FORMS["empty rows"], inputs(400, 400))
    tables.KEPT.found.clear()
    moba = manyheads.get("moba")(block_size=40, top_k=3)
    inner = replace(moba.scores, normaliser="entmax", alpha=1.5)
    check(*as_scores(replace(moba, scores=inner), inputs(150, 400)))


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.2])
def test_weights_add_up_to_one(emulated, alpha):
    """Against the level itself, from far and from near: rows that are flat, and rows with one key above all."""
    x = inputs(128, 1000, heads=4, kv_heads=4)
    x = x.with_(scale=1.0)
    x.q[:, 0] = 0.0
    x.q[:, 1] *= 4
    form = form_of(alpha)
    tau = entmax.levels_of(form, x)
    z = (alpha - 1) * (x.q.double() @ x.k.double().mT)
    total = ((z - tau[..., None].double()).clamp(min=0) ** (1 / (alpha - 1))).sum(-1)
    # A level in float32 is wrong by half its last bit, for each key that it lets through.
    rounding = 2.0**-24 * (z.abs().amax(-1) + 1) * (z > tau[..., None]).sum(-1) / (alpha - 1)
    assert ((total - 1).abs() <= entmax.ENOUGH + rounding).all()
    assert (total - 1).abs().median() < entmax.ENOUGH / 8, "the last step takes most rows much further"


@pytest.mark.parametrize("alpha", [1 + given_levels.LEAST, 1.1, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("n", [2, 100, 5000])
def test_enough_steps_for_the_worst_rows(alpha, n):
    """Newton's steps in float64, over rows made to be slow: each key has a reason of its own to fall away late."""
    k = 1 / (alpha - 1)
    slow = torch.stack([
        torch.zeros(n), torch.linspace(-1, 0, n), -torch.linspace(0, 1, n) ** 4, -torch.arange(n).double() / n**0.5,
        1 / torch.arange(1, n + 1).double(), -(torch.arange(n).double() ** 0.25), torch.linspace(0, -1, n) ** 16,
    ]).double()  # fmt: skip
    tau = slow.amax(-1) - 1
    for _ in range(entmax.steps_to_levels(alpha, n)):
        x = (slow - tau[:, None]).clamp(min=0)
        total, slope = (x**k).sum(-1), (x ** (k - 1)).where(x > 0, 0.0).sum(-1)
        tau = tau + (total - total ** (1 - 1 / k)) / slope
    total = ((slow - tau[:, None]).clamp(min=0) ** k).sum(-1)
    assert (total <= 1 + entmax.ENOUGH).all() and (total >= 1 - 1e-9 * k).all()


def test_tiles_that_have_arrived_are_left_alone(emulated, monkeypatch):
    """Once none is ahead, other keys change nothing."""
    x, looks, run = inputs(300, 300), [], launching.Kernel.run
    before = entmax.levels_of(FORMS["entmax 1.5, causal"], x)

    def counted(kernel, programs, own, source, arguments):
        if looks and not looks[-1]:
            x.k.fill_(0.5)
        run(kernel, programs, own, source, arguments)
        looks.append(int(own[4].sum()))

    monkeypatch.setattr(launching.Kernel, "run", counted)
    assert torch.equal(entmax.levels_of(FORMS["entmax 1.5, causal"], x), before)
    assert len(looks) == 1 + entmax.steps_to_levels(1.5, 300)
    assert looks[0] == 3 * 2 * 4 - 4, "300 queries are two and a half tiles"
    assert sum(n > 0 for n in looks) <= 8
    assert (x.k == 0.5).all() and not torch.equal(entmax.levels_of(FORMS["entmax 1.5, causal"], x), before)


def test_nothing_to_read():
    x = inputs(5, 0)
    o, tau = hopper.run(FORMS["entmax 1.5"], x)
    assert (o == 0).all() and (tau == math.inf).all()


def test_autograd(emulated, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = FORMS["entmax 1.5, causal"], inputs(150, 200, heads=2)
    wide = {name: getattr(x, name).double().requires_grad_() for name in "qkv"}
    own = {name: getattr(x, name).clone().requires_grad_(name != "k") for name in "qkv"}
    true, found = eager.run(form, x.with_(**wide))[0], launch.attend(form, x.with_(**own))[0]
    given = [torch.autograd.grad(o.sum(), [at["q"], at["v"]]) for o, at in ((found, own), (true, wide))]
    for a, b in zip(*given, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("dropped", [False, True])
def test_gradient_of_alpha(emulated, monkeypatch, dropped):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = FORMS["an alpha of each head"], inputs(150, 200, batch=2)
    x = x.with_(dropout=dropout_of(0.3, 5, x.q.device)) if dropped else x
    torch.manual_seed(1)
    do = torch.randn(2, 4, 150, 64)
    found = []
    for dtype, engine in ((torch.float64, eager.run), (x.q.dtype, launch.attend)):
        alpha = torch.tensor([1.2, 1.5, 2.0, 1.05], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        at = x.with_(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype), operands={"a": alpha})
        found.append(torch.autograd.grad((engine(form, at)[0] * do).sum(), alpha)[0])
    torch.testing.assert_close(found[1].double(), found[0], rtol=2e-2, atol=2e-2 * float(found[0].norm()))


def test_one_key_leaves_alpha_no_gradient(emulated):
    """Its weight is 1, or by rounding a little more, of which there is no entropy."""
    form, x = FORMS["an alpha of each head"], inputs(300, 1, kv_heads=4)
    x = x.with_(operands={"a": torch.tensor([1.3, 1.5, 1.9, 1.05])}, scale=1.0, q_positions=range(300))
    _, tau = hopper.run(form, x)
    do = torch.ones(1, 4, 300, 64)
    assert (entmax.alpha_gradient(form, x, tau, do).abs() < 1e-2).all()
    assert torch.isfinite(entmax.alpha_gradient(form, x, tau - 2.0**-18, do)).all()


def test_an_alpha_next_to_one_is_a_softmax(emulated):
    x = inputs(100, 200).with_(operands={"a": torch.ones(4, requires_grad=True)})
    o, tau = hopper.run(FORMS["an alpha of each head"], x)
    expected, _ = eager.run(Scores(mask=past), x)
    # p^(1 / 4096) in float32 keeps three digits of p, and entmax is nearer to softmax than that.
    assert (o.double() - expected).norm() <= 1e-2 * expected.norm()
    assert (entmax.alpha_gradient(FORMS["an alpha of each head"], x, tau, torch.ones_like(o)) == 0).all()


@pytest.mark.parametrize("name", ["sparsemax, causal", "entmax 1.5", "an alpha of each head"])
def test_dropout(emulated, name):
    x = inputs(150, 330, batch=2).with_(operands={"a": torch.tensor([1.2, 1.5, 2.0, 1.05])})
    check(FORMS[name], x.with_(dropout=dropout_of(0.3, 5, x.q.device)))


def test_weights_that_nothing_divides_have_no_mean_to_take_off(emulated):
    form, x = test_hopper.FORMS["sigmoid"], inputs(100, 150)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    true = torch.autograd.grad(eager.run(form, wide)[0].sum(), [wide.q, wide.k, wide.v])
    o, lse = hopper.run(form, x)
    for a, b in zip(hopper.gradients(form, x, o, lse, torch.ones_like(o), None), true, strict=True):
        assert a is not None and (a.double() - b).norm() <= 1e-2 * b.norm()


def test_as_an_operator(emulated, monkeypatch):
    """What torch.compile calls, with the levels in place of an lse."""
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = FORMS["an alpha of each head"], inputs(70, 100)
    found = []
    for run in (launch.attend, op.ATTEND):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, torch.tensor([1.2, 1.5, 2.0, 1.05]))]
        q, k, v, alpha = leaves
        o, _ = run(form, x.with_(q=q, k=k, v=v, operands={"a": alpha}))
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_reasons(monkeypatch):
    form, x = FORMS["an alpha of each head"], inputs(5, 5).with_(operands={"a": torch.full((4,), 1.5)})
    assert entmax.why_not(form, x) is None
    slopes = torch.ones(4, requires_grad=True)
    learned = form_of(1.5, None, lambda s, b, h, i, j: s * slopes[h])
    assert "no gradients to what" in entmax.why_not(learned, x)
    with torch.no_grad():
        assert entmax.why_not(learned, x) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "captured tensors" in entmax.why_not(FORMS["ALiBi"], x)
        assert entmax.why_not(form, x) is None
    assert "alpha from" in entmax.why_not(form_of(2.5), x) and "alpha from" in entmax.why_not(form_of(1.0), x)
    assert "consecutive queries" in entmax.why_not(form, x.with_(q_positions=torch.arange(5)[None]))


@on_hopper
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lengths", [(700, 700), (1, 1000), (200, 77), (2049, 2049)])
def test_forms_on_a_gpu(name, lengths):
    x = inputs(*lengths, heads=4, kv_heads=2, batch=2, dim=128, device="cuda")
    check(FORMS[name], x.with_(operands={"a": torch.tensor([1.2, 1.5, 2.0, 1.001], device="cuda")}))


@on_hopper
def test_the_same_bits_every_run():
    x = inputs(4000, 4000, heads=16, kv_heads=4, dim=128, device="cuda")
    form = FORMS["entmax 1.5, causal"]
    o, tau = hopper.run(form, x)
    first = o, tau, *hopper.gradients(form, x, o, tau, torch.ones_like(o), None)
    again = hopper.run(form, x)
    again = *again, *hopper.gradients(form, x, *again, torch.ones_like(o), None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
