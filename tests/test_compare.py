"""The comparison on the real model: small, resumed, refused."""

import json
import os

import pytest

from manyheads import get
from manyheads.core import Function
from manyheads.evaluate import compare
from manyheads.evaluate.answer import answer, gain, winner
from manyheads.evaluate.specs import Spec, defaults, parse, parse_list
from manyheads.mechanisms import names

SMALL = {"mechanisms": "sliding_window(window=64,sinks=4),snapkv(budget=64),lightning_attention_2", "context": 256}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    steps = []
    return compare.run(out=out, repeats=2, watch=steps.append, **SMALL), out, steps


def test_measures_every_row(done):
    results, out, steps = done
    assert json.loads((out / "compare.json").read_text()) == results
    assert [row["name"] for row in results["rows"]] == ["dense", "sliding_window", "snapkv"]
    assert [row["name"] for row in results["untrained"]] == ["lightning_attention_2"]
    assert results["complete"] and steps[-1].done == steps[-1].total
    dense, window, snapkv = results["rows"]
    for row in results["rows"]:
        assert len(row["speed"]["prefill_s"]["runs"]) == len(row["speed"]["decode_tokens_per_s"]["runs"]) == 2
        assert 1 < row["quality"]["perplexity"] < 1000
        assert len(row["quality"]["needle"]) == 8
    assert dense["quality"]["kl"] < 1e-6 and dense["quality"]["perplexity_ratio"] == 1
    assert dense["density"] == pytest.approx(1) and dense["mass"] == pytest.approx(1)
    # 64 of 256 keys and four sinks: a fifth to a half of the causal pairs.
    assert 0.2 < window["density"] < 0.5 and window["density"] < window["mass"] < 1
    assert window["quality"]["kl"] > 1e-3 and window["label"] == "masked"
    assert window["memory"]["cache_bytes"] == dense["memory"]["cache_bytes"]
    # A quarter of the keys, and the positions that say where they stood.
    assert snapkv["label"] == "freed"
    assert 0.25 < snapkv["memory"]["cache_bytes"] / dense["memory"]["cache_bytes"] < 0.3
    state = results["untrained"][0]
    assert state["label"] == "freed" and state["layer_ms"]["median"] > 0 and "quality" not in state


def test_perplexity_is_the_models_own(done):
    """The dense row against the model's own loss on the same tokens."""
    import torch

    from manyheads.evaluate import models, texts

    results, _, _ = done
    loaded = models.load()
    ids = compare._tokens(loaded, texts.read(None).content)[: 256 + compare.REST]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    # float32, read whole here and in pieces there.
    assert results["rows"][0]["quality"]["perplexity"] == pytest.approx(float(losses[255:].mean().exp()), rel=1e-4)


def test_goes_on_from_what_is_finished(done, monkeypatch):
    results, out, _ = done
    again = compare.run(out=out, repeats=2, **SMALL)
    assert again["rows"] == results["rows"], "nothing is measured twice"

    def stop(progress):
        if progress.row.startswith("causal"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.run(out=out, repeats=2, mechanisms="causal,full", context=256, watch=stop)
    kept = json.loads((out / "compare.json").read_text())
    assert [row["spec"] for row in kept["rows"]] == [row["spec"] for row in results["rows"]]
    assert not [f for f in os.listdir(out) if f.startswith(".")], "nothing half-written is left"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"context": 100}, "256 tokens or more, not 100"),
        ({"context": 9000}, "8192 positions"),
        ({"mechanisms": "mobba"}, "Did you mean 'moba'"),
        ({"mechanisms": "moba(block=3)"}, "setting of moba"),
        ({"mechanisms": "moba(block_size=x)"}, "not a plain number"),
        ({"mechanisms": "moba("}, "cannot be read"),
        ({"mechanisms": " , "}, "names nothing"),
        ({"mechanisms": "snapkv(budget=0)"}, "budget"),
        ({"mechanisms": "snapkv(budget=1.5)"}, "budget"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"text": ["/nowhere/at/all.txt"]}, "/nowhere/at/all.txt"),
        ({"out": __file__}, "is a file"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(given, says, tmp_path):
    with pytest.raises(ValueError, match=r".") as caught:
        compare.run(**{"out": tmp_path / "out", **given})
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "compare.json").exists()


def test_a_text_that_is_too_short(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 40)
    with pytest.raises(ValueError, match="needs 512 or more"):
        compare.run([str(short)], out=tmp_path / "out")


def test_a_full_disk_leaves_the_old_results(done, monkeypatch):
    _, out, _ = done
    before = (out / "compare.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manyheads.evaluate.files.os.replace", full)
    with pytest.raises(OSError, match="nothing was changed"):
        compare.run(out=out, repeats=2, **SMALL)
    assert (out / "compare.json").read_bytes() == before
    assert not [f for f in os.listdir(out) if f.startswith(".")]


def test_specs():
    assert parse("moba(block_size=64, top_k=4)") == Spec("moba", "mechanism", {"block_size": 64, "top_k": 4})
    assert [str(s) for s in parse_list("dense, moba(block_size=64,top_k=4),snapkv(budget=0.25)")] == [
        "dense",
        "moba(block_size=64, top_k=4)",
        "snapkv(budget=0.25)",
    ]
    listed = {s.name for s in defaults(2048)}
    missing = set(names()) - listed - {"causal"}
    for name in missing:  # what cannot stand in for causal attention in a minute, or needs what a model has not
        found = get(name)
        assert not found.causal or isinstance(found(), Function) or (found().operands and not found.trained), name


def row(spec, ratio, needle, size, prefill, decode, label="freed"):
    def spread(low, high):
        return {"median": (low + high) / 2, "min": low, "max": high}

    return {
        "spec": spec,
        "label": label,
        "quality": {"perplexity_ratio": ratio, "needle_accuracy": needle, "needle": [{}] * 8},
        "memory": {"cache_bytes": size},
        "speed": {"prefill_s": spread(*prefill), "decode_tokens_per_s": spread(*decode)},
    }


def test_the_answer_claims_only_what_is_beyond_the_spread():
    dense = row("dense", 1.0, 1.0, 100e6, (1.0, 1.1), (20, 22), "dense")
    small = row("snapkv(budget=512)", 1.02, 0.875, 25e6, (1.0, 1.1), (21, 23))
    lost = row("sink_window(budget=512)", 1.02, 0.25, 20e6, (0.5, 0.6), (40, 44))
    masked = row("moba", 1.01, 1.0, 100e6, (0.9, 1.05), (20, 22), "masked")
    assert gain(small, dense, "decode_tokens_per_s") is None and gain(lost, dense, "prefill_s") > 1.8
    assert winner([dense, small, lost, masked]) is small
    assert winner([dense, lost, masked]) is None
    results = {
        "rows": [dense, small, lost, masked],
        "model": {"name": "m"},
        "context": 2048,
        "machine": {"device": "cpu", "threads": 2},
    }
    text = answer(results)
    assert "snapkv(budget=512)" in text and "25.0 MB instead of 100.0" in text and "times as fast" not in text
    assert results["winner"] == "snapkv(budget=512)"
    results["rows"] = [dense, lost, masked]
    assert answer(results).startswith("Stay with dense") and results["winner"] is None
