"""Studies calculate what counting by hand gives, and show what their papers found."""

import math
from itertools import combinations, product
from statistics import mean

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads import studies
from manyheads.core.study import table
from manyheads.studies.attention_buckets import attention_buckets
from manyheads.studies.decoding_intensity import attend, decoding_intensity, feed

RIDGE = 989.4e12 / 3.35e12  # of an H100


def rows(**settings):
    return {row["layer"].split(" (")[0].split(",")[0]: row for row in decoding_intensity(**settings)}


def counted(call):
    """What torch counts as operations of a call."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def size(*tensors):
    return sum(t.nbytes for t in tensors)


# ---- by hand ----


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_counting_by_hand(kv_heads):
    batch, kv_len, heads, head_dim, v_head_dim = 3, 10, 6, 8, 4
    q = torch.zeros(batch * kv_heads, heads // kv_heads, head_dim, dtype=torch.bfloat16)
    k, v = (torch.zeros(batch * kv_heads, kv_len, d, dtype=torch.bfloat16) for d in (head_dim, v_head_dim))
    operations, o = counted(lambda: (q @ k.mT).softmax(-1) @ v)
    cached = kv_heads * (head_dim + v_head_dim)
    assert attend(batch, kv_len, heads, head_dim, v_head_dim, cached, 2) == (operations, size(q, k, v, o))


def test_the_table_has_attention_with_its_heads_and_sizes():
    batch, kv_len, heads, head_dim, latent, rope = 2, 7, 4, 6, 10, 2
    got = rows(batch=batch, kv_len=kv_len, heads=heads, kv_heads=2, head_dim=head_dim, latent=latent, rope=rope)
    for name, kv_heads in (("MHA", 4), ("GQA", 2), ("MQA", 1)):
        q = torch.zeros(batch * kv_heads, heads // kv_heads, head_dim, dtype=torch.bfloat16)
        k, v = torch.zeros(2, batch * kv_heads, kv_len, head_dim, dtype=torch.bfloat16)
        operations, o = counted(lambda q=q, k=k, v=v: (q @ k.mT).softmax(-1) @ v)
        assert (got[name]["operations"], got[name]["bytes"]) == (operations, size(q, k, v, o))
    q = torch.zeros(batch, heads, latent + rope, dtype=torch.bfloat16)
    cache = torch.zeros(batch, kv_len, latent + rope, dtype=torch.bfloat16)
    operations, o = counted(lambda: (q @ cache.mT).softmax(-1) @ cache[..., :latent])
    assert (got["MLA"]["operations"], got["MLA"]["bytes"]) == (operations, size(q, cache, o))


def test_a_dense_layer_equals_counting_by_hand():
    tokens, dim, ff = 5, 6, 8
    x = torch.zeros(tokens, dim, dtype=torch.bfloat16)
    up, gate, down = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((dim, ff), (dim, ff), (ff, dim)))
    operations, y = counted(lambda: (torch.sigmoid(x @ gate) * (x @ up)) @ down)
    assert feed(tokens, dim, ff, 1, 1, 2) == (operations, size(x, up, gate, down, y))
    dense = rows(batch=tokens, dim=dim, ff=ff)["dense perceptron"]
    assert (dense["operations"], dense["bytes"]) == (operations, size(x, up, gate, down, y))


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 5, 2), (3, 4, 2), (2, 5, 3), (4, 3, 1), (2, 3, 3)])
def test_experts_equal_the_mean_over_all_choices(tokens, experts, top_k):
    dim, ff, each = 6, 8, 3 * 6 * 8
    choices = product(combinations(range(experts), top_k), repeat=tokens)
    read = mean(len(set().union(*chosen)) for chosen in choices)
    operations, moved = feed(tokens, dim, ff, experts, top_k, 2)
    assert operations == 2 * tokens * top_k * each
    assert moved == pytest.approx(2 * (read * each + 2 * tokens * top_k * dim), rel=1e-12)


# ---- the paper ----


def test_latent_attention_has_more_than_a_hundred_times_the_intensity():
    got = rows()
    assert got["MHA"]["intensity"] == pytest.approx(1, rel=1e-3)
    assert got["GQA"]["intensity"] == pytest.approx(128 / 16, rel=1e-2)
    assert got["MLA"]["intensity"] > 100 * got["MHA"]["intensity"]
    assert RIDGE / 2 < got["MLA"]["intensity"] < RIDGE, "close to being bound by arithmetic"
    assert got["MHA"]["bound by"] == "memory"
    longer = rows(kv_len=10**8)
    assert longer["MLA"]["intensity"] == pytest.approx(128 * (2 * 512 + 64) / (512 + 64), rel=1e-5)
    assert longer["MQA"]["intensity"] == pytest.approx(128, rel=1e-5)


def test_batching_over_chips_gives_experts_the_intensity_of_dense_layers():
    alone, shared = rows(chips=1), rows(chips=32)
    assert alone["experts"]["intensity"] < alone["dense perceptron"]["intensity"] / 20
    # They differ by the rows: experts are narrower, so each row has less arithmetic for its reading and writing.
    assert shared["experts"]["intensity"] == pytest.approx(shared["dense perceptron"]["intensity"], rel=0.05)
    assert shared["experts"]["microseconds"] < alone["experts"]["microseconds"] / 20


def test_experts_reach_the_ridge_with_ridge_times_experts_over_top_k_tokens():
    tokens = round(RIDGE * 256 / 8)
    operations, moved = feed(tokens, 7168, 10**9, 256, 8, 2)  # so wide that rows cost nothing
    assert operations / moved == pytest.approx(RIDGE, rel=1e-3)


# ---- laws ----


@pytest.mark.parametrize(
    ("setting", "values", "layer"),
    [
        ("kv_heads", (64, 16, 8, 1), "GQA"), ("kv_len", (1, 10, 100, 10**4), "MLA"),
        ("batch", (1, 4, 64, 512), "dense perceptron"), ("chips", (1, 2, 32, 320), "experts"),
        ("top_k", (1, 2, 8, 64), "experts"), ("width", (4, 2, 1), "MHA"), ("latent", (16, 64, 512, 2048), "MLA"),
    ],
)  # fmt: skip
def test_intensity_rises_with(setting, values, layer):
    found = [rows(**{setting: value})[layer]["intensity"] for value in values]
    assert found == sorted(found) and len(set(found)) == len(found)


def test_attention_gains_nothing_from_batches():
    assert len({rows(batch=batch)["MLA"]["intensity"] for batch in (1, 8, 512)}) == 1


def test_grouped_heads_lie_between_shared_and_own_ones():
    assert rows(kv_heads=1)["GQA"] | {"layer": ""} == rows()["MQA"] | {"layer": ""}
    assert rows(kv_heads=128)["GQA"] | {"layer": ""} == rows()["MHA"] | {"layer": ""}


def test_sizes_may_go_to_their_limits():
    everywhere = rows(top_k=256)["experts"]  # each expert sees each token, as a dense layer of its width does
    assert everywhere["intensity"] == pytest.approx(rows(batch=128 * 32, ff=2048)["dense perceptron"]["intensity"])
    # Without rotary numbers keys are values: MQA whose cache is half as large.
    bare, shared = rows(rope=0), rows(head_dim=512)
    assert bare["MLA"]["operations"] == shared["MQA"]["operations"]
    assert bare["MLA"]["bytes"] == shared["MQA"]["bytes"] - 2 * 128 * 4096 * 512


def test_time_follows_the_side_that_binds():
    slow, fast = rows(peak=1e12), rows(peak=1e18)
    for name, row in slow.items():
        memory = row["bytes"] / 3.35e12
        assert fast[name]["bound by"] == "memory" and fast[name]["microseconds"] == pytest.approx(1e6 * memory)
        bound = row["operations"] / 1e12 > memory
        assert row["bound by"] == ("arithmetic" if bound else "memory")
        assert row["microseconds"] == pytest.approx(1e6 * max(row["operations"] / 1e12, memory))
    assert slow["MLA"]["bound by"] == "arithmetic"
    assert rows(bandwidth=6.7e12)["MHA"]["microseconds"] == pytest.approx(rows()["MHA"]["microseconds"] / 2)


# ---- as a study ----


def test_studies_are_found_with_their_facts():
    found = studies.get("decoding_intensity")
    assert (found.system, found.arxiv, found.family) == ("mla-moe-bottleneck", "2507.15465", "heads")
    assert "decoding_intensity" in studies.names() and not found.required
    with pytest.raises(KeyError, match="Did you mean 'decoding_intensity'"):
        studies.get("decoding_intensities")


@pytest.mark.parametrize("name", studies.names())
def test_a_study_has_rows_with_the_same_columns(name):
    first, *others = studies.get(name)()
    assert first and all(list(row) == list(first) for row in others)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"kv_heads": 3}, ValueError, "must divide heads, 128, not 3"),
        ({"top_k": 300}, ValueError, "at most experts, 256, not 300"),
        ({"batch": 0}, ValueError, "1 or more"),
        ({"peak": 0.0}, ValueError, "1 or more"),
        ({"peek": 1.0}, TypeError, "Did you mean 'peak'"),
        ({"batch": 1.5}, TypeError, "int"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, text):
    with pytest.raises(error, match=text):
        decoding_intensity(**settings)


def test_the_command_prints_the_table(capsys):
    decoding_intensity.main(["--batch", "4", "--bandwidth", "1e12"])
    assert capsys.readouterr().out.rstrip("\n") == table(decoding_intensity(batch=4, bandwidth=1e12))
    with pytest.raises(SystemExit):
        decoding_intensity.main(["--batch", "0"])
    assert "batch of decoding_intensity must be 1 or more, not 0" in capsys.readouterr().err


def test_a_table_is_aligned():
    assert table([{"a": "long", "b": 1.0}, {"a": "x", "b": 12345.6}]) == "a     b\nlong  1\nx     1.235e+04"


# ---- attention buckets ----


def test_more_copies_leave_less_overlooked():
    for bases in ("published", "chosen"):
        table = attention_buckets(bases=bases)
        assert [row["copies"] for row in table] == [1, 2, 3, 4, 5, 6] and table[0]["base"] == 10000
        for name, sign in (("open troughs", -1), ("least score", 1)):
            values = [sign * row[name] for row in table]
            assert values == sorted(values) and values[-1] > values[0]


def test_overlooked_distances_equal_counting_by_hand():
    def score(m, base):
        return 2 * sum(math.cos(m * base ** (-2 * c / 16)) for c in range(8))

    near, distances = 5, range(200, 901)
    table = attention_buckets(copies=2, head_dim=16, first=200, last=900, near=near)
    curves = [[score(m, base) for m in distances] for base in (10000.0, 17500.0)]
    inner = range(50, len(distances) - 50)
    troughs = [m for m in inner if curves[0][m] == min(curves[0][m - 50 : m + 51])]
    peaks = [m for m in inner if curves[1][m] == max(curves[1][m - 50 : m + 51])]
    still = [m for m in troughs if all(abs(m - p) > near for p in peaks)]
    assert [row["open troughs"] for row in table] == [len(troughs), len(still)]
    assert 0 < len(still) < len(troughs)
    least = [min(curves[0]), min(map(max, *curves))]
    assert [row["least score"] for row in table] == pytest.approx(least)


def test_buckets_refuse_what_cannot_be():
    for given, message in (
        ({"copies": 7}, "published"), ({"first": 1000, "last": 1100}, "1101"), ({"bases": "best"}, "chosen"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention_buckets(**given)
