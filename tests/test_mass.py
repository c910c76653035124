"""What sparse mechanisms keep: pairs, mass, error and bounds against loops; runs that go on; the page."""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from experiments import mass, mass_lines, mass_page
from experiments.kept import (
    RANDOM_BLOCK,
    Dense,
    attend,
    density,
    error,
    kept,
    oracle,
    random_blocks,
    settled,
    why_not,
    worst,
)  # fmt: skip
from experiments.planted import PATTERNS, PLANTED, planted
from manyheads import attention, get
from manyheads.core import Scores
from manyheads.evaluate.looked import looked

ABLE = mass.able(2048)


def some(n=17, heads=4, kv_heads=2, dim=8):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, dim, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    return Dense(2 * q, k, v)


def row(dense, h, i):
    """A query's weights on the keys up to it, one by one."""
    g = h * dense.k.shape[1] // dense.q.shape[1]
    q_i, k = dense.q[0, h, i].tolist(), dense.k[0, g].tolist()
    s = [sum(x * y for x, y in zip(q_i, k_j, strict=True)) / len(q_i) ** 0.5 for k_j in k[: i + 1]]
    return [math.exp(x) / sum(map(math.exp, s)) for x in s]


def test_mass_error_and_oracle_equal_loops():
    dense = some()
    pairs = (torch.rand(1, 4, 17, 17) < 0.4).tril() | torch.eye(17, dtype=torch.bool)
    best, o = oracle(dense, pairs), torch.zeros_like(dense.q)
    masses, bounds = [], []
    for h in range(4):
        held, most = 0.0, 0.0
        for i in range(17):
            w = row(dense, h, i)
            mine = [j for j in range(i + 1) if pairs[0, h, i, j]]
            held += sum(w[j] for j in mine) / 17
            most += sum(sorted(w)[-len(mine) :]) / 17
            o[0, h, i] = sum(w[j] * dense.v[0, h // 2, j] for j in mine) / sum(w[j] for j in mine)
        masses.append(held)
        bounds.append(most)
    given, its = attend(dense, pairs)
    assert given == pytest.approx(masses, rel=1e-12)
    assert attend(dense, best)[0] == pytest.approx(bounds, rel=1e-12)
    assert torch.equal(best.sum(-1), pairs.sum(-1)) and not best.triu(1).any()
    torch.testing.assert_close(its, o, rtol=1e-12, atol=1e-12)
    wanted = ((o - dense.o) ** 2).sum().sqrt() / (dense.o**2).sum().sqrt()
    assert error(dense, o) == pytest.approx(wanted.item(), rel=1e-12)
    assert density(pairs) == pytest.approx(sum(map(int, pairs.flatten())) / (4 * 17 * 18 / 2))


@pytest.mark.parametrize("name", ABLE)
def test_pairs_are_what_a_mechanism_attends_to(name):
    for given in get(name).examples:
        form, dense = get(name)(**given), some()
        if given.get("causal", True):
            pairs = kept(settled(form, dense), dense)
            o = attention(dense.q, dense.k, dense.v, form)
            masses, its = attend(dense, pairs)
            torch.testing.assert_close(its, o, rtol=1e-10, atol=1e-10)
            assert not pairs.triu(1).any()
            seen = looked(form, dense.q, dense.k)
            assert seen is not None
            assert (seen.density, seen.mass) == pytest.approx((density(pairs), sum(masses) / 4), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in ABLE if get(name).laws])
def test_all_pairs_have_all_mass_and_no_error(name):
    laws = [law for law in get(name).laws if law.equals == "causal"]
    found = mass.measured(name, laws[0].settings, [some(), some(13)])
    for what in ("density", "mass", "worst", "oracle_density", "oracle_mass", "random_blocks_density"):
        assert found[what] == pytest.approx(1.0, rel=1e-12), what
    assert max(found["error"], found["oracle_error"], found["random_blocks_error"]) < 1e-12


def test_fewer_pairs_have_less_mass_than_the_oracle_and_more_error_than_none():
    found = mass.measured("sliding_window", {"window": 3, "sinks": 1}, [some()])
    assert found["density"] == pytest.approx((1 + 2 + 3 + 14 * 4) / 153) == found["oracle_density"]
    assert found["worst"] < found["mass"] < found["oracle_mass"] < 1 and found["error"] > found["oracle_error"] > 0.01


def test_the_worst_heads_are_the_lowest_tenth():
    assert worst([0.5, 0.1, 0.3]) == 0.1
    assert worst([n / 20 for n in range(20)]) == pytest.approx(0.025)


def test_random_blocks_are_causal_as_many_and_keep_each_query():
    dense = some(320)
    wanted = (torch.arange(320) > torch.arange(320)[:, None] - 80).tril().expand(1, 4, -1, -1)
    pairs = random_blocks(dense, wanted)
    assert not pairs.triu(1).any() and pairs.diagonal(dim1=-2, dim2=-1).all()
    assert abs(density(pairs) - density(wanted)) * 160 * 321 <= RANDOM_BLOCK**2 / 2, "whole blocks, the nearest number"
    assert not torch.equal(pairs[:, 0], pairs[:, 1])


def test_why_mechanisms_are_left_out():
    whys = {name: str(why_not(get(name), get(name)(**get(name).examples[0]))) for name in mass.names()}
    assert whys["landmark_attention"] == "needs training" and whys["full"] == "sees later keys"
    assert "Function" in whys["hyper_attention"] and "more than which" in whys["gemma2"]
    assert all(get(name).trained is False and get(name).causal for name in ABLE)
    capped = Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: s / 2)
    moba = get("moba")(block_size=4)
    assert why_not(get("moba"), moba) is None
    assert "more than which" in str(why_not(get("moba"), replace(moba, scores=capped)))


def test_knobs_are_settings_and_turn_mechanisms_from_few_pairs_to_many():
    assert set(mass.KNOBS) <= set(ABLE), "each is of a mechanism that is compared"
    torch.manual_seed(0)
    dense = Dense(*(torch.randn(1, 2, 256, 16) for _ in range(3)))
    for name in ABLE:
        for each in mass.settings(name, 256):
            get(name)(**each)
    shares = [density(kept(get("sliding_window")(**s), dense)) for s in mass.settings("sliding_window", 256)]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] > 0.5


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_planted_holds_the_mass(name):
    n, size = 512, 8
    weights = planted(name, n).weights[0]
    many = PLANTED * (size if name == "blocks" else 1)
    heavy = weights[:, n // 2 :].topk(many, dim=-1)
    # Names of keys are nearly orthogonal, so that the rest have scores around 0, far below SCORE.
    assert heavy.values.sum(-1).mean() > 0.8
    first = heavy.indices.sort(-1).values
    if name == "stripes":
        assert (first == first[:, :1]).all()
    if name == "blocks":
        assert (first // size == first[..., ::size].div(size, rounding_mode="floor").repeat_interleave(size, -1)).all()
    if name == "scattered":
        assert (heavy.indices[:, 1:, 0] != heavy.indices[:, :-1, 0]).float().mean() > 0.9
    if name == "diagonals":
        apart = torch.arange(n // 2, n)[:, None] - heavy.indices
        counts = [its.unique(return_counts=True)[1] for its in apart]
        assert all(count.topk(PLANTED).values.sum() > 0.9 * count.sum() for count in counts)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Rows of three mechanisms on two kinds of data, of which one stands in for a model's."""
    path = tmp_path_factory.mktemp("results") / "mass.jsonl"
    torch.manual_seed(0)
    layers = [Dense(*(2 * torch.randn(1, 3, 256, 16) for _ in range(3))) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass, "of_model", lambda tokens, layers_, device: layers)
        # A reader that is less surprised the more it sees: what a line of perplexities is made of is known.
        patch.setattr(mass, "perplexity", lambda name, given, tokens, device: 20 - given.get("window", 256) / 32)
        given = ["moba", "sliding_window", "causal", "--tokens", "256", "--results", str(path), "--data"]
        assert mass.main([*given, "stripes"]) == 0 == mass.main([*given, "model", "text", "stripes"])
    return path


def test_a_run_that_was_cut_off_goes_on(found, capsys):
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    jobs = sum(len(mass.settings(name, 256)) for name in ("moba", "sliding_window", "causal"))
    assert len(rows) == 3 * jobs == len({json.dumps([r["data"], r["mechanism"], r["settings"]]) for r in rows})
    assert mass.main(["moba", "--data", "stripes", "--tokens", "256", "--results", str(found)]) == 0
    assert f"0 rows measured, {len(mass.settings('moba', 256))} were there" in capsys.readouterr().out
    timed = [r for r in rows if "attend_ms" in r]
    assert {r["data"] for r in timed} == {"model"} and {r["mechanism"] for r in rows if "choose_ms" in r} == {"moba"}


def test_unknown_and_trained_mechanisms_are_refused(capsys):
    with pytest.raises(SystemExit):
        mass.main(["landmark_attention"])
    assert "landmark_attention" in capsys.readouterr().err


def test_mass_at_a_density_is_interpolated():
    line = [(0.1, 0.5), (0.4, 0.7)]
    assert mass_lines.at(line, 0.2) == pytest.approx(0.6)
    assert mass_lines.at(line, 0.1) == 0.5 and mass_lines.at(line, 0.9) == 0.7 and mass_lines.at(line, 0.09) is None


def test_a_page_is_made_of_rows(found, monkeypatch):
    monkeypatch.setattr(mass_lines, "RESULTS", found.parent)
    rows = mass_lines.rows()
    text = mass_page.page(rows, "lines.svg")
    assert "![Mass against density](lines.svg)" in text and "`landmark_attention`: needs training." in text
    assert "`flexprefill`: not measured yet." in text and "| `moba` |" in text and "`moba`: not measured" not in text
    equal, read, patterns, every = (re.findall(r"^\| `(\w+)", part, re.M) for part in text.split("\n## ")[1:5])
    assert sorted(equal) == ["moba", "sliding_window"] == sorted(patterns) == sorted(read)
    assert len(every) == len(rows) / 3
    assert "Dense attention: 12.00." in text
    one = next(r for r in rows if r["mechanism"] == "sliding_window" and r["data"] == "model")
    cells = (
        rf"\| `sliding_window\(window={one['settings']['window']}\)` \| {one['density']:.3f} \| {one['mass']:.3f} \|"
        rf".* \| {20 - one['settings']['window'] / 32:.2f} \| –"
    )
    assert re.search(cells, text)
    line = mass_lines.losses(rows)["sliding_window"]
    assert [loss for _, loss in line] == [20 - each["window"] / 32 for each in mass.settings("sliding_window", 256)]
    rows[0]["settings"] = {"window": 77}
    found.with_name("mass.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(mass_lines.rows()) == len(rows) - 1, "settings that nobody asks for any more are left out"


def test_a_model_reads_with_a_mechanism_in_it():
    """All pairs: the model's own loss. Few: more."""
    model, ids = mass.reader(300, "cpu")
    with torch.no_grad():
        own = model(ids, labels=ids).loss.exp().item()
        # float32; all positions at once there, PART of them at a time here
        assert mass.perplexity("causal", {}, 300, "cpu") == pytest.approx(own, rel=1e-4)
        assert mass.perplexity("sliding_window", {"window": 8}, 300, "cpu") > 1.2 * own


def test_the_picture_has_a_line_for_each_mechanism(found):
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    lines = ElementTree.fromstring(mass_lines.picture(rows)).findall("{http://www.w3.org/2000/svg}polyline")
    assert {line[0].text for line in lines} == {"oracle", "moba", "sliding_window", "random"}


def test_without_results_the_page_says_so():
    assert mass_page.NOTHING in mass_page.page([]) and "<polyline" not in mass_lines.picture([])


def test_mass_is_that_of_causal_attention_for_later_keys_and_later_queries_too():
    dense = some(40)
    ahead = Scores(mask=lambda b, h, i, j: (j > i) | (j == 0))
    seen = looked(ahead, dense.q[:, :, 30:], dense.k)
    assert seen is not None and seen.mass == pytest.approx(dense.weights[:, :, 30:, 0].mean().item(), rel=1e-12)
