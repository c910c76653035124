"""Attention buckets: the curve of scores, the search for bases, and copies of a model that vote."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.rotary_waves import choose_bases, turning_points, waveform
from manyheads.nn import rotate

transformers = pytest.importorskip("transformers")

from manyheads.integrations.transformers.attention_buckets import attention_buckets, vote  # noqa: E402  it needs transformers

# float32 in batches of other sizes: see tests/test_transformers.py. Another base moves logits by 0.1 and more.
CLOSE = dict(atol=2e-4, rtol=0)


def make(kind="Llama", base=10000.0, **changes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, pad_token_id=0, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": base}, **changes,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture
def prompt():
    ids, mask = torch.randint(2, 64, (2, 29)), torch.ones(2, 29, dtype=torch.long)
    ids[0, :11], mask[0, :11] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, prompt, **more):
    out = model.generate(**prompt, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **more)
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def test_the_curve_is_the_score_of_ones():
    q, at = torch.ones(1, 1, 1, 64), torch.tensor([[0, 1, 7, 300, 4000]])
    scores = (rotate(q, at[:, -1:], 17500.0) * rotate(q.expand(-1, -1, 5, -1), at, 17500.0)).sum(-1).flatten()
    expected = waveform(at[0, -1] - at[0], 17500.0, 64)
    # Angles of up to 4000 in float32 are off by 2e-4, and 64 cosines of them by that each.
    torch.testing.assert_close(scores.double(), expected, atol=64 * 2e-4, rtol=0)
    assert waveform(torch.tensor(0), 123.0, 64) == 64


def test_turning_points_are_the_slow_ones():
    at = torch.arange(1000.0)
    curve = torch.cos(at / 50) + 0.1 * torch.cos(at * 2)
    peaks, troughs = turning_points(curve, reach=60)
    for found, phase in ((peaks, 0.0), (troughs, torch.pi)):
        where = torch.round((found / 50 - phase) / (2 * torch.pi))
        assert found.tolist() == sorted(set(found.tolist())) and len(found) == 3
        assert ((found - 50 * (phase + 2 * torch.pi * where)).abs() < 10).all()


def greedy(count, first, candidates, near):
    """The search, one pair of positions at a time."""
    turns = {
        b: [t.tolist() for t in turning_points(waveform(torch.arange(1000, 4091), b, 128))]
        for b in (first, *candidates)
    }
    chosen, (peaks, troughs) = [first], turns[first]
    while len(chosen) < count:
        scores = {}
        for base in candidates:
            more_peaks, more_troughs = turns[base]
            pairs = [(i, j) for a, b in ((more_peaks, troughs), (peaks, more_troughs)) for i in a for j in b]
            gaps = [abs(i - j) for i, j in pairs if abs(i - j) <= near]
            scores[base] = (len(gaps), -sum(g * g for g in gaps) / max(len(gaps), 1))
        base = max((b for b in candidates if b not in chosen), key=lambda b: scores[b])
        more_peaks, more_troughs = turns[base]

        def alone(own, others):
            return [i for i in own if all(abs(i - j) > near for j in others)]

        peaks, troughs = (
            alone(peaks, more_troughs) + alone(more_peaks, troughs),
            alone(troughs, more_peaks) + alone(more_troughs, peaks),
        )
        chosen.append(base)
    return tuple(sorted(float(b) for b in chosen))


@pytest.mark.parametrize("near", [1, 3, 10])
def test_bases_are_chosen_one_by_one_to_fill_each_others_troughs(near):
    candidates = range(10000, 30001, 1000)
    expected = greedy(5, 10500, candidates, near)
    assert choose_bases(5, first=10500, candidates=candidates, near=near) == expected
    assert len(set(expected)) == 5 and 10500.0 in expected


def test_more_bases_leave_fewer_troughs():
    def left(bases):
        turns = [turning_points(waveform(torch.arange(1000, 4091), base, 128)) for base in bases]
        peaks = torch.cat([peaks for peaks, _ in turns])
        return int(((turns[0][1][:, None] - peaks).abs() > 3).all(1).sum())

    chosen = choose_bases()
    assert len(chosen) == 6 and chosen[0] == 10000.0
    assert left(chosen) < left(choose_bases(2)) < left(choose_bases(1))
    with pytest.raises(ValueError, match="between 1 and the 2 candidates, not 3"):
        choose_bases(3, candidates=[20000])


def test_a_copy_counts_as_much_as_it_is_sure():
    logits = torch.randn(3, 2, 5, 7)
    for b in range(2):
        for i in range(5):
            sure = torch.exp(torch.stack([logits[n, b, i].max() for n in range(3)]))
            expected = sum(sure[n] / sure.sum() * logits[n, b, i] for n in range(3))
            torch.testing.assert_close(vote(logits)[b, i], expected)


def test_copies_of_one_base_are_the_model(prompt):
    model = make()
    ids, logits, _ = generated(model, prompt)
    with attention_buckets(model, [10000.0, 10000.0, 10000.0]):
        same_ids, same_logits, cache = generated(model, prompt)
    assert same_ids.equal(ids)
    torch.testing.assert_close(same_logits, logits, **CLOSE)
    assert len(cache.layers[0].keys) == 3 * len(ids), "each copy has its own cache"
    assert generated(model, prompt)[1].equal(logits), "restored"
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_copies_vote_on_each_token(kind, prompt):
    """Against models that have one base each, fed the tokens that were voted for."""
    bases = [10000.0, 100.0]  # as many as rows, so that a copy with another's base would show
    model = make(kind)
    with attention_buckets(model, bases):
        ids, logits, _ = generated(model, prompt)
        sampled = generated(model, prompt, do_sample=True)[0]
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 7, dtype=torch.long)], 1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        each = [
            make(kind, base)(ids[:, :-1], attention_mask=mask, position_ids=position_ids).logits[:, -8:]
            for base in bases
        ]
    assert (each[0] - each[1]).abs().max() > 0.1
    torch.testing.assert_close(logits, vote(torch.stack(each)), **CLOSE)
    assert ids[:, -8:].equal(logits.argmax(-1))
    assert sampled.shape == ids.shape


def test_a_single_base_is_a_model_of_that_base(prompt):
    model = make()
    with attention_buckets(model, [100.0]):
        logits = generated(model, prompt)[1]
    torch.testing.assert_close(logits, generated(make(base=100.0), prompt)[1], **CLOSE)


def test_what_cannot_vote_says_so(prompt):
    model = make()
    with pytest.raises(ValueError, match="bases must be numbers above 1, at least one"):
        attention_buckets(model, [])
    with pytest.raises(ValueError, match=r"bases must be numbers above 1, at least one, not \(1.0,\)"):
        attention_buckets(model, [1.0])
    with attention_buckets(model), pytest.raises(ValueError, match="give no labels"):
        model(**prompt, labels=prompt["input_ids"])
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "rope_parameters": scaled}))
    with pytest.raises(NotImplementedError, match="one plain rotary embedding; this model has: linear"):
        attention_buckets(other)
    with pytest.raises(NotImplementedError, match="this model has: none"):
        attention_buckets(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)))


SMALL = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
