"""Experiments run, go on where they were cut off, survive a failing job, and become a page."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import torch

pytest.importorskip("pydoc_data.topics", reason="the text to train on")

from experiments import core, jobs, page, run, tiny_lm, toys
from experiments.core import Claim, Experiment, above, below, lower
from experiments.toys import (
    filtering,
    find_block,
    match_three,
    needle,
    rank,
    recall,
    relations,
    relay,
    supporting_facts,
)
from experiments.toys.common import squares


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_has_the_experiment_of_its_name():
    files = {path.stem for path in Path(toys.__file__).parent.glob("*.py")} - {"__init__", "common"}
    assert set(run.experiments()) == {"tiny_lm", *files}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rank, with one seed, in two workers."""
    path = tmp_path_factory.mktemp("results") / "rows.jsonl"
    assert run.main(["rank", "--quick", "--seeds", "1", "--results", str(path)]) == 0
    return path


def test_each_variant_gets_a_row(quick):
    rows = rows_of(quick)
    assert sorted(row["variant"] for row in rows) == sorted(rank.EXPERIMENT.variants)
    assert all(row["kl"] > 0 and row["steps"] == run.QUICK and row["device"].startswith("CPU") for row in rows)


def test_a_run_that_was_cut_off_goes_on(quick, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    first, second, *_ = quick.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps({**json.loads(second), "error": "lost"}) + "\n")
    assert run.main(["rank", "--quick", "--seeds", "1", "--results", str(path), "--workers", "1"]) == 0
    assert "4 jobs run, 0 failed, 1 had results, 0 not started" in capsys.readouterr().out
    assert run.done(path, run.QUICK) == set(run.jobs([run.experiments()["rank"]], 1))
    assert not run.done(path, None), "a quick run is no result of the experiment"


def test_nothing_starts_beyond_the_limit(tmp_path, capsys):
    assert run.main(["rank", "--quick", "--limit", "0.0001", "--results", str(tmp_path / "rows.jsonl")]) == 0
    assert "0 jobs run, 0 failed, 0 had results, 15 not started" in capsys.readouterr().out


def test_a_job_that_fails_is_a_row():
    bad, good = jobs.Job("rank", "no number", 0), jobs.Job("rank", "2", 0)
    failed, worked = jobs.rows([bad, good], 1, "cpu", 3, None)
    assert failed["error"].startswith("ValueError") and "no number" in failed["traceback"]
    assert failed["variant"] == "no number" and "error" not in worked


def die(pipe, device, steps):
    pipe.recv()
    raise SystemExit(3)


def test_a_worker_that_dies_is_a_row_and_is_replaced(monkeypatch):
    monkeypatch.setattr(jobs, "serve", die)
    rows = list(jobs.rows([jobs.Job("rank", "2", seed) for seed in range(2)], 1, "cpu", 3, None))
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["error"] == "the worker died with exit code 3" for row in rows)


def test_seeds_of_a_variant_do_not_come_last():
    order = run.jobs(list(run.experiments().values()), 3)
    assert [job.seed for job in order] == sorted(job.seed for job in order)
    assert len({job.experiment for job in order[: len(run.experiments())]}) == len(run.experiments())
    assert len(set(order)) == len(order)


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["rnak"])
    assert "rnak" in capsys.readouterr().err


@pytest.mark.parametrize("name", tiny_lm.variants())
def test_language_models_are_causal_and_of_one_size(name):
    torch.manual_seed(0)
    variant = tiny_lm.variants()[name]
    model = tiny_lm.TinyLM(variant).eval()
    tokens = torch.randint(256, (1, 40))
    other = tokens.clone()
    other[:, 30:] = torch.randint(256, (1, 10))
    with torch.no_grad():
        before, after = (tiny_lm.predict(model, text, variant.prefixes)[:, :30] for text in (tokens, other))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)  # other kernels, other roundings; a leak is 0.1
    if variant.ff is None:
        assert core.count(model) == pytest.approx(core.count(tiny_lm.TinyLM(tiny_lm.of("causal"))), rel=0.025)


def test_a_language_model_learns_and_data_come_in_the_same_order():
    first, again = (tiny_lm.run("mixture_of_attention_heads 4 of 4", 0, "cpu", 8) for _ in range(2))
    assert first["loss"] == again["loss"] < 5.6  # log 256 is 5.55, and it starts near 5.75
    train, validation, _ = tiny_lm.text()
    assert len(train) + len(validation) > 900_000 and 0.08 < len(validation) / len(train) < 0.13


@pytest.mark.parametrize("experiment", run.experiments().values(), ids=lambda e: e.name)
def test_claims_name_variants_and_metrics_that_exist(experiment):
    class Row(dict):
        def __missing__(self, key):
            assert key == experiment.metric
            return 0.95

    for claim in experiment.claims:
        claim.verdict({variant: {0: Row()} for variant in experiment.variants})


def test_tasks_have_right_answers():
    torch.manual_seed(0)
    tokens, wanted = supporting_facts.facts(50)
    start, end, asked = tokens.split((10, 10, 1), 1)
    for row in range(50):
        step = dict(zip(start[row].tolist(), end[row].tolist(), strict=True))
        assert step[step[asked[row].item()]] == wanted[row] != asked[row]
    tokens, block = find_block.blocks(50)
    for text, answer in zip(tokens, block, strict=True):
        parts = text[:60].view(10, 6)[:, :5]
        assert any(torch.equal(part, answer) for part in parts) and set(text[61:63].tolist()) <= set(answer.tolist())
    x, y = match_three.threes(500)
    angle = torch.atan2(x[..., 16], x[..., 0])
    sums = angle[:, :, None, None] + angle[:, None, :, None] + angle[:, None, None]
    assert torch.equal(y.bool(), (sums.cos() > 0.999).flatten(2).any(-1))
    assert y.float().mean() == pytest.approx(0.68, abs=0.04)
    tokens, wanted = recall.pairs(20)
    for text, answer in zip(tokens.tolist(), wanted.tolist(), strict=True):
        table = dict(zip(text[:16:2], text[1:16:2], strict=True))
        assert [table[key] - 16 for key in text[48::2]] == answer


def test_facts_are_out_of_reach_and_have_right_answers():
    torch.manual_seed(0)
    (tokens, asked), wanted = needle.texts(20)
    for text, places, answers in zip(tokens.tolist(), asked.tolist(), wanted.tolist(), strict=True):
        facts = [i for i, (_, value) in enumerate(text) if value < needle.NOTHING]
        table = dict(text[i] for i in facts)
        assert len(table) == 8 and [table[text[place][0]] for place in places] == answers
        assert [i for i, (word, _) in enumerate(text) if word == needle.LANDMARK] == [*range(15, 256, 16)]
        assert min(places[8:]) - max(facts) > 2 * (needle.KEYS - 1), "two layers of windows would see them"
    tokens, wanted = relay.far(20)
    for text, answers in zip(tokens.tolist(), wanted.tolist(), strict=True):
        (at,) = [i for i, (_, value) in enumerate(text) if value < relay.NOTHING]
        assert answers == [relay.IGNORED] * (at + 1) + [text[at][1]] * (255 - at)
        assert relay.BLOCK <= at < 255 - relay.LAYERS * (8 * relay.BLOCK - 1)


def test_the_kalman_filter_is_the_best_linear_filter():
    torch.manual_seed(0)
    seen, true = filtering.system(4000)
    best = squares(filtering.Kalman()(seen), true).mean()
    past = seen[:, :20].flatten(1)
    fitted = past @ torch.linalg.lstsq(past, true[:, 19]).solution
    regression = squares(fitted, true[:, 19]).mean()
    assert squares(filtering.Kalman()(seen), true)[:, 19].mean() == pytest.approx(regression.item(), rel=0.05)
    assert best < squares(seen, true).mean() / 3


NUMBERS = {"new": {0: {"loss": 1.0}, 1: {"loss": 1.2}}, "old": {0: {"loss": 1.5}, 1: {"loss": 1.1}}}


@pytest.mark.parametrize(
    ("test", "right"),
    [
        (below("new", "loss", 1.11), True), (below("new", "loss", 1.09), False),
        (above("new", "loss", 1.09), True), (above("new", "loss", 1.11), False),
        (lower("new", "old", "loss"), True), (lower("old", "new", "loss"), False),
        (lower("new", "old", "loss", factor=0.8), False), (lower("old", "new", "loss", factor=1.1, plus=0.1), True),
        (tiny_lm.beats("new", "old")[0], False), (tiny_lm.beats("new", "new")[0], False),
    ],
)  # fmt: skip
def test_tests_of_claims_decide(test, right):
    assert test(NUMBERS)[0] is right


def test_half_the_samples_are_counted():
    def verdict(dual, causal):
        numbers = {f"dual_attention {n}": {0: {"accuracy": 1.0 if n >= dual else 0.6}} for n in relations.SAMPLES}
        numbers |= {f"causal {n}": {0: {"accuracy": 1.0 if n >= causal else 0.6}} for n in relations.SAMPLES}
        return relations.half_the_samples(numbers)[0]

    assert verdict(500, 1000) and verdict(4000, 9999)
    assert not verdict(1000, 1000) and not verdict(9999, 9999)


@pytest.fixture
def small(monkeypatch):
    """One experiment whose claim holds, does not, or is not decided."""
    claims = (
        Claim("new", "small", (below("new", "loss", 1.11),)),
        Claim("new", "tiny", (below("new", "loss", 0.1),)),
        Claim("new", "better than lost", (lower("new", "lost", "loss"),)),
    )
    one = Experiment("tiny_lm", "About.", "loss", "low", ("old", "new", "lost"), "old", lambda *_: {}, 7, claims)
    monkeypatch.setattr(page, "experiments", lambda: {"tiny_lm": one})
    about = {"experiment": "tiny_lm", "steps": 7, "device": "A chip", "torch": "2", "parameters": 1000}
    rows = [
        {**about, "variant": v, "seed": s, "seconds_per_step": 0.002, **found}
        for v, seeds in NUMBERS.items()
        for s, found in seeds.items()
    ]
    return [*rows, {**about, "variant": "lost", "seed": 0, "error": "It broke."}]


def test_a_page_is_made_of_rows(small):
    text = page.page([*small, {**small[0], "steps": 3, "loss": 99.0}])
    table = re.findall(r"^\| (new|old) \| (.+?) \| (.+?) \| 1,000 \| 2 \| 2 \|$", text, re.M)
    assert table == [("new", "1.1 ± 0.14", "-0.2 ± 0.42"), ("old", "1.3 ± 0.28", "–")], "sorted, the best first"
    assert mean([1.0 - 1.5, 1.2 - 1.1]) == pytest.approx(-0.2)
    verdicts = re.findall(r"^\| `new` \| (.+?) \| (.+?) \|", text, re.M)
    assert verdicts == [("small", "**holds**"), ("tiny", "does not hold"), ("better than lost", "not decided")]
    assert "A chip (torch 2)" in text and "lost, failed: It broke." in text and "No result: lost." in text
    assert page.COMMAND in text and "99" not in text


def test_the_picture_shows_each_variant(small):
    import xml.etree.ElementTree as ElementTree

    marks = ElementTree.fromstring(page.picture(small)).findall("{http://www.w3.org/2000/svg}circle")
    assert sorted(mark[0].text for mark in marks) == ["1.1000", "1.3000"]
    assert float(marks[0].get("cy")) > float(marks[1].get("cy")), "the lower loss is lower"


def test_without_results_the_page_says_so(tmp_path):
    assert page.rows(tmp_path) == []
    text = page.page([])
    assert page.NOTHING in text and "holds**" not in text
    assert "<circle" not in page.picture([])
