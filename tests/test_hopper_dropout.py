"""Dropout on Hopper, emulated, against eager in float64 with the same seed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator
import test_hopper
from test_hopper import FORMS, check, check_gradients, inputs, on_hopper, ragged
from test_hopper_entmax import check as check_entmax

from manyheads.core.dropout import dropout_of, hashed
from manyheads.core.forms import Operand, Scores
from manyheads.engines import eager
from manyheads.engines.triton import hopper, launch, op
from manyheads.engines.triton.hopper import launching

emulated = test_hopper.emulated  # a fixture
SINKS = Scores(mask=FORMS["window"].mask, sink="sink", operands={"sink": Operand("heads")})


def dropping(x, rate=0.3, seed=5):
    return x.with_(dropout=dropout_of(rate, seed, x.q.device))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "name", ["full", "causal", "soft-cap", "ALiBi", "documents", "empty rows", "signed", "sigmoid", "nothing"]
)
def test_forms(emulated, name, dim):
    x = dropping(inputs(150, 330, batch=2, dim=dim))
    check(FORMS[name], x)
    check_gradients(FORMS[name], x)


@pytest.mark.parametrize(("lengths", "rate"), [((1, 1), 1e-3), ((65, 129), 0.9), ((1, 300), 0.9), ((200, 77), 0.9)])
def test_lengths(emulated, lengths, rate):
    """With one key dP and its mean cancel, but for the rounding of o to 16 bits, of which a large o leaves more."""
    x = dropping(inputs(*lengths, heads=6, kv_heads=2), rate, seed=2**63 - 1)
    check(FORMS["causal"], x)
    check_gradients(FORMS["causal"], x)


def test_sizes(emulated):
    x = dropping(inputs(150, 330, heads=2, dim=256, v_dim=72))
    check(FORMS["window"], x)
    check_gradients(FORMS["window"], x)


def test_rows_of_their_own(emulated):
    x = dropping(ragged(inputs(300, 300, batch=3)), rate=0.8, seed=-(2**40))
    check(FORMS["causal"], x)
    check_gradients(FORMS["causal"], x, apart=True)


def test_sinks(emulated):
    x = dropping(inputs(150, 150)).with_(operands={"sink": torch.tensor([-3.0, -1.0, 0.5, 4.0])})
    check(SINKS, x)
    check_gradients(SINKS, x)


def test_entmax(emulated):
    """Every row has so many keys that some stay: one that sees none would be told by o = 0."""
    check_entmax(Scores(normaliser="entmax", alpha=1.3), dropping(inputs(150, 330), rate=0.1))


def test_the_same_bits(emulated):
    """On 32 bits in the kernels, on 64 elsewhere."""
    module = emulator.load("common", "dropping")["dropping"]
    i, j = torch.tensor([-1, 0, 1, 2**20, 2**31 - 1])[:, None], torch.tensor([0, 1, 77, 2**31 - 1])[None]
    places = [[emulator.Array.of(part.numpy()) for part in (t - (t & 9), t & 9)] for t in (i, j)]
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789012345):
        for b, h in ((0, 0), (1, 3), (700, 63)):
            own = torch.tensor([seed])
            words = module.key_of(emulator.Pointer.to_tensor(own), emulator.Int(b), emulator.Int(h))
            found = hashed(own, torch.tensor(b), torch.tensor(h), i, j)
            for threshold in found.flatten().tolist():
                kept = module.kept(*words, *places, emulator.Int(threshold))
                assert torch.equal(torch.from_numpy(kept), found >= threshold)


@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.5, 0.99])
def test_thresholds_fit_in_32_bits(rate):
    """Else a kernel would be compiled for each kind of number."""
    x = dropping(inputs(1, 1), rate)
    _, threshold, _ = launching.dropping(x)
    assert threshold is not None and x.dropout is not None and -(2**31) <= threshold < 2**31
    assert threshold % 2**32 == x.dropout.threshold


@pytest.mark.parametrize("attend", [launch.attend, op.ATTEND], ids=["function", "operator"])
def test_autograd(emulated, monkeypatch, attend):
    """From loss to leaves: the sink's gradient has no kernel on Hopper. The operator makes the call anew."""
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    monkeypatch.setattr(launch, "row_delta", lambda o, do, dlse, call: (o.float() * do.float()).sum(-1))
    x = dropping(inputs(150, 150))
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v, torch.tensor([-3.0, -1.0, 0.5, 4.0]))]
    found = torch.autograd.grad(attend(SINKS, x.with_(operands={"sink": leaves[3]}))[0].sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    q, k, v, sink = wide
    true = torch.autograd.grad(eager.run(SINKS, x.with_(q=q, k=k, v=v, operands={"sink": sink}))[0].sum(), wide)
    for a, b in zip(found, true, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_what_scores_read_is_not_learned():
    slopes = torch.tensor([0.3, 0.05, 0.01, 0.2], requires_grad=True)
    form, x = Scores(score=lambda s, b, h, i, j: s - slopes[h] * abs(i - j)), inputs(8, 8)
    reasons = [hopper.why_not(form, dropping(x)), hopper.why_not(form, x), hopper.why_not(FORMS["ALiBi"], dropping(x))]
    with torch.no_grad():
        reasons.append(hopper.why_not(form, dropping(x)))
    assert ["gradients to q, k, v and sinks alone" in str(why) for why in reasons] == [True, False, False, False]


# ---- on a GPU ----


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["full", "causal", "soft-cap", "signed", "sigmoid"])
def test_forms_on_a_gpu(name, dim):
    whole = inputs(700, 1000, heads=8, batch=2, dim=dim, device="cuda")
    for x in (whole, ragged(inputs(300, 300, batch=3, dim=dim, device="cuda"))):
        check(FORMS[name], dropping(x, rate=0.1))
        check_gradients(FORMS[name], dropping(x, rate=0.1))


@on_hopper
def test_the_same_weights_go_on_a_gpu():
    """Values are the identity, so that what comes out says which keys a query kept."""
    x = dropping(inputs(300, 64, heads=2, kv_heads=2, device="cuda"), rate=0.5)
    x = x.with_(v=torch.eye(64, dtype=x.v.dtype, device="cuda").expand(1, 2, 64, 64).contiguous())
    assert torch.equal(hopper.run(FORMS["full"], x)[0] > 0, eager.run(FORMS["full"], x)[0] > 0)


@on_hopper
def test_other_rates_and_seeds_compile_nothing():
    from triton import knobs

    x, compiled = inputs(200, 200, device="cuda"), []
    hopper.run(FORMS["causal"], dropping(x))
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about)
    try:
        for rate, seed in ((0.1, 1), (0.5, 16), (1e-9, 2**40), (0.99, -1)):
            hopper.run(FORMS["causal"], dropping(x, rate, seed))
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@on_hopper
def test_the_layer_in_one_graph():
    """Compiled and not: the same generator, the same seed, the same outputs and gradients."""
    from manyheads import Attention

    layer = Attention(256, 4, dropout=0.2).to("cuda", torch.bfloat16)
    x, found = torch.randn(2, 2048, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True), []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        o = function(x)
        found.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
