"""Dropout of weights: what it computes, that it is the same however a call is cut, and how random its hash is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads import Attention, attention
from manyheads.core.checks import build_inputs
from manyheads.core.dropout import Dropout, dropout_of, hashed
from manyheads.core.forms import Operand, Scores
from manyheads.core.tiling import plain

RATE = 0.3


def qkv(q_len=12, kv_len=12, batch=2, heads=4, kv_heads=2, dim=8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)

    def leaf(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, dim, dtype=torch.float64)

    return leaf(heads, q_len), leaf(kv_heads, kv_len), leaf(kv_heads, kv_len)


def keep_of(seed: int, q: Tensor, k: Tensor, rate: float) -> Tensor:
    """[batch, heads, q_len, kv_len], as a mask."""
    b, h, i, j = torch.meshgrid(*map(torch.arange, (*q.shape[:2], k.shape[2], k.shape[2])), indexing="ij")
    return (hashed(torch.tensor([seed]), b, h, i, j) >= round(rate * 2**32))[:, :, -q.shape[2] :]


# ---- what it computes ----

FORMS = {
    "full": Scores(),
    "causal": Scores(mask=lambda b, h, i, j: j <= i),
    "signed": Scores(mask=lambda b, h, i, j: j <= i, normaliser="signed"),
    "sigmoid": Scores(score=lambda s, b, h, i, j: torch.sigmoid(s - 1.0), normaliser="none"),
    "sinks": Scores(mask=lambda b, h, i, j: j < i, sink="sink", operands={"sink": Operand("heads")}),
    "entmax": manyheads.get("entmax_attention")(),
    "top-k": manyheads.get("explicit_sparse")(top_k=3),
    "blocks": manyheads.get("moba")(block_size=4, top_k=2),
}


@pytest.mark.parametrize("lengths", [(12, 12), (5, 12), (300, 300)])
@pytest.mark.parametrize("name", FORMS)
def test_weights_become_zero_or_larger(name, lengths):
    """The weights are read off with the identity for values; 300 queries are several chunks."""
    q, k, v = qkv(*lengths)
    given: dict[str, Any] = {"sink": torch.randn(4, dtype=torch.float64)} if name == "sinks" else {}
    identity = torch.eye(lengths[1], dtype=torch.float64).expand(2, 2, -1, -1)
    weights = attention(q, k, identity, FORMS[name], engine="eager", **given)
    dropped = torch.where(keep_of(7, q, k, RATE), weights, 0.0) / (1 - RATE)
    o = attention(q, k, v, FORMS[name], dropout=RATE, seed=7, **given)
    torch.testing.assert_close(o, dropped @ v.repeat_interleave(2, 1))


def test_the_lse_is_that_without():
    q, k, v = qkv()
    _, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(attention(q, k, v, dropout=RATE, seed=1, return_lse=True)[1], lse)


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    q, k, v = (t.requires_grad_() for t in qkv(5, 9, batch=1, heads=2, kv_heads=1, dim=3))
    given = [torch.randn(2, dtype=torch.float64, requires_grad=True)] if name == "sinks" else []
    assert torch.autograd.gradcheck(
        lambda q, k, v, *sink: attention(
            q, k, v, FORMS[name], dropout=0.5, seed=3, **({"sink": sink[0]} if sink else {})
        ),
        (q, k, v, *given),
    )


def test_seeds():
    """The same seed gives the same, as an int and as a tensor, which may change before the backward pass."""
    q, k, v = (t.requires_grad_() for t in qkv())
    first = attention(q, k, v, dropout=RATE, seed=5)
    true = torch.autograd.grad(first.sum(), (q, k, v))
    seed = torch.tensor(5)
    again = attention(q, k, v, dropout=RATE, seed=seed)
    seed.add_(1)
    assert torch.equal(first, again)
    for a, b in zip(torch.autograd.grad(again.sum(), (q, k, v)), true, strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(first, attention(q, k, v, dropout=RATE, seed=seed))
    assert torch.equal(attention(q, k, v), attention(q, k, v, dropout=0.0, seed=5))


def test_the_mean_over_seeds_is_what_it_is_without():
    q, k, v = qkv()
    seeds = 2000
    found = torch.stack([attention(q, k, v, "full", dropout=RATE, seed=seed) for seed in range(seeds)])
    apart = (found.mean(0) - attention(q, k, v, "full")) / (found.std(0) / math.sqrt(seeds))
    assert apart.abs().max() < 5, "standard errors of a mean, of 768 numbers"


# ---- however it is cut ----


@pytest.mark.parametrize("name", ["causal", "moba"])
def test_padding_changes_nothing(name):
    """Rows of their own positions, which blocks are chosen for one by one, among them."""
    q, k, v = qkv()
    o = attention(q, k, v, name, dropout=RATE, seed=9)
    q, k, v = (torch.cat([torch.randn_like(t[:, :, :5]), t], 2) for t in (q, k, v))
    at = (torch.arange(17) - 5).clamp(min=-1).expand(2, -1)
    found = attention(q, k, v, name, dropout=RATE, seed=9, q_positions=at, kv_positions=at)
    torch.testing.assert_close(found[:, :, 5:], o)
    assert not torch.allclose(o[0] - o[1], torch.zeros(()).double())


def test_rows_heads_and_positions_have_their_own():
    """The same tokens everywhere: what differs is what was dropped."""
    q, k, v = (t[:1, :1].expand(2, 2, -1, -1) for t in qkv())
    o = attention(q, k, v, "full", dropout=RATE, seed=9)
    rows = o.flatten(0, 1)
    assert all(not torch.allclose(rows[a], rows[b]) for a, b in itertools.combinations(range(4), 2))
    later = torch.arange(12) + 1
    assert not torch.allclose(
        o, attention(q, k, v, "full", dropout=RATE, seed=9, q_positions=later, kv_positions=later)
    )


def test_queries_and_keys_may_be_split():
    q, k, v = qkv()
    o, _ = attention(q, k, v, dropout=RATE, seed=2, return_lse=True)
    last = attention(q[:, :, 7:], k, v, dropout=RATE, seed=2)
    torch.testing.assert_close(last, o[:, :, 7:])
    parts = []
    for keys in (slice(0, 5), slice(5, 12)):
        at: dict[str, Any] = {"q_positions": torch.arange(12), "kv_positions": torch.arange(12)[keys]}
        parts.append(attention(q, k[:, :, keys], v[:, :, keys], dropout=RATE, seed=2, return_lse=True, **at))
    torch.testing.assert_close(manyheads.merge(*parts)[0], o)


def test_a_row_alone_has_a_seed_of_its_own():
    dropout = Dropout(RATE, torch.tensor([11]))
    weights, i, j = torch.ones(3, 2, 4, 4), torch.arange(4).view(-1, 1), torch.arange(4)
    whole = dropout.drop(weights, i, j)
    for b in range(3):
        assert torch.equal(dropout.of_row(b).drop(weights[:1], i, j)[0], whole[b])


# ---- the layer ----


def test_the_layer_drops_in_training_alone():
    layer, x = Attention(16, 4, dropout=0.5), torch.randn(2, 9, 16)
    plain = Attention(16, 4)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.allclose(first, second)
    assert not torch.allclose(first, plain(x))
    layer.eval()
    assert torch.equal(layer(x), plain(x))


# ---- what does not fit ----

BAD = {
    "a rate of 1": ({"dropout": 1.0, "seed": 0}, "dropout must be a number from 0 to below 1, not 1.0"),
    "a negative rate": ({"dropout": -0.1, "seed": 0}, "below 1, not -0.1"),
    "no number": ({"dropout": math.nan, "seed": 0}, "below 1, not nan"),
    "no seed": ({"dropout": 0.1}, "needs a seed, an int of 64 bits or an int64 tensor with one, not None"),
    "a seed of 65 bits": ({"dropout": 0.1, "seed": 2**63}, "an int of 64 bits or an int64 tensor"),
    "a seed of another dtype": ({"dropout": 0.1, "seed": torch.tensor(1.0)}, r"one int64, not torch.float32 \(\)"),
    "two seeds": ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, r"one int64, not torch.int64 \(2,\)"),
    "a seed elsewhere": (
        {"dropout": 0.1, "seed": torch.tensor(1, device="meta")}, "seed is on meta but q is on cpu; they must agree",
    ),
    "no weights": (
        {"dropout": 0.1, "seed": 0, "mechanism": "lightning_attention_2"}, "weights for pairs .* not for a Recurrence",
    ),
    "sdpa": ({"dropout": 0.1, "seed": 0, "engine": "sdpa"}, "scaled_dot_product_attention's dropout takes no seed"),
    "flex": ({"dropout": 0.1, "seed": 0, "engine": "flex"}, "FlexAttention has no dropout"),
    "triton": ({"dropout": 0.1, "seed": 0, "engine": "triton"}, "the Triton kernels for any GPU have no dropout"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_arguments_are_one_clear_sentence(case):
    (given, sentence), (q, k, v) = BAD[case], qkv()
    with pytest.raises(ValueError, match=sentence):
        attention(q.float(), k.float(), v.float(), **given)


def test_bad_layers_are_one_clear_sentence():
    with pytest.raises(ValueError, match=r"below 1, not 1\.5"):
        Attention(16, 4, dropout=1.5)
    with pytest.raises(ValueError, match="weights for pairs of tokens, not for a Recurrence"):
        Attention(16, 4, "lightning_attention_2", dropout=0.5)


def test_explain_knows():
    q, k, v = qkv()
    assert manyheads.explain(q, k, v, dropout=0.1, seed=0).engine == "eager"
    assert manyheads.explain(q, k, v, seed=0).engine == "sdpa"
    causal = manyheads.get("causal")()
    found = [plain(causal, build_inputs(causal, q, k, v, None, None, None, None, {}, rate, 0)) for rate in (0, 0.1)]
    assert found == [True, False], "torch has a kernel of its own for the first"


# ---- how random it is ----


def by_hand(seed: int, b: int, h: int, i: int, j: int) -> int:
    """The hash with Python's integers, step by step."""
    word = 2**32

    def mixed(x: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = (x ^ x // 2**shift) * factor % word
        return x ^ x // 2**15

    high, low = divmod((seed + b * 0x9E3779B97F + h * 0xD1B54A32D1) % 2**64, word)
    high ^= mixed((low + 0x5BD1E995) % word)
    low ^= mixed((high + 0x5BD1E995) % word)
    q, k = (i * 0x2C1B3C6D + low) % word, j * 0x297A2D39 % word
    x = ((q ^ q // 2**16 ^ k ^ k // 2**16) * 0x21F0AAAD + high) % word
    return (x ^ x // 2**15) * 0x735A2D97 % word


def test_the_hash_by_hand():
    """Positions and seeds to the ends of what there is."""
    places = (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (99, 63, 2**31 - 1, 2**31 - 1)
    for seed in (0, 1, -1, 2**32, 2**63 - 1, -(2**63)):
        for place in places:
            assert hashed(torch.tensor([seed]), *map(torch.tensor, place)).item() == by_hand(seed, *place)


def test_a_rate_is_never_all():
    almost = dropout_of(1 - 2**-40, 0, torch.device("cpu"))
    assert almost is not None and almost.threshold == 2**32 - 1 and almost.inflation == 2**32


def standardised(rate: float, seed: int, b: int, h: int, n: int = 1024, start: int = 0) -> Tensor:
    """keep of n x n pairs, less its mean, over its standard deviation: independent ones have mean 0 and variance 1."""
    at = torch.arange(start, start + n)
    numbers = hashed(torch.tensor([seed]), torch.tensor(b), torch.tensor(h), at[:, None], at)
    return ((numbers >= round(rate * 2**32)).double() - (1 - rate)) / math.sqrt(rate * (1 - rate))


BOUND = 5.0  # standard deviations; a normal number is beyond them once in 1.7 million
CASES = [(0.1, 0, 0, 0, 0), (0.5, 1, 2, 3, 0), (0.9, -(2**50), 63, 31, 10**6), (0.5, 2**62, 0, 1, 2**20)]


@pytest.mark.parametrize(("rate", "seed", "b", "h", "start"), CASES)
def test_as_many_as_the_rate_says(rate, seed, b, h, start):
    """In all, in rows and in columns: a sum of n squares has mean n and variance 2 n, nearly; and each alone."""
    x = standardised(rate, seed, b, h, start=start)
    n = len(x)
    assert abs(x.mean()) * n < BOUND
    for sums in (x.sum(0), x.sum(1)):
        z = sums / math.sqrt(n)
        assert abs(z.square().sum() - n) < BOUND * math.sqrt(2 * n)
        assert z.abs().max() < BOUND


@pytest.mark.parametrize(("rate", "seed", "b", "h", "start"), CASES)
def test_neighbours_are_independent(rate, seed, b, h, start):
    """For every distance in both directions, 10^6 in all, by a Fourier transform; then corners of rectangles, which
    numbers made from a row's and a column's alone would give away."""
    x = standardised(rate, seed, b, h, start=start)
    n = len(x)
    products = torch.fft.irfft2(torch.fft.rfft2(x).abs().square(), x.shape) / n
    products[0, 0] = 0
    assert products.abs().max() < 6.5, "of half a million normal numbers 5.0 is usual, and 6.5 once in 25000 times"
    for di, dj in itertools.product((1, 2, 3, 8, 64, 512), repeat=2):
        corners = x[:-di, :-dj] * x[di:, :-dj] * x[:-di, dj:] * x[di:, dj:]
        assert abs(corners.mean()) * math.sqrt(corners.numel()) < BOUND, (di, dj)


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (2**32, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1)],
    ids=["seed", "upper bits", "negative", "row", "head"],
)  # fmt: skip
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_others_are_independent(rate, other):
    """Another seed, row or head, at every distance."""
    x, y = standardised(rate, 0, 0, 0), standardised(rate, *other)
    products = torch.fft.irfft2(torch.fft.rfft2(x) * torch.fft.rfft2(y).conj(), x.shape) / len(x)
    assert abs(products[0, 0]) < BOUND and products.abs().max() < 6.5
