"""Changes of attention maps: what their papers promise beyond what every mechanism is tested for."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention, get
from manyheads.mechanisms.dense.paint import informed_tokens
from manyheads.mechanisms.dense.visual_attention_redistribution import sink_tokens

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def maps(x, name, n, **settings_and_operands):
    """The weights that a mechanism gives: what comes out for values that are unit vectors."""
    unit = torch.eye(n, dtype=x.v.dtype).expand(*x.v.shape[:2], n, n)
    return attention(x.q, x.k, unit, name, **settings_and_operands)


def close(a, b):
    torch.testing.assert_close(a, b, **EXACT)


# ---- attention calibration ----


def test_a_planted_sink_gives_its_weight_away_in_proportion(make_inputs):
    x = make_inputs(get("full")(), 16, batch=1, heads=2, head_dim=8)
    x.q[:, 0] *= 0.3
    x.q[:, 0, :, 0], x.k[:, 0, :, 0], x.k[:, 0, 6, 0] = 3.0, 0.0, 5.0
    plain = maps(x, "causal", 16)
    changed = maps(x, "attention_calibration", 16, alpha=5.0, beta=0.4, heads=(0,))
    close(changed.sum(-1), torch.ones_like(changed[..., 0]))
    close(changed[:, 1], plain[:, 1])
    close(changed[:, 0, :6], plain[:, 0, :6])
    after, before = changed[0, 0, 6:], plain[0, 0, 6:]
    close(after[:, 6], 0.4 * before[:, 6])
    others = [t for t in range(16) if t != 6]
    gain = 1 + 0.6 * before[:, 6] / before[:, others].sum(-1)
    close(after[:, others], gain[:, None] * before[:, others])
    assert (before[:, 6] > 0.5).all()


def test_the_first_token_is_never_turned_down(make_inputs):
    x = make_inputs(get("full")(), 12)
    x.q[..., 0], x.k[..., 0], x.k[:, :, 0, 0] = 3.0, 0.0, 4.0
    plain = maps(x, "causal", 12)
    assert (plain[..., 0].mean(-1) > 2 / 12).all(), "it is a sink"
    assert (maps(x, "attention_calibration", 12, alpha=2.0) > plain - 1e-15)[..., 0].all()


# ---- visual attention redistribution ----


def test_a_massive_activation_is_found_and_its_weight_goes_to_other_image_tokens(make_inputs):
    hidden = torch.randn(1, 12, 512)
    hidden[0, 5, 17], hidden[0, 9, 18] = 600.0, 600.0
    sink = sink_tokens(hidden, (17, 30))
    assert sink.nonzero().tolist() == [[0, 5]]
    assert sink_tokens(hidden, (17, 18)).nonzero().tolist() == [[0, 5], [0, 9]]

    x = make_inputs(get("full")(), 12, batch=1)
    image = torch.zeros(1, 12, dtype=torch.float64)
    image[:, 2:8] = 1
    given = {"image": image, "sink": sink.double()}
    plain = maps(x, "causal", 12)
    changed = maps(x, "visual_attention_redistribution", 12, **given, keep=0.6, rho=1.0, share=0.0)
    close(changed.sum(-1), torch.ones_like(changed[..., 0]))
    close(changed[:, :, :8], plain[:, :, :8])  # before the image, and the image's own queries
    rest = [2, 3, 4, 6, 7]
    moved = 0.4 * plain[:, :, 8:, 5, None] * plain[:, :, 8:, rest] / plain[:, :, 8:, rest].sum(-1, keepdim=True)
    close(changed[:, :, 8:, rest], plain[:, :, 8:, rest] + moved)
    close(changed[:, :, 8:, 5], 0.6 * plain[:, :, 8:, 5])
    same = [0, 1, 8, 9, 10, 11]
    close(changed[..., same], plain[..., same])
    close(maps(x, "visual_attention_redistribution", 12, **given, keep=1.0), plain)


def test_only_image_centric_heads_are_changed(make_inputs):
    x = make_inputs(get("full")(), 12, batch=1)
    image, sink = torch.zeros(2, 1, 12, dtype=torch.float64)
    image[:, 2:8], sink[:, 5] = 1, 1
    plain = maps(x, "causal", 12)
    changed = maps(x, "visual_attention_redistribution", 12, image=image, sink=sink, rho=0.2, share=0.4)
    on_image, on_sink = plain[..., 2:8].sum(-1), plain[..., 5]
    chosen = (on_image >= 0.4) & (on_sink <= 0.2 * on_image)
    chosen[:, :, :8] = False
    assert chosen.any() and not chosen[:, :, 8:].all()
    moved = ~torch.isclose(changed, plain, rtol=1e-12, atol=0).all(-1)
    assert moved.equal(chosen)


@pytest.mark.parametrize("name", ["attention_calibration", "visual_attention_redistribution"])
def test_a_query_before_the_first_key_sees_nothing(name, make_inputs):
    form = get(name)(**get(name).examples[1])
    x = make_inputs(form, 7, 4)
    o = attention(*x.tensors, form, **x.operands)
    assert o[:, :, :3].eq(0).all()
    close(o[:, :, 3:], attention(x.q[:, :, 3:], x.k, x.v, form, **x.operands))


# ---- PAINT ----


def test_informed_tokens_take_more_the_more_they_are_raised(make_inputs):
    x = make_inputs(get("full")(), 12)
    local, summary = torch.zeros(2, 1, 12, dtype=torch.float64)
    local[:, 3:6], summary[:, 8] = 1, 1
    given = {"local": local, "summary": summary, "beta": 0.0}
    close(maps(x, "paint", 12, alpha=0.0, **given), maps(x, "causal", 12))
    before = maps(x, "causal", 12)[:, :, 6:, 3:6].sum(-1)
    for alpha in (0.3, 0.7, 2.0):
        after = maps(x, "paint", 12, alpha=alpha, **given)[:, :, 6:, 3:6].sum(-1)
        assert (after > before).all()
        before = after
    late = maps(x, "paint", 12, prompt=10, alpha=1.0, **given)
    close(late[:, :, :9], maps(x, "causal", 12)[:, :, :9])
    close(late[:, :, 9:], maps(x, "paint", 12, alpha=1.0, **given)[:, :, 9:])


def test_informed_tokens_are_the_best_of_early_and_the_outliers_of_late():
    early, late = torch.zeros(2, 2, 16)
    early[0, [1, 4]], early[1, [7, 9]] = 0.5, 0.4
    late[:] = torch.arange(16) / 100
    late[:, 4], late[:, 9] = 1.0, 0.2  # 9 is beyond the first quartile's distance, not beyond the third's
    local, summary = informed_tokens(early, late, share=0.25)
    assert local.nonzero().flatten().tolist() == [1, 7, 9] and summary.nonzero().flatten().tolist() == [4]


# ---- attention bottleneck ----


def test_what_the_bottleneck_lets_through(make_inputs):
    x = make_inputs(get("full")(), 9, heads=1)
    w, plain = (maps(x, name, 9) for name in ("attention_bottleneck", "full"))
    close(w[:, :, 1:], plain[:, :, 1:])
    own = plain[:, :, 0, 0]
    close(w[:, :, 0, 1:].sum(-1), (1 - own) ** 2)
    close(maps(x, "attention_bottleneck", 9)[:, :, 0], (1 - own)[..., None] * plain[:, :, 0])


def test_a_closed_bottleneck_shows_nothing_of_the_image(make_inputs):
    x = make_inputs(get("full")(), 9, heads=1)
    x.q[:, :, 0], x.k[:, :, 1:], x.k[:, :, 0] = 50.0, -50.0, 50.0
    o = attention(*x.tensors, "attention_bottleneck")
    assert o[:, :, 0].eq(0).all()
    x.v[:, :, 1:] = torch.randn_like(x.v[:, :, 1:])
    assert attention(*x.tensors, "attention_bottleneck")[:, :, 0].equal(o[:, :, 0])


# ---- reversed attention ----


def test_each_sender_gives_its_share_and_no_more(make_inputs):
    x = make_inputs(get("reversed_attention")(), 9)
    w = maps(x, "reversed_attention", 9, **x.operands)
    selector, message = x.operands["selector"], x.operands["message"]
    close(selector.sum(1), torch.ones_like(message))
    close(w.sum(-2), selector * message[:, None])
    even = {"selector": torch.ones_like(selector), "message": torch.ones_like(message)}
    close(maps(x, "reversed_attention", 9, **even), maps(x, "full", 9).mT)


def test_a_query_without_a_value_is_refused(make_inputs):
    form = get("reversed_attention")()
    x = make_inputs(form, 5, 4)
    with pytest.raises(ValueError, match="5 exceed 4 keys"):
        attention(*x.tensors, form, **x.operands)


# ---- ByTheWay ----


def energy(maps):
    return maps.square().sum(-1).mean((1, 2))


def test_bytheway_restores_the_energy_that_guidance_takes(make_inputs):
    """And C = B + (b - 1) times the high frequencies of B, so that it stays a map, though with negative weights."""
    form = get("bytheway")
    x = make_inputs(form(), 16)
    x.q *= 4  # a sharp map, which an even guide makes dull
    x.operands["guide_k"] *= 0.05
    plain = maps(x, "full", 16)
    close(maps(x, "bytheway", 16, **x.operands, alpha=0.0, beta=1.0), plain)
    for tau in (3, 7):
        w = maps(x, "bytheway", 16, **x.operands, alpha=0.6, beta=1.0, tau=tau)
        close(w.sum(-1), torch.ones_like(w[..., 0]))
        close(energy(w), energy(plain))
    assert (energy(maps(x, "bytheway", 16, **x.operands, alpha=0.6, beta=10.0)) > energy(plain)).all()
    assert (w < 0).any()


def test_bytheway_goes_to_the_guide_by_alpha(make_inputs):
    x = make_inputs(get("bytheway")(), 16)
    x.q *= 0.1  # a map with less energy than its guide: nothing is to be restored
    plain = maps(x, "full", 16)
    guide = torch.softmax(x.operands["guide_q"] @ x.operands["guide_k"].mT * 6**-0.5, -1)
    w = maps(x, "bytheway", 16, **x.operands, alpha=0.3, beta=1.0)
    close(w - guide, 0.7 * (plain - guide))


def test_an_even_guide_leaves_nothing_to_restore(make_inputs):
    x = make_inputs(get("bytheway")(), 16)
    x.operands["guide_k"][:] = 1.0
    w = maps(x, "bytheway", 16, **x.operands, alpha=1.0, beta=1.0)
    close(w, torch.full_like(w, 1 / 16))
