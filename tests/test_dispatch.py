"""The front door: every bad input is one clear sentence, and the engine is the one that was asked for."""

from __future__ import annotations

import pytest
import torch

import manyheads
from manyheads import attention, dispatch, explain
from manyheads.core import Scores, Selection, alike
from manyheads.engines import eager, sdpa


def qkv(q_len=5, kv_len=5, heads=4, kv_heads=4, head_dim=8, dtype=torch.float32, device="cpu", batch=2):
    return (
        torch.zeros(batch, heads, q_len, head_dim, dtype=dtype, device=device),
        torch.zeros(batch, kv_heads, kv_len, head_dim, dtype=dtype, device=device),
        torch.zeros(batch, kv_heads, kv_len, head_dim, dtype=dtype, device=device),
    )


def at(*rows):
    return torch.tensor(rows)


Q, K, V = qkv()
G, BETA = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)
FIVE = torch.arange(5)

# Tensors and mechanism, other arguments, the error, and what its sentence must say: what was given, what is allowed.
BAD = {
    "an unknown mechanism": (
        (Q, K, V, "slidingwindow"),
        {},
        KeyError,
        "'slidingwindow' is no mechanism.*'sliding_window'",
    ),
    "no mechanism": ((Q, K, V, 7), {}, TypeError, "a name or a form, not int"),
    "an unknown setting": (
        (Q, K, V, "moba"),
        {"topk": 3},
        TypeError,
        "'topk' is no setting.*moba.*'top_k'.*block_size",
    ),
    "a setting of the wrong type": ((Q, K, V, "moba"), {"top_k": 2.5}, TypeError, "top_k of moba must be int, not 2.5"),
    "a setting that is a list": ((Q, K, V, "moba"), {"top_k": [2]}, TypeError, r"top_k of moba must be int, not \[2\]"),
    "an unknown operand": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "bta": BETA},
        TypeError,
        "'bta' is no setting or operand.*'beta'",
    ),
    "an operand of a form that has none": (
        (Q, K, V, Scores()),
        {"g": G},
        TypeError,
        "'g' is no setting or operand of this form.*none",
    ),
    "a missing operand": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G},
        TypeError,
        r"kimi_delta_attention also needs beta \[batch heads len\]",
    ),
    "an operand of the wrong shape": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "beta": BETA[:, :3]},
        ValueError,
        r"beta is \(2, 3, 5\).*\(2, 4, 5\)",
    ),
    "an operand with a dimension less": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "beta": BETA[0]},
        ValueError,
        r"beta must be a tensor.*\(2, 4, 5\), not \(4, 5\)",
    ),
    "an operand that is a number": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "beta": 0.5},
        ValueError,
        "beta must be a tensor.*not float",
    ),
    "an operand of integers": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "beta": BETA.long()},
        ValueError,
        "beta is torch.int64.*floating",
    ),
    "an operand elsewhere": (
        (Q, K, V, "kimi_delta_attention"),
        {"g": G, "beta": BETA.to("meta")},
        ValueError,
        "beta is on meta but q is on cpu",
    ),
    "an unknown engine": ((Q, K, V), {"engine": "eagre"}, ValueError, "'eagre' is no engine.*'eager'.*sdpa"),
    "a list for q": (([1.0], K, V), {}, ValueError, r"q must be a tensor \[batch, heads, len, head_dim\], not list"),
    "q without heads": ((Q[0], K, V), {}, ValueError, r"q must be a tensor.*not \(4, 5, 8\)"),
    "v without heads": ((Q, K, V[0]), {}, ValueError, r"v must be a tensor.*not \(4, 5, 8\)"),
    "integers": (qkv(dtype=torch.int64), {}, ValueError, "q is torch.int64.*floating"),
    "mixed dtypes": ((Q, K.double(), V), {}, ValueError, "q is torch.float32.*k is torch.float64"),
    "mixed devices": ((Q, K.to("meta"), V), {}, ValueError, "q is torch.float32 on cpu.*k is torch.float32 on meta"),
    "heads that do not divide": (qkv(kv_heads=3), {}, ValueError, "q has 4 heads, which 3 kv_heads do not divide"),
    "no kv_heads": (qkv(kv_heads=0), {}, ValueError, "0 kv_heads"),
    "another head_dim": ((Q, *qkv(head_dim=6)[1:]), {}, ValueError, "q has head_dim 8 but k has 6"),
    "another batch": ((Q, *qkv(batch=3)[1:]), {}, ValueError, "q has batch 2 but k and v have 3"),
    "another kv_len": ((Q, K, V[:, :, :3]), {}, ValueError, r"k \(2, 4, 5, 8\) and v \(2, 4, 3, 8\) must agree"),
    "an infinite scale": ((Q, K, V), {"scale": float("inf")}, ValueError, "scale must be a finite number, not inf"),
    "a NaN scale": ((Q, K, V), {"scale": float("nan")}, ValueError, "scale must be a finite number, not nan"),
    "a text for scale": ((Q, K, V), {"scale": "1"}, ValueError, "scale must be a finite number, not '1'"),
    "q_positions alone": ((Q, K, V), {"q_positions": FIVE}, ValueError, "q_positions and kv_positions go together"),
    "kv_positions alone": ((Q, K, V), {"kv_positions": FIVE}, ValueError, "q_positions and kv_positions go together"),
    "positions that are floats": (
        (Q, K, V),
        {"q_positions": FIVE.float(), "kv_positions": FIVE},
        ValueError,
        "q_positions must be an int64.*torch.float32",
    ),
    "positions in a list": (
        (Q, K, V),
        {"q_positions": [0], "kv_positions": FIVE},
        ValueError,
        "q_positions must be.*not list",
    ),
    "too few positions": (
        (Q, K, V),
        {"q_positions": FIVE, "kv_positions": FIVE[:4]},
        ValueError,
        r"kv_positions is \(4,\).*\(2, 5\) or \(5,\)",
    ),
    "positions elsewhere": (
        (Q, K, V),
        {"q_positions": FIVE, "kv_positions": FIVE.to("meta")},
        ValueError,
        "kv_positions is on meta.*cpu",
    ),
    "a state for scores": (
        (Q, K, V),
        {"state": torch.zeros(2, 4, 8, 8)},
        ValueError,
        "state is for recurrent mechanisms.*Scores",
    ),
    "a state for all tokens at once": (
        (Q, K, V, "efficient_attention"),
        {"state": torch.zeros(2, 4, 8, 8)},
        ValueError,
        "state is for causal recurrences",
    ),
    "a state of another shape": (
        (Q, K, V, "lightning_attention_2"),
        {"state": torch.zeros(2, 4, 8, 7)},
        ValueError,
        r"\(2, 4, 8, 8\).*not \(2, 4, 8, 7\)",
    ),
    "a state that is none": (
        (Q, K, V, "lightning_attention_2"),
        {"state": 0},
        ValueError,
        r"state must be a tensor.*not int",
    ),
    "a state elsewhere": (
        (Q, K, V, "lightning_attention_2"),
        {"state": torch.zeros(2, 4, 8, 8, device="meta")},
        ValueError,
        "state is on meta",
    ),
    "lse and state": ((Q, K, V), {"return_lse": True, "return_state": True}, ValueError, "exclude each other"),
    "the state of scores": ((Q, K, V), {"return_state": True}, ValueError, "return_state is for recurrent.*Scores"),
    "the lse of a recurrence": (
        (Q, K, V, "lightning_attention_2"),
        {"return_lse": True},
        ValueError,
        "return_lse is for mechanisms with a softmax.*Recurrence",
    ),
    "the lse of a function": ((Q, K, V, "agent_attention"), {"return_lse": True}, ValueError, "return_lse.*Function"),
    "the lse of weights that nothing divides": (
        (Q, K, V, Scores(normaliser="none")),
        {"return_lse": True},
        ValueError,
        "return_lse is for weights exp.*'none' has no lse",
    ),
    "the lse of entmax": (
        (Q, K, V, "entmax_attention"),
        {"return_lse": True},
        ValueError,
        "return_lse is for weights exp.*'entmax' has no lse",
    ),
    "the lse of the k largest": (
        (Q, K, V, "explicit_sparse"),
        {"return_lse": True},
        ValueError,
        "return_lse is for weights exp.*'top_k' has no lse",
    ),
    "a recurrence with more queries than keys": (
        (*qkv(7, 5), "lightning_attention_2"),
        {},
        ValueError,
        "q_len 7 exceeds kv_len 5",
    ),
    "a selection with more queries than keys": ((*qkv(7, 5), "moba"), {}, ValueError, "q_len 7 exceeds kv_len 5"),
    "a recurrence out of order": (
        (Q, K, V, "lightning_attention_2"),
        {"q_positions": at(*[[1, 0, 2, 3, 4]] * 2), "kv_positions": at(*[[1, 0, 2, 3, 4]] * 2)},
        ValueError,
        "kv_positions in ascending order",
    ),
    "a recurrence asked about the middle": (
        (Q[:, :, :1], K, V, "lightning_attention_2"),
        {"q_positions": at([2], [4]), "kv_positions": FIVE},
        ValueError,
        "queries to be its last tokens",
    ),
    "a selection over an evicted cache": (
        (Q[:, :, :1], K, V, "moba"),
        {"q_positions": at([9], [9]), "kv_positions": at(*[[0, 6, 7, 8, 9]] * 2)},
        ValueError,
        "a Selection needs every key of a row",
    ),
    "a selection asked about the middle": (
        (Q[:, :, :1], K, V, "moba"),
        {"q_positions": at([2], [4]), "kv_positions": FIVE},
        ValueError,
        "a Selection needs a row's queries to be its last tokens",
    ),
    "groups that do not divide the heads": (
        (Q, K, V, "multi_token_attention"),
        {"c_h": 3, "kernel": torch.zeros(4, 6, 11), "mix": torch.zeros(4, 3)},
        ValueError,
        "c_h=3 heads, which do not divide 4",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_clear_sentence(case):
    tensors, given, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence) as raised:
        attention(*tensors, **given)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_form_may_be_given_in_place_of_a_name():
    form = manyheads.get("moba")(block_size=2, top_k=2)
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    assert attention(q, k, v, form).equal(attention(q, k, v, "moba", block_size=2, top_k=2))
    assert attention(q, k, v, form).equal(attention(q, k, v, manyheads.get("moba"), block_size=2, top_k=2))


def test_scale_multiplies_the_scores():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, scale=1.5), attention(3 * q, k, v, scale=0.5))
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, scale=0.5))
    o = attention(q, k, v, "lightning_attention_2", scale=2)
    torch.testing.assert_close(o, 2 * attention(q, k, v, "lightning_attention_2"))


def test_positions_may_be_given_once_for_all_rows():
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    for name in ("causal", "moba", "lightning_attention_2"):
        rows = FIVE.expand(2, -1)
        a = attention(q, k, v, name, q_positions=FIVE, kv_positions=FIVE)
        torch.testing.assert_close(a, attention(q, k, v, name, q_positions=rows, kv_positions=rows))
        torch.testing.assert_close(a, attention(q, k, v, name))


def test_explain_says_who_runs_it_and_why_others_do_not():
    assert str(explain(Q, K, V)).startswith("sdpa runs it\n  triton: Triton runs on CUDA")
    capped = explain(Q, K, V, "gemma2")
    assert capped.engine == "eager" and list(capped.objections) == ["triton", "sdpa", "flex"]
    first, _, second, third = str(capped).split("\n")
    assert first == "eager runs it"
    assert second == "  sdpa: scaled_dot_product_attention takes no score function"
    assert third.startswith("  flex: ")
    recurrent = explain(Q, K, V, "kimi_delta_attention", g=G, beta=BETA)
    assert recurrent.engine == "eager"
    assert recurrent.objections == {
        "triton": explain(Q, K, V).objections["triton"],
        "sdpa": "scaled_dot_product_attention has no Recurrence",
        "flex": "FlexAttention has no Recurrence",
    }
    assert explain(Q, K, V, return_lse=True).engine == "eager"
    assert "lse" in explain(Q, K, V, return_lse=True).objections["sdpa"]
    assert "'signed'" in explain(Q, K, V, "cog_attention").objections["sdpa"]


@pytest.mark.parametrize(("engine", "other"), [("eager", sdpa), ("sdpa", eager)])
@pytest.mark.parametrize("name", ["causal", "sliding_window", "moba"])
def test_a_named_engine_is_the_one_that_runs(engine, other, name, monkeypatch):
    def run(form, x):
        raise AssertionError("this engine was not asked for")

    monkeypatch.setattr(other, "run", run)
    attention(Q, K, V, name, engine=engine)
    with pytest.raises(AssertionError, match="not asked for"):
        attention(Q, K, V, name, engine=other.__name__.rpartition(".")[2])


@pytest.mark.parametrize("name", ["gemma2", "cog_attention", "lightning_attention_2", "agent_attention", "causal"])
def test_a_named_engine_never_falls_back(name):
    asked = {"return_lse": True} if name == "causal" else {}
    with pytest.raises(ValueError, match=r"no engine runs this: sdpa: .*engine='auto'"):
        attention(Q, K, V, name, engine="sdpa", **asked)


def test_a_selection_may_choose_nothing():
    """A query whose blocks are empty gives zero, as a query without keys does."""
    from manyheads.core import Blocks

    nothing = Selection(
        select=lambda q, k, *, scale, offset: Blocks.from_map(torch.zeros(2, 4, 3, 3, dtype=torch.bool)),
        scores=Scores(), query_block=2, key_block=2,
    )  # fmt: skip
    for engine in ("sdpa", "eager"):
        assert attention(Q + 1, K + 1, V + 1, nothing, engine=engine).eq(0).all()
    assert attention(Q, K, V, nothing, return_lse=True)[1].isneginf().all()


NUMBERS = [
    (name, setting)
    for name in manyheads.names()
    for setting, default in manyheads.get(name).settings.items()
    if isinstance(default, int | float) and not isinstance(default, bool)
]


@pytest.mark.parametrize(("name", "setting"), NUMBERS)
def test_settings_have_ranges(name, setting):
    low, high = manyheads.get(name).range(setting)
    whole = isinstance(manyheads.get(name).settings[setting], int)
    for value in [low - 1] + ([] if high == float("inf") else [high + 1]) + ([] if whole else [float("nan")]):
        with pytest.raises(ValueError, match=f"{setting} of {name} must be"):
            manyheads.get(name)(**{setting: int(value) if whole else value})
    try:
        manyheads.get(name)(**{setting: low})
    except ValueError as error:  # the range is right, and something else does not go with it, which the message names
        others = [other for other in manyheads.get(name).settings if other != setting]
        assert setting in str(error) and any(other in str(error) for other in others), error


SMALL = {  # rows of docs/benchmarks.md at which one of torch's kernels is the faster one, forward or backward
    ("causal", 1, 16, 512, 128), ("causal", 64, 16, 256, 64), ("causal", 1, 1, 4096, 128), ("full", 1, 8, 1000, 64),
}  # fmt: skip


@pytest.mark.parametrize("learning", [False, True])
def test_little_work_is_torchs_on_a_hopper_gpu(monkeypatch, learning):
    pytest.importorskip("triton.experimental.gluon")
    from manyheads.engines import triton
    from manyheads.engines.triton import hopper

    monkeypatch.setattr(triton, "_unable", lambda x: None)
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)

    def found(name, *shape):
        return explain(*[torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=learning)] * 3, name)

    for name, *shape in SMALL:
        small = found(name, *shape)
        assert small.engine == "sdpa" and "so little work, by docs/benchmarks.md" in small.objections["triton"]
        assert found(name, 4, 16, 4096, 128).engine == "triton"


# ---- calls once more ----


@pytest.fixture
def again(monkeypatch):
    """Calls on a CPU are remembered, too. Gives how often one was checked and chosen for."""
    chosen: list = []
    monkeypatch.setattr(dispatch, "_fast", lambda t: True)
    monkeypatch.setattr(dispatch, "_KNOWN", {})
    monkeypatch.setattr(dispatch, "_choose", lambda *a, real=dispatch._choose: (chosen.append(a), real(*a))[1])
    return chosen


def test_a_call_is_chosen_for_once(again):
    for _ in range(3):
        q, k, v = torch.randn(3, 2, 4, 9, 16)
        o = attention(q, k[:, :2], v[:, :2])
        assert torch.allclose(o, attention(q, k[:, :2], v[:, :2], engine="eager"), atol=1e-5)
    assert len([a for a in again if a[2] == "auto"]) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda q: attention(q, q, q, "full"),
        lambda q: attention(q, q, q, engine="eager"),
        lambda q: attention(q, q, q, scale=0.5),
        lambda q: attention(q, q, q, return_lse=True),
        lambda q: attention(q[:, :, :5], q, q),
        lambda q: attention(q.double(), q.double(), q.double()),
        lambda q: attention(q, q.clone(), q),
        lambda q: attention(q.requires_grad_(), q, q),
        lambda q: attention(q, q, q, dropout=0.5, seed=1),
        lambda q: attention(q, q, q, q_positions=torch.arange(9), kv_positions=torch.arange(9)),
    ],
)
def test_what_differs_is_chosen_for(again, other):
    q = torch.randn(1, 2, 9, 16)
    for _ in range(2):
        attention(q, q, q)
    assert len(again) == 1
    other(q)
    assert len(again) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's own, about sdpa
def test_who_watches_torch_sees_all(again):
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(1, 2, 9, 16)
    attention(q, q, q)
    with FlopCounterMode(display=False):
        attention(q, q, q)
    torch.vmap(lambda q: attention(q, q, q))(q[None])
    assert len(again) == 3
    with pytest.raises(ValueError, match="engine"):
        attention(q, q, q, engine="nvidia")


def test_no_more_calls_are_kept_than(again, monkeypatch):
    monkeypatch.setattr(alike, "CALLS", 3)
    for n in range(1, 7):
        attention(*torch.randn(3, 1, 2, n, 16))
    assert len(dispatch._KNOWN) == 3
