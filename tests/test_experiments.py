"""Experiments run, go on where they were cut off, survive a failing job, and become a page."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import torch

pytest.importorskip("pydoc_data.topics", reason="the text to train on")

from experiments import conversion, core, curves, hybrid_lm, hybrids, jobs, linear_lm, page, run, tiny_lm, toys
from experiments.core import Claim, Experiment, above, below, lower
from experiments.toys import (
    copying,
    filtering,
    find_block,
    list_ops,
    long_flag,
    long_lag,
    match_three,
    mqar,
    needle,
    palindrome,
    permutations,
    rank,
    recall,
    relations,
    relay,
    stacks,
    state_tracking,
    supporting_facts,
)
from experiments.toys.common import IGNORED, answered, squares, width
from manyheads import attention, get, layers, names


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_has_the_experiment_of_its_name():
    files = {path.stem for path in Path(toys.__file__).parent.glob("*.py")} - {"__init__", "common"}
    assert set(run.experiments()) == {"tiny_lm", "linear_lm", "hybrid_lm", "conversion", *files}


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


LANGUAGE_MODELS = {
    **tiny_lm.variants(),
    **linear_lm.VARIANTS,
    **{f"4 blocks, {n}": v for n, v in hybrid_lm.VARIANTS.items()},
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_are_causal_and_of_one_size(name):
    torch.manual_seed(0)
    variant = LANGUAGE_MODELS[name]
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
            assert key in (experiment.metric, *experiment.also)
            return 0.95

    for claim in experiment.claims:
        claim.verdict({variant: {0: Row()} for variant in experiment.variants})


def test_all_that_is_linear_and_causal_is_a_language_model():
    published = [*map(get, names()), *map(layers.get, layers.names())]
    causal = {one.name for one in published if one.family == "linear" and (one.causal or "causal" in one.settings)}
    assert causal - {"l2vit"} <= {variant.name for variant in linear_lm.VARIANTS.values()}


def test_curves_are_means_of_spans():
    row = tiny_lm.trained(linear_lm.VARIANTS["fastmax p=1, 8 heads"], 0, "cpu", tiny_lm.SPAN // 10)
    ((steps, loss),) = row["curve"]
    assert steps == tiny_lm.SPAN and 4 < loss < 7


def test_recurrences_are_normed_fade_slowly_and_run_in_kernels():
    delta, slots, softmax = (
        core.build("kimi_delta_attention", 32, 2, fade=-4.0), core.build("fastmax", 32, 2), core.build("causal", 32, 2)
    )  # fmt: skip
    assert isinstance(delta.norm, torch.nn.RMSNorm)
    assert all(isinstance(one.norm, torch.nn.Identity) for one in (slots, softmax))
    g = delta.operands["g"](torch.zeros(1, 1, 32))
    assert torch.allclose(g, torch.tensor(-4.0).exp().log1p().neg().expand_as(g))
    x = torch.randn(1, 5, 32)
    plain = delta.attend(x)
    normed = plain / (plain.square().mean(-1, keepdim=True) + torch.finfo(plain.dtype).eps).sqrt()
    torch.testing.assert_close(delta(x), delta.o(normed.transpose(1, 2).flatten(2)))
    core.to_kernels(torch.nn.Sequential(delta, slots, softmax))
    assert [one.engine for one in (delta, slots, softmax)] == ["triton", "auto", "auto"]


def test_perceptrons_make_up_for_what_mixers_have():
    stacked = [[make(), make()] for make in mqar.VARIANTS.values()]
    stacked += [copying.mixers_of(variant) for variant in copying.VARIANTS]
    stacked += [palindrome.mixers_of(variant) for variant in palindrome.EXPERIMENT.variants]
    for mixers in stacked:
        whole = core.count(mixers) + 2 * 2 * 64 * width(mixers, 64)
        assert whole == pytest.approx(2 * 12 * 64 * 64, rel=0.01)


def test_states_of_compared_memories_are_of_one_size():
    recurrences = {name: mqar.VARIANTS[name]() for name in ("gated linear attention", "kimi_delta_attention")}
    assert all(one.heads * one.head_dim**2 == 2 * 32 * 32 for one in recurrences.values())
    slots = mqar.VARIANTS["gated_slot_attention"]()
    (_, _, many) = (slots.heads, slots.head_dim, slots.form.operands["g"].shape({**dict(batch=1, heads=2, len=1)})[-1])
    assert slots.heads * many * 2 * slots.head_dim == 2 * 32 * 32
    for name in ("titans, linear memory", "titans, memory of two layers"):
        assert sum(w.numel() for w in mqar.VARIANTS[name]().memory.weights) == 64 * 64


def test_questions_of_many_facts_have_right_answers():
    torch.manual_seed(0)
    tokens, wanted = mqar.texts(10)
    for text, answers in zip(tokens.tolist(), wanted.tolist(), strict=True):
        table = {word: value for word, value in text[: mqar.LENGTH // 2] if value != mqar.NOTHING}
        asked = [i for i, answer in enumerate(answers) if answer != IGNORED]
        assert len(table) == len(asked) == mqar.FACTS and min(asked) >= mqar.LENGTH // 2
        assert all(text[i] == [word, mqar.NOTHING] and table[word] == answers[i] for i in asked for word in text[i][:1])
    logits = torch.nn.functional.one_hot(wanted.clamp(min=0), mqar.NOTHING).float()
    assert answered(logits, wanted).all() and len(answered(logits, wanted)) == 10 * mqar.FACTS


def test_words_are_multiplied_out():
    torch.manual_seed(0)
    products = state_tracking.table(3)
    one = products[:, 0].tolist().index(0)  # the identity leaves the first element what it is
    assert products[one].tolist() == products[:, one].tolist() == list(range(6))
    assert not products.equal(products.T) and all(sorted(row) == list(range(6)) for row in products.tolist())
    tokens, found = state_tracking.words(products, 5, 9)
    for word, prefixes in zip(tokens.tolist(), found.tolist(), strict=True):
        at = one
        assert word[0] == 6
        for element, prefix in zip(word[1:], prefixes, strict=True):
            at = products[at, element]
            assert at == prefix
    parity, (tokens, found) = state_tracking.table(2), state_tracking.words(state_tracking.table(2), 5, 9)
    assert parity.tolist() == [[0, 1], [1, 0]] and (tokens[:, 1:].cumsum(1) % 2).equal(found)


def test_permutations_are_multiplied_out_place_by_place():
    torch.manual_seed(0)
    tokens, found = permutations.products(3, 7)
    for word, prefixes in zip(tokens.tolist(), found.tolist(), strict=True):
        at = list(range(5))
        assert word[0] == 120
        for element, prefix in zip(word[1:], prefixes, strict=True):
            at = [at[i] for i in permutations.ALL[element].tolist()]
            assert at == prefix


def test_models_of_permutations_are_of_one_size_and_say_each_place():
    tokens, found = permutations.products(2, 3)
    for variant in permutations.EXPERIMENT.variants:
        model = permutations.Model(permutations.block(variant))
        assert core.count(model.model[1]) == pytest.approx(12 * 128 * 128, rel=0.01)
        other = tokens.clone()
        other[:, -1] = (tokens[:, -1] + 1) % 120
        assert model(tokens).shape == (*found.shape, 5)
        assert (model(tokens) - model(other)).abs().amax((0, 2, 3)).gt(1e-4).tolist() == [False, False, True], "its own"


def test_palindromes_read_the_same_backwards():
    torch.manual_seed(0)
    tokens, wanted = palindrome.palindromes(3)
    for text, answers in zip(tokens.tolist(), wanted.tolist(), strict=True):
        letters, mark, said = text[: palindrome.TEXT], text[palindrome.TEXT], text[palindrome.TEXT + 1 :]
        asked = [answer for answer in answers if answer != IGNORED]
        assert mark == palindrome.LETTERS and len(set(letters)) == palindrome.TEXT
        assert asked == letters[::-1] == answers[palindrome.TEXT :] and said == asked[:-1]


def test_stacks_give_back_what_was_put_on_last():
    torch.manual_seed(0)
    tokens, wanted = stacks.stacks(5)
    off = 0
    for text, answers in zip(tokens.tolist(), wanted.tolist(), strict=True):
        held = [[] for _ in range(stacks.STACKS)]
        for (at, value), answer in zip(text, answers, strict=True):
            if value == stacks.VALUES:
                assert answer == held[at].pop()
                off += 1
            else:
                assert answer == IGNORED
                held[at].append(value)
    assert 0.25 < off / wanted.numel() < 0.5, "half of the tokens, but for stacks with nothing on them"


def test_side_by_side_a_window_and_a_state_are_added_each_with_its_gate():
    torch.manual_seed(0)
    both, x = core.build(hybrids.side_by_side(3), 8, 2, rope_theta=None), torch.randn(1, 7, 8)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (both.q(x), both.k(x), both.v(x)))
    for name in ("near", "far"):  # which start alike
        torch.nn.init.normal_(both.operands[name].weight.weight)
    given = {name: source(x) for name, source in both.operands.items()}
    near = attention(q, k, v, "sliding_window", window=3, sinks=0)
    far = attention(q, k, v, "kimi_delta_attention", g=given["g"], beta=given["beta"]) * 4**0.5
    o = given["near"][..., None] * near + given["far"][..., None] * far
    torch.testing.assert_close(both(x), both.o(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("causal", {}, 2 * 100 * 8), ("sliding_window", {"window": 10, "sinks": 2}, 2 * (9 + 2) * 8),
        ("kimi_delta_attention", {}, 2 * 4 * 4), (hybrids.side_by_side(10), {}, 2 * 9 * 8 + 2 * 4 * 4),
        ("full", {}, 2 * 100 * 8),
    ],
)  # fmt: skip
def test_what_is_kept_of_a_text(name, settings, wanted):
    assert hybrids.kept(core.build(name, 8, 2, **settings), 100) == wanted


def test_three_to_one_keeps_a_quarter():
    def kept(variant):
        return sum(hybrids.kept(tiny_lm.attention(hybrid_lm.VARIANTS[variant], i), 64 * 1024) for i in range(4))

    assert kept("kimi 3 : 1 causal") / kept("causal") == pytest.approx(0.25, abs=0.001)
    kinds = [tiny_lm.attention(hybrid_lm.VARIANTS["kimi 3 : 1 causal"], i).mechanism for i in range(4)]
    assert kinds == [*["kimi_delta_attention"] * 3, "causal"]


def test_far_is_behind_what_was_trained():
    """A model that knows the next byte but for the first so many has nothing left to lose behind them."""

    class Oracle(torch.nn.Module):
        def forward(self, tokens):
            known = torch.arange(tokens.shape[1]) >= tiny_lm.LENGTH
            return 100.0 * known[:, None] * torch.nn.functional.one_hot((tokens + 1) % 256, 256)

    data = torch.arange(9 * tiny_lm.LENGTH) % 256
    assert tiny_lm.validate(Oracle(), data, 1, False, 4) < 1e-6
    assert tiny_lm.validate(Oracle(), data, 1, False) > 5


def test_lists_come_to_what_python_says():
    torch.manual_seed(0)
    tokens, wanted = list_ops.lists(50)
    names_of = {list_ops.MIN: "min", list_ops.MAX: "max", list_ops.SUM: "total"}
    for text, answer in zip(tokens.tolist(), wanted.tolist(), strict=True):
        shown = [t for t in text if t != list_ops.BLANK]
        assert text[-len(shown) :] == shown
        code = "".join(f"{names_of[t]}([" if t in names_of else "])," if t == list_ops.END else f"{t}," for t in shown)
        assert eval(code, {"total": lambda digits: sum(digits) % 10})[0] == answer


def test_copies_signals_and_flags():
    torch.manual_seed(0)
    tokens, wanted = copying.both(8)
    for text, answers in zip(tokens[:4].tolist(), wanted[:4].tolist(), strict=True):
        said = [answer + copying.SYMBOLS for answer in answers if answer != IGNORED]
        assert said == text[: copying.COPIED] and text[copying.COPIED] == copying.START
        assert text[copying.COPIED + 1 :] == said[:-1] and answers[copying.COPIED] != IGNORED
    for text, answers in zip(tokens[4:].tolist(), wanted[4:].tolist(), strict=True):
        asked = [i for i, answer in enumerate(answers) if answer != IGNORED]
        assert len(asked) == 8 and all(text[i + 1] == answers[i] + copying.SYMBOLS for i in asked)
    x, y = long_lag.signals(4)
    assert (
        x[:, : long_lag.LAG].equal(y) and 0 < (x[:, 1:] != x[:, :-1]).sum(1).max() <= long_lag.LENGTH // long_lag.HELD
    )
    text, flag = long_flag.texts(50)
    at = (text < long_flag.FLAGS).long()
    assert (at.sum(1) == 1).all() and at.argmax(1).max() < long_flag.CHUNK
    assert ((flag != IGNORED).sum(1) == long_flag.LENGTH - at.argmax(1)).all()
    assert flag[:, -1].equal(text.gather(1, at.argmax(1, keepdim=True))[:, 0])


def test_without_averages_chunks_know_nothing_of_each_other():
    torch.manual_seed(0)
    x = torch.randn(1, 3 * long_flag.CHUNK, 64)
    other = x.clone()
    other[:, 0] += 1
    for without in (False, True):
        module = core.build("mega", 64, 1, shared=32, values=64, chunk=long_flag.CHUNK)
        module = long_flag.without_averages(module) if without else module
        assert module(x)[:, -1].equal(module(other)[:, -1]) is without
    assert not any(p.requires_grad for p in module.average.parameters())


def test_without_convolutions_it_is_linear_attention_of_tokens():
    torch.manual_seed(0)
    module, x = list_ops.mixer("chela without convolutions"), torch.randn(1, 9, list_ops.DIM)
    near = torch.nn.functional.silu(x)
    q, k = (kappa * near + mu for kappa, mu in zip(module.kappa, module.mu, strict=True))
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, torch.nn.functional.silu(module.v(x))))
    o = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
    o = module.norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    h = module.o(o * torch.nn.functional.silu(module.gate(near)))
    wanted = torch.lerp(x, h, module.update(near).sigmoid())
    torch.testing.assert_close(module(x), wanted, atol=1e-5, rtol=1e-5)  # through Fourier space


@pytest.mark.parametrize("start", [(True, 1.0), (False, 0.1)], ids=["from attention", "random"])
def test_a_converted_model_comes_nearer_to_what_it_was(start):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(50, (60 * conversion.BATCH, 8))
    before = model(windows[:2]).logits
    row = conversion.distilled(model, windows, windows[:6], start, 60)
    assert [step for step, _ in row["curve"]] == [0, 20, 40, 60]
    assert row["curve"][0][1] == row["kl_at_start"] > row["kl"] + 0.05 and row["curve"][-1][1] == row["kl"]
    converted = [layer.self_attn for layer in model.model.layers if isinstance(layer.self_attn, conversion.Converted)]
    assert [layer.self_attn in converted for layer in model.model.layers] == [True, False, False, False, True]
    assert all(p.requires_grad == (".new." in name) for name, p in model.named_parameters())
    with conversion.teacher(converted):
        assert model(windows[:2]).logits.equal(before), "the teacher is what it was"
    assert not model(windows[:2]).logits.allclose(before)
    assert conversion.judged(model, converted, windows[:6])["kl"] == pytest.approx(row["kl"])


def test_curves_are_drawn_for_each_variant(monkeypatch):
    import xml.etree.ElementTree as ElementTree

    one = Experiment("rank", "About.", "loss", "low", ("a", "b"), "a", lambda *_: {}, 100)
    monkeypatch.setattr(curves, "experiments", lambda: {"rank": one})
    about = {"experiment": "rank", "steps": 100}
    rows = [
        {**about, "variant": "a", "seed": 0, "curve": [[2, 9.0], [50, 3.0], [100, 2.0]]},
        {**about, "variant": "a", "seed": 1, "curve": [[2, 9.0], [50, 5.0], [100, 4.0]]},
        {**about, "variant": "b", "seed": 0, "curve": [[2, 9.0], [50, 2.0], [100, 1.0]]},
        {**about, "variant": "c", "seed": 0, "loss": 1.0},
        {**about, "steps": 3, "variant": "a", "seed": 2, "curve": [[3, 9.0]]},
    ]
    assert list(curves.lines(rows[:4], "rank").items()) == [
        ("b", [(2, 9.0), (50, 2.0), (100, 1.0)]), ("a", [(2, 9.0), (50, 4.0), (100, 3.0)])
    ]  # fmt: skip
    drawn = curves.pictures(rows)
    assert set(drawn) == {"rank"} and curves.pictures(rows[3:]) == {}
    found = ElementTree.fromstring(drawn["rank"]).findall("{http://www.w3.org/2000/svg}polyline")
    assert [line.get("points").split()[-1] for line in found] == ["680.0,560.0", "680.0,140.0"]
    assert [line.get("points").count(",") for line in found] == [2, 2], "not the steep start"


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
