"""What papers on dense attention say of their mechanisms beyond the equation: limits, orders, expectations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from manyheads import attention, get
from manyheads.core.entmax import entmax
from manyheads.mechanisms.dense import adaptive_filter_attention, concentric_causal_attention, neural_attention

EXACT = {"atol": 1e-12, "rtol": 1e-10}


# ---- entmax ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.3, 1.5, 2.0, 3.0])
def test_entmax_sums_to_one_and_gives_nothing_to_what_is_masked(alpha, dtype):
    s = 3 * torch.randn(50, 17, dtype=dtype)
    s[:, 3], s[7] = -torch.inf, -torch.inf
    p = entmax(s, alpha)
    expected = torch.ones(50, dtype=dtype).index_fill(0, torch.tensor(7), 0.0)
    torch.testing.assert_close(p.sum(-1), expected)
    assert p[:, 3].eq(0).all() and p.ge(0).all()
    assert p.argmax(-1).equal(s.argmax(-1))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_entmax_by_sorting_equals_entmax_by_bisection(alpha):
    for s in (torch.randn(200, 33, dtype=torch.float64), 20 * torch.randn(200, 5, dtype=torch.float64)):
        torch.testing.assert_close(entmax(s, alpha), entmax(s, torch.tensor(alpha)), **EXACT)
    equal = torch.zeros(1, 9, dtype=torch.float64)
    torch.testing.assert_close(entmax(equal, alpha), equal + 1 / 9, **EXACT)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Nearer than any other weights are."""
    s = torch.randn(6, dtype=torch.float64)
    p = entmax(s, 2.0)
    others = torch.distributions.Dirichlet(torch.full((6,), 0.5, dtype=torch.float64)).sample((5000,))
    assert ((others - s).norm(dim=-1) >= (p - s).norm()).all()


def test_the_support_of_entmax_shrinks_with_alpha_and_is_everything_at_softmax():
    s = torch.randn(20, 40, dtype=torch.float64)
    counts = [entmax(s, torch.tensor(a)).gt(0).sum(-1) for a in (1.0, 1.2, 1.5, 1.8, 2.0, 2.5)]
    assert counts[0].eq(40).all() and counts[-1].lt(6).all()
    assert all((more >= fewer).all() for more, fewer in pairwise(counts))
    torch.testing.assert_close(entmax(s, 1.0), s.softmax(-1), **EXACT)
    torch.testing.assert_close(entmax(s, torch.tensor(1 + 1e-6)), s.softmax(-1), atol=1e-5, rtol=1e-4)


def test_entmax_has_the_gradients_of_finite_differences():
    s = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[1.2], [1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax, (s, alpha))
    for exact in (1.0, 1.5, 2.0):
        assert torch.autograd.gradcheck(lambda x, a=exact: entmax(x, a), (s,))


# ---- explicit sparse attention ----


def test_the_best_key_alone(make_inputs):
    """k = 1 gives its value, and nothing flows back to scores."""
    form = get("explicit_sparse")(top_k=1)
    x = make_inputs(form, 6, 20, kv_heads=2, grad=True)
    best = (x.q @ x.k.repeat_interleave(2, 1).mT).argmax(-1)
    expected = x.v.repeat_interleave(2, 1).gather(2, best[..., None].expand(-1, -1, -1, x.v.shape[3]))
    o = attention(*x.tensors, form)
    torch.testing.assert_close(o, expected, **EXACT)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(o.sum(), [x.q, x.k]))


# ---- monotonic attention ----


def test_monotonic_attention_expects_what_hard_heads_do_on_average(make_inputs):
    """Heads that stop at random, 20000 times; the standard error of a share is below 0.004."""
    form = get("monotonic_attention")()
    x = make_inputs(form, 5, 7, batch=1, heads=1)
    weights = attention(x.q, x.k, torch.eye(7, dtype=torch.float64).expand(1, 1, 7, 7), form, **x.operands)[0, 0]
    p = (x.q @ x.k.mT / 6**0.5 + x.operands["r"]).sigmoid()[0, 0]
    stopped = torch.zeros(5, 7)
    at = torch.zeros(20000, dtype=torch.long)  # 7: past the end, for good
    for i in range(5):
        stops = torch.rand(20000, 7) < p[i]
        stops &= torch.arange(7) >= at[:, None]
        at = torch.where(stops.any(-1), stops.int().argmax(-1), 7)
        stopped[i] = torch.nn.functional.one_hot(at, 8).float().mean(0)[:7]
    torch.testing.assert_close(weights.float(), stopped, atol=0.015, rtol=0.0)
    assert (weights.sum(-1) <= 1 + 1e-12).all() and weights.sum(-1)[-1] < 0.999


def test_hard_monotonic_attention_goes_on_from_where_it_stopped():
    """Scores above 0 are stops; the third query finds none after key 2, so nothing is read any more."""
    scores = torch.tensor([[-1, 1, 1, -1], [1, -1, 1, -1], [1, 1, -1, -1], [1, 1, 1, 1]], dtype=torch.float64)
    k = v = torch.eye(4, dtype=torch.float64)[None, None]
    o = attention(scores[None, None], k, v, "monotonic_attention", alignment="hard", r=torch.zeros(1))
    assert o[0, 0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


# ---- Luong, memory networks ----


def test_predicted_places_have_gradients(make_inputs):
    form = get("luong_attention")(where="predictive", reach=20)
    x = make_inputs(form, 3, 5, batch=1, heads=2, kv_heads=1, head_dim=3, v_head_dim=2, grad=True)

    def outputs(q, k, v, w_p, u_p):
        return attention(q, k, v, form, w_p=w_p, u_p=u_p)

    assert torch.autograd.gradcheck(outputs, (*x.tensors, x.operands["w_p"], x.operands["u_p"]))


def test_location_scores_end_where_their_weights_do(make_inputs):
    form = get("luong_attention")(score="location", longest=6)
    x = make_inputs(form, 4, 7)
    with pytest.raises(ValueError, match=r"weights for 6 places .*not for 7"):
        attention(*x.tensors, form, **x.operands)


@pytest.mark.parametrize(
    ("name", "setting", "nearest"),
    [
        ("luong_attention", {"score": "concatenate"}, "'concat'"),
        ("luong_attention", {"where": "globally"}, "'global'"),
        ("monotonic_attention", {"alignment": "harder"}, "'hard'"),
        ("adaptive_filter_attention", {"noise": "students"}, "'student'"),
        ("deconstructed_attention", {"variant": "approximated"}, "'approximate'"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(name, setting, nearest):
    with pytest.raises(ValueError, match=f"Did you mean {nearest}"):
        get(name)(**setting)


def test_a_memory_network_reads_on_from_what_it_read():
    """Two facts: the first names where the second is to be looked up. Two hops find it, one does not."""
    sharp = 30.0
    k = sharp * torch.eye(4, dtype=torch.float64)[None, None]  # memories 0 ... 3
    v = torch.eye(4, dtype=torch.float64).roll(1, 1)[None, None]  # memory n says n + 1
    q = torch.eye(4, dtype=torch.float64)[None, None, :1]  # a question about 0
    h, g = torch.zeros(1, 4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    for hops in (1, 2, 3):
        o = attention(q, k, v, "memn2n", hops=hops, h=h, g=g)
        assert o[0, 0, 0].argmax() == hops and o[0, 0, 0].max() > 0.999


# ---- concentric causal attention ----


@pytest.mark.parametrize("grid", [24, 5, 4, 1])
def test_rings_are_squares_and_their_order_is_one(grid):
    ring = concentric_causal_attention.ring(torch.arange(grid * grid), grid)
    counts = ring.bincount().tolist()
    assert counts == [max(1, 4 * (grid - 1 - 2 * r)) for r in range((grid + 1) // 2)]
    n = torch.arange(grid * grid + 5)
    b = h = torch.zeros((), dtype=torch.long)
    sees = get("concentric_causal_attention")(grid=grid, image_start=2).program.mask(b, h, n[:, None], n).double()
    assert sees.diagonal().all() and (sees @ sees).gt(0).equal(sees.gt(0)), "reflexive and transitive"


@pytest.mark.parametrize(("grid", "start"), [(24, 35), (5, 0), (4, 3)])
def test_a_ring_is_one_rotary_position_and_text_goes_on_after_the_last(grid, start):
    n = torch.arange(start + grid * grid + 6)
    at = concentric_causal_attention.rotary_positions(n, grid, start)
    image, rings = slice(start, start + grid * grid), (grid + 1) // 2
    assert at[:start].equal(n[:start])
    assert at[image].unique().equal(torch.arange(start, start + rings))
    assert at[image].view(grid, grid)[0].eq(start).all(), "the border comes first"
    assert at[image.stop :].equal(torch.arange(start + rings, start + rings + 6))


# ---- adaptive filters ----


def test_the_variance_solves_its_differential_equation():
    """dV = (sigma2 - 2 mu V) dt from eta2, by 20000 steps of the midpoint rule; gamma2 comes on top."""
    mu, sigma2, eta2, gamma2 = 0.3, 0.7, 1.9, 0.4
    value, step = eta2, 4.0 / 20000
    for _ in range(20000):
        middle = value + step / 2 * (sigma2 - 2 * mu * value)
        value += step * (sigma2 - 2 * mu * middle)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (4.0, mu, sigma2, eta2, gamma2)]
    closed = adaptive_filter_attention.propagated(*numbers)
    assert closed.item() == pytest.approx(value + gamma2, rel=1e-7)
    still = adaptive_filter_attention.propagated(numbers[0], torch.zeros(()), *numbers[2:])
    assert still.item() == pytest.approx(4.0 * sigma2 + eta2 + gamma2, rel=1e-12)


def test_a_filter_without_decay_and_process_noise_is_softmax_attention(make_inputs):
    """Keys of one length; one value channel, which does not turn."""
    form = get("adaptive_filter_attention")(noise="gaussian")
    x = make_inputs(form, 7, 11, kv_heads=2, v_head_dim=1)
    k = x.k / x.k.norm(dim=-1, keepdim=True)
    given = {**x.operands, "mu": torch.zeros(4), "sigma2": torch.zeros(4)}
    o = attention(x.q, k, x.v, form, **given)
    tau, nu, variance = given["tau"], given["nu"], given["eta2"] + given["gamma2"]
    warmth = 2 * tau**2 / (nu * 3 * variance)
    torch.testing.assert_close(o, attention(x.q * warmth[:, None, None], k, x.v, "causal", scale=1.0), **EXACT)


# ---- pairs ----


def test_neural_attention_in_pieces_equals_the_whole(make_inputs, monkeypatch):
    form = get("neural_attention")(width=4)
    x = make_inputs(form, 9, 13, kv_heads=2, grad=True)
    whole = attention(*x.tensors, form, **x.operands)
    monkeypatch.setattr(neural_attention, "PAIRS", 200)
    pieces = attention(*x.tensors, form, **x.operands)
    torch.testing.assert_close(pieces, whole, **EXACT)
    a, b = (torch.autograd.grad(o.square().sum(), x.leaves) for o in (pieces, whole))
    torch.testing.assert_close(a, b, **EXACT)


def test_tensor_attention_with_a_second_key_of_ones_is_full_attention(make_inputs):
    """Every pair of a key then scores and says what the key does. Scaled by 1 / d, as the paper has it."""
    x = make_inputs(get("tensor_attention")(), 5, 8, kv_heads=2)
    ones = {"k2": torch.ones_like(x.k), "v2": torch.ones_like(x.v)}
    o = attention(*x.tensors, "tensor_attention", **ones)
    torch.testing.assert_close(o, attention(*x.tensors, "full", scale=1 / 6), **EXACT)
    other = {"k2": x.k, "v2": x.v}  # the two sides of a pair are alike
    o = attention(x.q, ones["k2"], ones["v2"], "tensor_attention", **other)
    torch.testing.assert_close(o, attention(*x.tensors, "full", scale=1 / 6), **EXACT)


def test_the_polynomial_of_tensor_attention_is_near_for_small_entries_only(make_inputs):
    """Entries up to 1 in four channels, as scores up to 1; then four times these."""
    x = make_inputs(get("tensor_attention")(), 12, head_dim=4)
    for size, even_degrees in ((1.0, (2, 4, 6)), (4.0, (6,))):
        q, k, k2 = (size * (2 * torch.rand(x.k.shape, dtype=torch.float64) - 1) for _ in range(3))
        given = {"k2": k2, "v2": x.operands["v2"]}
        exact = attention(q, k, x.v, "tensor_attention", **given)
        errors = [
            (attention(q, k, x.v, "tensor_attention", degree=degree, **given) - exact).abs().max().item()
            for degree in even_degrees
        ]
        if size == 1.0:
            assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-3
        else:
            assert errors[0] > 0.1


def test_relational_attention_without_relations_is_causal_attention(make_inputs):
    form = get("relational_attention")(relations=3, width=2)
    x = make_inputs(form, 5, 8, kv_heads=2)
    o = attention(*x.tensors, form, **{**x.operands, "w_r": torch.zeros_like(x.operands["w_r"])})
    torch.testing.assert_close(o, attention(*x.tensors, "causal"), **EXACT)
    same = {"x": x.operands["x"], "y": x.operands["y"], "w_r": x.operands["w_r"]}
    o = attention(x.q, x.k, torch.zeros_like(x.v), form, **{**same, "y": -same["y"]})
    torch.testing.assert_close(o, -attention(x.q, x.k, torch.zeros_like(x.v), form, **same), **EXACT)


# ---- other forms of softmax ----


def test_approximate_attention_is_softmax_attention_to_third_order(make_inputs):
    """Of scores ten times smaller, the difference is a thousand times smaller."""
    x = make_inputs(get("deconstructed_attention")(), 30)
    apart = [
        (attention(*x.tensors, "deconstructed_attention", scale=s) - attention(*x.tensors, scale=s)).abs().max()
        for s in (1e-1, 1e-2)
    ]
    assert 500 < apart[0] / apart[1] < 2000


def test_non_approximate_weights_only_fade(make_inputs):
    """A token's share is the same for all later queries, but for the sum it is divided by."""
    form = get("deconstructed_attention")(variant="non_approximate")
    x = make_inputs(form, 9, heads=1, batch=1)
    eye = torch.eye(9, dtype=torch.float64)[None, None]
    weights = attention(x.q, x.k, eye, form, **x.operands)[0, 0]
    assert (weights.tril().diff(dim=0).tril(-1) <= 0)[:, :8].all()
    ratio = weights[:, :1] / weights[:, 1:2]
    torch.testing.assert_close(ratio[1:], ratio[1:2].expand(8, 1), **EXACT)
    assert attention(torch.zeros_like(x.q), x.k, eye, form, **x.operands)[0, 0].equal(weights), "queries do not matter"


# ---- softmax without its matrix ----


@pytest.mark.parametrize("name", ["full", "causal"])
def test_scores_in_the_ten_thousands_neither_overflow_nor_blur(name, make_inputs):
    """In float32, against float64; the weights are 0 and 1 but where two scores are near."""
    x = make_inputs(get(name)(), 40, dtype=torch.float32, grad=True)
    o = attention(*x.tensors, name, scale=3e3, engine="eager")
    assert (x.q @ x.k.mT * 3e3).abs().max() > 1e4
    grads = torch.autograd.grad(o.square().sum(), x.leaves)
    assert o.isfinite().all() and all(g.isfinite().all() for g in grads)
    exact = attention(*(t.double() for t in x.tensors), name, scale=3e3, engine="eager")
    # A score of 1e5 is rounded by 2^-7 in float32, and so is the logarithm of a weight.
    assert (o - exact).abs().max() < 2**-7 * 4 * x.v.abs().max()


def test_a_key_at_a_score_of_ten_thousand_takes_it_all():
    q = torch.full((1, 1, 1, 1), 1e4)
    k, v = torch.tensor([1.0, 0.5, -1.0]).view(1, 1, 3, 1), torch.tensor([3.0, 7.0, 9.0]).view(1, 1, 3, 1)
    assert attention(q, k, v, "full", engine="eager").item() == 3.0
