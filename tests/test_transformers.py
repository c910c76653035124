"""Mechanisms and cache policies in transformers' models: random ones, small, with grouped heads."""

import copy
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import manyheads
from manyheads.core import Operand, Recurrence, Scores

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache, StaticCache  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from manyheads.integrations.transformers import label  # noqa: E402


def told(value):
    """A test's id: the same in every process, so without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


# float32: a sum of a few dozen numbers in another order is off by some 1e-6, and logits here are about 10. A wrong mask
# or position moves them by 0.1 and more.
CLOSE = dict(atol=2e-4, rtol=0)

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.4, pad_token_id=0, eos_token_id=None,
    max_position_embeddings=512,
)  # fmt: skip
PROMPT, SHORT = 29, 18


def make(kind="Llama", **changes):
    torch.manual_seed(1)
    config_name = f"{kind}TextConfig" if kind.startswith("Gemma3") else f"{kind}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llama():
    return make()


@pytest.fixture
def prompts():
    """A batch with a row that is padded on the left, its mask, and that row alone."""
    ids = torch.randint(2, 64, (2, PROMPT))
    mask = torch.ones_like(ids)
    ids[0, : PROMPT - SHORT], mask[0, : PROMPT - SHORT] = 0, 0
    return ids, mask, ids[:1, PROMPT - SHORT :]


def generate(model, ids, mask=None, steps=12, **more):
    """Greedy. Returns (new tokens [batch, steps], logits [batch, steps, vocabulary], the cache)."""
    mask = torch.ones_like(ids) if mask is None else mask
    if more.get("prefill_chunk_size"):
        more["past_key_values"] = DynamicCache(config=model.config)  # transformers 5.0 makes none by itself here
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), out.past_key_values


def same(a, b):
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], **CLOSE)


def traces(model):
    """What a restored model must not keep."""
    left = [name for name, module in model.named_modules() if module._forward_pre_hooks or "manyheads" in name]
    return left + [name for name, module in model.named_modules() if any("manyheads" in key for key in vars(module))]


def refuses(name):
    """Whether a mechanism's own facts say that it cannot stand in a causal model with a cache."""
    mechanism = manyheads.get(name)
    form = mechanism(**mechanism.examples[0])
    plain = form.projections.query_share == 1.0 and form.projections.scores_from == "content"
    return not mechanism.causal or not plain or getattr(form, "query_context", 0) > 0


ABLE = [name for name in manyheads.names() if not refuses(name)]


def example(name):
    """Settings small enough to matter for a prompt of PROMPT tokens."""
    mechanism = manyheads.get(name)
    return {"mechanism": name, **mechanism.examples[0]}


SNAP = {"cache": "snapkv", "budget": 10, "window": 4}
SINK = {"cache": "sink_window", "budget": 9, "sinks": 2}
POLICIES = {
    "snapkv": SNAP,
    "snapkv, one budget for each layer": SNAP | {"budget": [10, 6]},
    "snapkv, a share": SNAP | {"budget": 0.5},
    "snapkv, shares and tokens": SNAP | {"budget": (0.4, 7)},
    "snapkv over sliding_window": {**SNAP, "mechanism": "sliding_window", "sinks": 2, "cache": None},
    "sink_window": SINK,
    "sink_window, one budget for each layer": SINK | {"budget": [9, 4]},
    "sink_window, a share": SINK | {"budget": 0.3},
    "sink_window over cog_attention": SINK | {"mechanism": "cog_attention"},
    "keep_all": {"cache": "keep_all"},
}
POLICIES["snapkv over sliding_window"] |= {"cache": manyheads.policies.get("snapkv")(window=4), "window": 6}
CASES = {name: example(name) for name in ABLE} | POLICIES


# ---- equal to what it must be equal to ----


@pytest.mark.parametrize("given", [{"mechanism": "causal"}, {"cache": "keep_all"}])
def test_causal_is_the_model_itself(llama, prompts, given):
    ids, mask, _ = prompts
    before, loss = generate(llama, ids, mask), llama(ids, attention_mask=mask, labels=ids).loss
    with manyheads.apply(llama, **given) as applied:
        same(generate(llama, ids, mask), before)
        torch.testing.assert_close(llama(ids, attention_mask=mask, labels=ids).loss, loss, **CLOSE)
        assert applied.label == label(llama) == "dense"


@pytest.mark.parametrize("case", CASES)
def test_a_padded_row_is_the_row_alone(llama, prompts, case):
    ids, mask, alone = prompts
    with manyheads.apply(llama, **CASES[case]):
        batch, single = generate(llama, ids, mask), generate(llama, alone)
    same((batch[0][:1], batch[1][:1]), single)


@pytest.mark.parametrize("case", POLICIES)
def test_a_padded_row_is_the_row_alone_in_chunks(llama, prompts, case):
    """The padding fills the first chunk, so that the row is cut in the same places."""
    ids, mask, alone = prompts
    with manyheads.apply(llama, **CASES[case]):
        batch = generate(llama, ids, mask, prefill_chunk_size=PROMPT - SHORT)
        single = generate(llama, alone, prefill_chunk_size=PROMPT - SHORT)
    same((batch[0][:1], batch[1][:1]), single)


@pytest.mark.parametrize("case", ["causal", "kimi_delta_attention", "moba", "sink_window", "snapkv"])
def test_a_row_padded_on_the_right_is_the_row_alone(llama, case):
    """Continued after its padding, as in a batch of conversations."""
    ids = torch.randint(2, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    then = torch.randint(2, 64, (2, 5))

    def run(first, first_mask, second):
        places = (first_mask.cumsum(1) - 1).clamp(min=0)
        out = llama(first, attention_mask=first_mask, position_ids=places)
        whole = torch.cat([first_mask, torch.ones_like(second)], 1)
        at = (whole.cumsum(1) - 1)[:, -second.shape[1] :]
        return llama(second, attention_mask=whole, position_ids=at, past_key_values=out.past_key_values).logits

    with manyheads.apply(llama, **CASES[case]), torch.no_grad():
        batch, single = run(ids, mask, then), run(ids[:1, :12], mask[:1, :12], then[:1])
    torch.testing.assert_close(batch[:1], single, **CLOSE)


CHUNKED = [name for name in ABLE if not manyheads.get(name).sees_future]


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", [*CHUNKED, "sink_window over its own window"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(llama, prompts, name, chunk):
    ids, mask, _ = prompts
    policy = {"mechanism": "sliding_window", "window": 6, "cache": manyheads.policies.get("sink_window")(sinks=2)}
    given = policy | {"sinks": 2, "budget": 8} if name not in manyheads.names() else CASES[name]
    with manyheads.apply(llama, **given):
        same(generate(llama, ids, mask, prefill_chunk_size=chunk), generate(llama, ids, mask))


def test_a_policy_that_keeps_what_the_mechanism_reads_changes_nothing(llama, prompts):
    ids, mask, _ = prompts
    window = {"mechanism": "sliding_window", "window": 6, "sinks": 2}
    with manyheads.apply(llama, **window) as applied:
        before = generate(llama, ids, mask)
        assert applied.label == "masked"
    with manyheads.apply(llama, **window, cache=manyheads.policies.get("sink_window")(sinks=2), budget=8) as applied:
        after = generate(llama, ids, mask)
        assert applied.label == "freed"
    same(after, before)
    assert manyheads.cache_bytes(after[2]) < manyheads.cache_bytes(before[2]) / 3


@pytest.mark.parametrize("budget", [1000, 1.0])
@pytest.mark.parametrize("name", manyheads.policies.names())
def test_a_budget_for_all_is_dense(llama, prompts, name, budget):
    ids, mask, _ = prompts
    before = generate(llama, ids, mask)
    if name == "keep_all":
        budget = None if budget == 1000 else budget
    # A share is of the prompt, so what is generated would push out what came first.
    steps = 12 if budget != 1.0 or name == "snapkv" else 1
    given = {"window": 4} if name == "snapkv" else {}
    with manyheads.apply(llama, cache=name, budget=budget, **given):
        after = generate(llama, ids, mask, steps=steps)
    same(after, (before[0][:, :steps], before[1][:, :steps]))


# ---- memory ----


def test_evicted_keys_are_given_back(llama):
    ids = torch.randint(2, 64, (2, 200))
    dense = manyheads.cache_bytes(llama(ids).past_key_values)
    assert dense == 2 * 2 * 2 * 2 * 200 * 8 * 4  # layers, k and v, batch, kv_heads, tokens, head_dim, bytes
    for given in (SNAP, SINK):
        with manyheads.apply(llama, **given) as applied:
            cache = llama(ids).past_key_values
        held = cache.layers[0].keys.shape[2]
        assert held == given["budget"] and cache.get_seq_length() == 200 and applied.label == "freed"
        # Of what is held, a position of 8 bytes comes with 64 of a head's key and value.
        assert manyheads.cache_bytes(cache) <= dense * held / 200 * 72 / 64 + 100


def test_cache_bytes_counts_storages_and_not_views():
    cache = DynamicCache()
    k = torch.zeros(1, 2, 100, 8)
    cache.update(k, k, 0)
    assert manyheads.cache_bytes(cache) == 2 * k.nbytes
    cache.layers[0].keys = cache.layers[0].keys[:, :, :3]  # a view holds on to all of it
    assert manyheads.cache_bytes(cache) == 2 * k.nbytes
    cache.layers[0].values = cache.layers[0].keys
    assert manyheads.cache_bytes(cache) == k.nbytes


@pytest.mark.parametrize("budget", [9, [9, 4]])
def test_decoding_past_the_budget_stays_bounded(llama, prompts, budget):
    ids, mask, _ = prompts
    with manyheads.apply(llama, **SINK | {"budget": budget}):
        cache = generate(llama, ids, mask, steps=40)[2]
    want = [9, 9] if budget == 9 else budget
    assert [layer.keys.shape[2] for layer in cache.layers] == want
    assert [layer.values.shape[2] for layer in cache.layers] == want


def test_a_prompt_in_chunks_never_holds_more_than_budget_and_chunk(llama):
    ids, longest = torch.randint(2, 64, (1, 96)), 0
    with manyheads.apply(llama, **SNAP), torch.no_grad():
        cache = DynamicCache(config=llama.config)
        for chunk in ids.split(8, 1):
            llama(chunk, past_key_values=cache)
            longest = max(longest, cache.layers[0].keys.shape[2])
    assert longest == 10 and cache.get_seq_length() == 96


def test_snapkv_leaves_alone_what_is_generated(llama, prompts):
    ids, mask, _ = prompts
    with manyheads.apply(llama, **SNAP):
        cache = generate(llama, ids, mask, steps=12)[2]
    assert cache.layers[0].keys.shape[2] == 10 + 11  # the last token is not read any more
    first, second = cache.layers[0].positions[1]
    assert first[:10].tolist() != second[:10].tolist()  # heads choose for themselves
    assert first[6:].tolist() == second[6:].tolist() == list(range(PROMPT - 4, PROMPT + 11))


def test_a_recurrence_holds_no_keys(llama, prompts):
    ids, mask, _ = prompts
    with manyheads.apply(llama, "lightning_attention_2") as applied:
        few, many = generate(llama, ids, mask, steps=2)[2], generate(llama, ids, mask, steps=20)[2]
        assert applied.label == "freed" and "trained" in str(applied)
    state = 2 * 4 * 8 * 8 * 4  # batch, heads, head_dim, head_dim, bytes
    assert manyheads.cache_bytes(few) == manyheads.cache_bytes(many) == 2 * state
    assert many.layers[0].keys is None and many.get_seq_length() == PROMPT + 19


class Largest(TorchDispatchMode):
    """The most numbers that any new tensor has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "given", [{"mechanism": "causal"}, CASES["moba"], CASES["sliding_window"], SNAP | {"budget": 300}, SINK], ids=told
)
def test_shared_heads_are_never_repeated(given):
    model = make(num_attention_heads=8, num_key_value_heads=2)
    ids = torch.randint(2, 64, (1, 400))
    with manyheads.apply(model, **given), torch.no_grad():
        cache = model(ids).past_key_values
        stored = cache.layers[0].keys
        with Largest() as largest:
            model(ids[:, :1], past_key_values=cache)
    # The step's new cache is one token longer; repeated, it would be four times that.
    assert largest.most <= 2 * stored.numel() + 8 * 401


def test_a_mechanism_keeps_its_own_scale():
    """One token stands at position 0, where rotary embeddings do nothing: o = scale (q . k) v."""
    model, seen = make(num_attention_heads=2, num_key_value_heads=2), {}
    attention = model.model.layers[0].self_attn
    for name in "qkvo":
        hook = lambda _, args, out, name=name: seen.update({name: args[0] if name == "o" else out})  # noqa: E731
        getattr(attention, f"{name}_proj").register_forward_hook(hook)
    with manyheads.apply(model, "lightning_attention_2"), torch.no_grad():
        model(torch.tensor([[5]]))
    q, k, v, o = (seen[name].view(2, 8) for name in "qkvo")
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v)


# ---- which layers ----


def test_layers_can_differ(llama, prompts):
    ids, mask, _ = prompts
    dense = generate(llama, ids, mask)
    with manyheads.apply(llama, "moba", layers=[1], block_size=4, top_k=2) as applied:
        assert [(row.index, row.label, row.why) for row in applied.report] == [
            (0, None, "not asked for"),
            (1, "masked", ""),
        ]
        one = generate(llama, ids, mask)
    with manyheads.apply(llama, layers={1: ("moba", {"block_size": 4, "top_k": 2})}):
        same(generate(llama, ids, mask), one)
    with manyheads.apply(llama, "moba", top_k=2, layers={1: {"block_size": 4}}):
        same(generate(llama, ids, mask), one)
    with manyheads.apply(llama, layers={0: "causal", 1: ("moba", {"block_size": 1000})}):
        same(generate(llama, ids, mask), dense)
    with manyheads.apply(llama, "moba", block_size=4, top_k=2):
        assert not torch.allclose(generate(llama, ids, mask)[1], one[1])
    with manyheads.apply(llama, cache="sink_window", budget=9, layers=[1]) as applied:
        cache = generate(llama, ids, mask)[2]
        assert [layer.keys.shape[2] for layer in cache.layers] == [PROMPT + 11, 9] and applied.label == "freed"


def test_a_mechanism_learns_which_layer_it_is_in(llama, prompts):
    ids, mask, _ = prompts
    with manyheads.apply(llama, "gemma2", window=5, cap=2.0):
        own = generate(llama, ids, mask)
    same_by_hand = {index: ("gemma2", {"layer": index, "window": 5, "cap": 2.0}) for index in (0, 1)}
    with manyheads.apply(llama, layers=same_by_hand):
        same(generate(llama, ids, mask), own)
    with manyheads.apply(llama, "gemma2", layer=0, window=5, cap=2.0):
        assert not torch.allclose(generate(llama, ids, mask)[1], own[1])
    with manyheads.apply(llama, "lightning_attention_2"):
        plans = [layer.self_attn._manyheads for layer in llama.model.layers]
        decays = [plan.form.decay(torch.arange(4), 4) for plan in plans]
    torch.testing.assert_close(decays[1], decays[0] / 2)


HYBRID = {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(("kind", "implementation"), [("Gemma3", "sdpa"), ("Gemma3", "eager"), ("Gemma2", "eager")])
def test_sliding_layers_are_left_alone(prompts, kind, implementation):
    ids, mask, alone = prompts
    model = make(kind, **HYBRID, **({"attn_logit_softcapping": None} if kind == "Gemma2" else {}))
    model.set_attn_implementation(implementation)
    before = generate(model, ids, mask)
    with manyheads.apply(model, "causal") as applied:
        same(generate(model, ids, mask), before)
        assert [row.label for row in applied.report] == [None, "dense"] * 2
        assert "layer 0: left alone (sliding" in str(applied)
    with manyheads.apply(model, cache="snapkv", budget=[8, 6], window=4):
        batch, single = generate(model, ids, mask), generate(model, alone)
        same((batch[0][:1], batch[1][:1]), single)
        assert [layer.keys.shape[2] for layer in batch[2].layers] == [5, 8 + 11, 5, 6 + 11]
    assert torch.equal(generate(model, ids, mask)[1], before[1]) and model.config._attn_implementation == implementation
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_a_model_without_full_attention_has_nothing_to_change(prompts):
    with pytest.raises(ValueError, match="no layer to change: sliding"):
        manyheads.apply(make("Mistral", sliding_window=6), "causal")
    model = make("Mistral", sliding_window=None)
    before = generate(model, *prompts[:2])
    with manyheads.apply(model, "causal"):
        same(generate(model, *prompts[:2]), before)


def test_layers_with_shared_keys_stay_dense(prompts):
    model = make(
        "Gemma3n", **HYBRID, num_kv_shared_layers=2, hidden_size_per_layer_input=4, vocab_size_per_layer_input=64,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    before = generate(model, *prompts[:2])
    with manyheads.apply(model, "moba") as applied:
        assert [row.index for row in applied.report if row.label] == [1]
        assert "layer 3: left alone (kv-shared" in str(applied)
    with manyheads.apply(model, "causal"):
        same(generate(model, *prompts[:2]), before)
    for given in (SNAP, {"mechanism": "lightning_attention_2"}):
        with pytest.raises(NotImplementedError, match="other layers read"):
            manyheads.apply(model, **given)


# ---- the model as it was ----


@pytest.mark.parametrize("given", [*POLICIES.values(), {"mechanism": "kimi_delta_attention"}], ids=told)
def test_restoring_leaves_no_trace(llama, prompts, given):
    ids, mask, _ = prompts
    before, keys = generate(llama, ids, mask)[1], list(llama.state_dict())
    inside = None
    with pytest.raises(ZeroDivisionError), manyheads.apply(llama, **given) as applied:
        inside = generate(llama, ids, mask)[1]
        raise ZeroDivisionError
    assert inside is not None and llama.config._attn_implementation == "sdpa" and not traces(llama)
    assert type(llama.config._attn_implementation) is str and list(llama.state_dict()) == keys
    assert torch.equal(generate(llama, ids, mask)[1], before)
    applied.restore()  # a second time does nothing
    assert label(llama) == "dense"


def test_a_failed_apply_leaves_no_trace(llama, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("manyheads.integrations.transformers.applied._sources", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            manyheads.apply(llama, "kimi_delta_attention")
    assert not traces(llama) and llama.config._attn_implementation == "sdpa"


def test_applying_twice_raises_and_copies_go_on(llama, prompts):
    ids, mask, _ = prompts
    with manyheads.apply(llama, **SNAP):
        with pytest.raises(ValueError, match="applied to this model already"):
            manyheads.apply(llama, "causal")
        twin, now = copy.deepcopy(llama), generate(llama, ids, mask)
        same(generate(twin, ids, mask), now)
        # A prompt's cache, kept and copied for each question.
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(ids[1:], past_key_values=cache)
        longer = torch.cat([ids[1:], ids[1:, :3]], 1)
        once = generate(llama, longer, past_key_values=copy.deepcopy(cache))
        same(generate(llama, longer, past_key_values=cache), once)


# ---- training ----


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_reaches_every_projection(prompts, name, checkpointing):
    ids, mask, _ = prompts
    model = make().train()
    if checkpointing:
        # The second is the older name.
        for enable in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(model, enable):
                getattr(model, enable)()
                break
    with manyheads.apply(model, **example(name)):
        attention = model.model.layers[1].self_attn
        operands = [p for n, p in attention.named_parameters() if "manyheads_operands" in n]
        assert bool(operands) == bool(attention._manyheads.form.operands)
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            step.zero_grad()
            loss.backward()
            projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            for parameter in (*projections, *operands):
                assert parameter.grad is not None and parameter.grad.isfinite().all()
            step.step()
            losses.append(loss.item())
        # Not in the first step: what an operand that begins at zero is multiplied with has no gradient there.
        assert all(parameter.grad.abs().max() > 0 for parameter in (*projections, *operands))
    assert losses[-1] < losses[0]


def test_operands_have_the_models_dtype(prompts):
    ids, mask, _ = prompts
    model = make().to(torch.bfloat16)
    with manyheads.apply(model, "kimi_delta_attention"):
        assert {p.dtype for n, p in model.named_parameters() if "manyheads_operands" in n} == {torch.bfloat16}
        assert generate(model, ids, mask)[1].isfinite().all()


# ---- forms of one's own ----


def per_token_bias():
    """A bias for each key, projected from its token."""
    return Scores(
        mask=lambda b, h, i, j: j <= i,
        score=lambda s, b, h, i, j, bias: s + bias[b, h, j],
        operands={"bias": Operand("batch heads len")},
    )


@pytest.mark.parametrize("chunk", [None, 7])
def test_operands_are_stored_beside_their_keys(llama, prompts, chunk):
    ids, mask, alone = prompts
    with manyheads.apply(llama, per_token_bias()) as applied:
        for name, parameter in llama.named_parameters():
            if "manyheads_operands" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        once, single = generate(llama, ids, mask), generate(llama, alone)
        same((once[0][:1], once[1][:1]), single)
        same(generate(llama, ids, mask, prefill_chunk_size=chunk), once)
        with torch.no_grad():
            whole = torch.cat([alone, single[0]], 1)
            torch.testing.assert_close(llama(whole).logits[:, SHORT - 1 : -1], single[1], **CLOSE)
        beams = generate(llama, alone, num_beams=3)  # reordered with them
        assert len(beams[0]) == 1 and applied.label == "dense"
        cache = once[2]
        cache.crop(-5)
        assert cache.get_seq_length() == cache.layers[0].operands["bias"].shape[2] == PROMPT + 11 - 5
        cache.batch_repeat_interleave(2)
        assert len(cache.layers[0].operands["bias"]) == len(cache.layers[0].keys) == 4


def test_a_recurrence_of_ones_own(llama, prompts):
    ids, mask, alone = prompts
    with manyheads.apply(llama, Recurrence(decay=lambda h, heads: -0.1 * (h + 1))) as applied:
        batch, single = generate(llama, ids, mask), generate(llama, alone)
        same((batch[0][:1], batch[1][:1]), single)
        assert "a Recurrence, freed" in str(applied)


# ---- generate's other ways ----


class Words(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.got.append("end")


def test_a_streamer_gets_every_token(llama, prompts):
    alone, words = prompts[2], Words()
    with manyheads.apply(llama, **SNAP):
        tokens = generate(llama, alone, streamer=words)[0]
    assert words.got == [*alone[0].tolist(), *tokens[0].tolist(), "end"]


@pytest.mark.parametrize("case", ["causal", "kimi_delta_attention", "snapkv, one budget for each layer", "sink_window"])
def test_beams_take_their_cache_along(llama, prompts, case):
    ids, mask, alone = prompts
    dense = llama.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=10, do_sample=False)
    with manyheads.apply(llama, **CASES[case]):
        batch = llama.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=10, do_sample=False)
        single = llama.generate(
            alone, attention_mask=torch.ones_like(alone), num_beams=3, max_new_tokens=10, do_sample=False
        )
        assert torch.equal(batch[:1, PROMPT:], single[:, SHORT:])
        # The best beam's score is that of the same tokens, read at once, where nothing was evicted.
        if case == "causal":
            assert torch.equal(batch, dense)


@pytest.mark.parametrize("case", ["kimi_delta_attention", "snapkv", "snapkv, a share", "sink_window"])
def test_caches_select_and_repeat_rows(llama, prompts, case):
    ids, mask, _ = prompts
    next_one = torch.randint(2, 64, (2, 1))
    with manyheads.apply(llama, **CASES[case]), torch.no_grad():
        cache = llama(ids, attention_mask=mask).past_key_values

        def step(cache, tokens, mask):
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            return llama(
                tokens, attention_mask=mask, past_key_values=cache, position_ids=mask.sum(1)[:, None] - 1
            ).logits

        want = step(copy.deepcopy(cache), next_one, mask)
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(step(swapped, next_one.flip(0), mask.flip(0)), want.flip(0), **CLOSE)
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(2)
        twice = [x.repeat_interleave(2, 0) for x in (next_one, mask)]
        torch.testing.assert_close(step(wide, *twice), want.repeat_interleave(2, 0), **CLOSE)
        wide.batch_select_indices(torch.tensor([3]))
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(step(cache, next_one[1:], mask[1:]), want[1:], **CLOSE)
        cache.reset()
        assert cache.get_seq_length() == 0 and manyheads.cache_bytes(cache) == 0
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            wide.crop(-1)


def test_a_second_prompt_is_compressed_too(llama, prompts):
    _, _, alone = prompts
    with manyheads.apply(llama, **SNAP):
        cache = DynamicCache(config=llama.config)
        first = generate(llama, alone, past_key_values=cache, steps=4)[0]
        talk = torch.cat([alone, first, torch.randint(2, 64, (1, 12))], 1)
        generate(llama, talk, past_key_values=cache, steps=4)
    assert cache.layers[0].keys.shape[2] == 10 + 3
    assert cache.layers[0].positions.amax() == SHORT + 4 + 12 + 3 - 1


def test_a_call_holds_on_to_nothing(llama, prompts):
    ids, mask, _ = prompts
    seen = []
    watch = llama.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with manyheads.apply(llama, "kimi_delta_attention"), torch.no_grad():
        llama(ids, attention_mask=mask)
        watch.remove()
        assert len(seen) == 1 and seen[0]() is None


# ---- what is refused, by name ----


@pytest.mark.parametrize("name", [name for name in manyheads.names() if refuses(name)])
def test_a_mechanism_that_does_not_fit_is_refused(llama, name):
    with pytest.raises(NotImplementedError, match=name) as error:
        manyheads.apply(llama, name)
    assert "\n" not in str(error.value) and not traces(llama)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a mechanism, a cache policy or both"),
        ({"mechanism": "moba", "budget": 5}, "needs a cache policy"),
        ({"cache": "snapkv"}, "needs a budget"),
        ({"cache": "keep_all", "budget": 7}, "evicts nothing"),
        (SNAP | {"budget": 0}, "at least 4"),
        (SNAP | {"budget": 3}, "at least 4"),
        (SNAP | {"budget": float("nan")}, "nan"),
        (SNAP | {"budget": [8, 8, 8]}, "3 entries, but the policy is for 2 layers"),
        (SNAP | {"mechanism": "sliding_window"}, "window is a setting of both sliding_window and snapkv"),
        (SNAP | {"mechanism": "moba"}, "moba is a Selection"),
        (SNAP | {"mechanism": "lightning_attention_2"}, "keeps a state and no keys"),
        (SNAP | {"mechanism": per_token_bias()}, "operands for each token"),
        (SNAP | {"mechanism": Scores(mask=lambda b, h, i, j: i - j < 2 + h)}, "tells heads or rows apart"),
        ({"mechanism": "causal", "layers": [2]}, "layer 2 cannot be changed; layers with full attention: 0, 1"),
        ({"mechanism": "causal", "layers": []}, "names no layer"),
        ({"mechanism": "causal", "layers": 1}, "indices"),
        ({"mechanism": "causal", "engine": "sdpaa"}, "Did you mean 'sdpa'"),
        ({"mechanism": "mobe"}, "Did you mean 'moba'"),
        ({"cache": "snap", "budget": 9}, "Did you mean 'snapkv'"),
        ({"cache": manyheads.policies.get("snapkv"), "budget": 9}, "call it"),
        ({"mechanism": "moba", "top": 3}, "Did you mean 'top_k'"),
        ({"mechanism": 3}, "must be a name or a form"),
    ],
    ids=told,
)
def test_what_cannot_be_asked_for(llama, given, message):
    with pytest.raises((ValueError, TypeError, NotImplementedError, KeyError), match=message) as error:
        manyheads.apply(llama, **given)
    assert "\n" not in str(error.value) and not traces(llama)


def test_heads_may_be_told_apart_where_they_keep_the_same(llama, prompts):
    ids, mask, alone = prompts
    with manyheads.apply(llama, Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 2 + h)), **SINK):
        batch, single = generate(llama, ids, mask), generate(llama, alone)
    same((batch[0][:1], batch[1][:1]), single)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Gemma2", {"sliding_window": 6}, "soft-cap"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}, "sinks"),
        ("DeepseekV3", {"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 4,
                        "num_experts_per_tok": 2, "head_dim": None}, "latent"),
        ("GPT2", {"add_cross_attention": True}, "cross-attention"),
        ("Bloom", {}, "BloomForCausalLM"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(kind, changes, message):
    if kind == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, **changes))
    elif kind == "Bloom":
        model = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4))
    else:
        model = make(kind, **changes)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=message):
        manyheads.apply(model, "causal")
    assert not traces(model) and model.config._attn_implementation == before


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        manyheads.apply(torch.nn.Linear(2, 2), "causal")


def test_calls_that_do_not_fit_are_refused(llama, prompts):
    ids, mask, alone = prompts
    for name in ("causal", "kimi_delta_attention"):
        with manyheads.apply(llama, name):
            with pytest.raises(TypeError, match=r"StaticLayer.*DynamicCache"):
                generate(llama, alone, past_key_values=StaticCache(llama.config, 64), disable_compile=True)
            with pytest.raises(NotImplementedError, match="4D masks"):
                llama(ids, attention_mask=torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool))
            with pytest.raises(NotImplementedError, match="packed"):
                llama(alone, position_ids=torch.arange(SHORT)[None] % 7, use_cache=False)
            with pytest.raises(ValueError, match="covers 5 tokens"):
                llama(ids, attention_mask=mask[:, :5])
            for argument in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}):
                with pytest.raises(NotImplementedError, match=next(iter(argument))):
                    llama(alone, **argument)
    with manyheads.apply(llama, **SNAP):
        with pytest.raises(ValueError, match="use_cache"):
            llama(alone, use_cache=False)
        cache = llama(alone).past_key_values
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            generate(llama, alone, prompt_lookup_num_tokens=2)
    with manyheads.apply(llama, **SINK), pytest.raises(TypeError, match="under another manyheads"):
        llama(alone[:, :1], past_key_values=cache)
    cache = llama(alone).past_key_values
    with manyheads.apply(llama, **SNAP), pytest.raises(ValueError, match=f"holds {SHORT} tokens from before"):
        llama(alone[:, :1], past_key_values=cache)


def test_attention_dropout_is_refused():
    model = make(attention_dropout=0.1).train()
    with manyheads.apply(model, "causal"):
        with pytest.raises(NotImplementedError, match="dropout"):
            model(torch.ones(1, 4, dtype=torch.long))
        model.eval()(torch.ones(1, 4, dtype=torch.long))
