"""A tiny language model over bytes of English, with one attention after the other in its blocks, all else equal.

Two blocks of width 128, 4 heads, 128 bytes of context, learned absolute positions besides what an attention has of its
own. The perceptrons' width makes up for what an attention has more or less of weights. Float32 with TF32 products: the
kernels are so small that bfloat16's casts would cost more than they save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import Block, Claim, Experiment, Numbers, Verdict, build, count, fit, lower, paired, values
from manyheads import get, layers, names
from manyheads.core import Form
from manyheads.evaluate import texts
from manyheads.layers.sparse.ssa import draw_mode

DIM, HEADS, BLOCKS, LENGTH, BATCH, FF = 128, 4, 2, 128, 32, 4 * 128
STEPS = 1000
SPAN = 50
PIECE = 16 * 1024  # of ten pieces of text in a row the last is for validation
# Of what layers add to the loss, as their papers have them; alignment is a mean over layers, the others are sums.
WEIGHTS = {"load_balance": 0.01, "router_z": 0.001, "alignment": 10 / BLOCKS}


@dataclass(frozen=True)
class Variant:
    """One attention: a mechanism or a layer and its settings, of each block if `every` is given, which go in turn.
    ff: width of the perceptrons, where a claim is about equal work rather than equal numbers of weights.
    judged: the attention that the trained weights are judged with, if it is another. prefixes: judge each byte from a
    text that ends before it, as the attention chooses from all of a text what it reads. blocks: how many there are, all
    together of one size. places: whether there are learned absolute positions."""

    name: str | Form
    settings: Mapping[str, Any] = field(default_factory=dict)
    every: tuple[tuple[str | Form, Mapping[str, Any]], ...] = ()
    ff: int | None = None
    judged: Variant | None = None
    prefixes: bool = False
    blocks: int = BLOCKS
    places: bool = True


def of(name: str, **settings: Any) -> Variant:
    return Variant(name, settings)


SLOW = {"engine": "eager"}  # a score function on so few tokens is not worth FlexAttention's half minute of compiling
QUARTER = {"block_size": 8, "top_k": 4}  # of 16 blocks
CHOSEN = {
    "causal": of("causal"),
    "causal, no rotary": of("causal", rope_theta=None),
    "causal, 8 heads": of("causal", heads=8),
    "causal, 32 heads": of("causal", heads=32),
    "causal, 2 key heads": of("causal", kv_heads=2),
    "causal, 1 narrow head, no rotary": of("causal", heads=1, head_dim=32, rope_theta=None),
    "cog_attention": of("cog_attention", **SLOW),
    "deconstructed_attention approximate": of("deconstructed_attention", **SLOW),
    "deconstructed_attention non_approximate": of("deconstructed_attention", variant="non_approximate"),
    "deconstructed_attention non_approximate, causal in turn": Variant(
        "deconstructed_attention",
        every=(("causal", {}), ("deconstructed_attention", {"variant": "non_approximate"})),
    ),
    "gemma2": Variant(
        "gemma2", every=tuple(("gemma2", {"layer": i, "window": 32, **SLOW}) for i in (0, 1))
    ),
    "neural_attention": of("neural_attention"),
    "relational_attention": of("relational_attention", relations=4, width=32),
    "sparse_query_attention": of("sparse_query_attention"),
    "bam": of("bam", experts=2),
    "compressed_convolutional_attention": of("compressed_convolutional_attention", kv_heads=2, head_dim=32),
    "diffqkv, 1 key head": of("diffqkv", k_heads=1, v_heads=4),
    "diffqkv, 1 value head": of("diffqkv", k_heads=4, v_heads=1),
    "dual_attention": of("dual_attention", relational=2),
    "fixed_head_size, 8 heads of 32": of("fixed_head_size", heads=8, head_dim=32),
    "knocking_heads": of("knocking_heads"),
    "knocking_heads linear": of("knocking_heads", mlp=False),
    "mhe": of("mhe", head_dim=32),
    "mhe add": of("mhe", head_dim=32, add=True),
    "minimal_attention": of("minimal_attention", causal=True),
    "minimal_attention symmetric": of("minimal_attention", causal=True, kind="symmetric"),
    "mixture_of_attention_heads 4 of 4": Variant(
        "mixture_of_attention_heads", {"experts": 4, "top_k": 4, "head_dim": 32}, ff=FF
    ),
    "mixture_of_attention_heads 4 of 16": Variant(
        "mixture_of_attention_heads", {"experts": 16, "top_k": 4, "head_dim": 32}, ff=FF
    ),
    "moh, 6 of 8 heads": of("moh", heads=8, shared=2, top_k=4),
    "moh, 4 of 8 heads": of("moh", heads=8, shared=2, top_k=2),
    "rcmha": of("rcmha", max_len=LENGTH),
    "sha_rnn": of("sha_rnn", widen=1),
    "super_attention": of("super_attention", heads=4, length=LENGTH, causal=True),
    "super_attention efficient": of("super_attention", heads=4, kind="efficient", causal=True),
    "super_attention optimised": of("super_attention", heads=4, kind="optimised", causal=True),
    "combiner": of("combiner", block_size=16),
    "combiner's blocks without spans": of("sink_fixed_attention", group_size=16, shifted=HEADS + 1, sinks=0, **SLOW),
    "dynamic_mask_attention": of("dynamic_mask_attention", window=32),
    "sliding_window of 32": of("sliding_window", window=32, sinks=0, **SLOW),
    "moba": of("moba", block_size=8, top_k=4, **SLOW),
    "mosa, 10 heads for 2 dense ones": Variant(  # each has a fifth of a dense one's multiplications
        "mosa", {"heads": 10, "dense_heads": 2, "sparsity": 4, "head_dim": 32}, ff=FF, prefixes=True
    ),
    "ssa, sparse": of("ssa", **QUARTER, **SLOW),
    "ssa, full": Variant("ssa", {**QUARTER, **SLOW}, judged=of("ssa", mode="full", **QUARTER, **SLOW)),
    "causal, judged as ssa is": Variant("causal", judged=of(
        "infllm_v2", top_k=3, init_blocks=0, dense_len=0, block_size=8, kernel=8, stride=8, window=8, **SLOW)),
}  # fmt: skip
LEFT_OUT = {
    "paint": "stands in for a trained model's softmax, where tokens of an image are known",
    "visual_attention_redistribution": "stands in for a trained model's softmax, where tokens of an image are known",
}


def variants() -> dict[str, Variant]:
    """What was chosen, and every other causal mechanism and layer of the two families with its defaults."""
    found, had = dict(CHOSEN), {v.name for v in CHOSEN.values()} | set(LEFT_OUT)
    published = [*map(get, names()), *map(layers.get, layers.names())]
    for one in published:
        if one.family in ("dense", "heads") and one.causal and not one.sees_future and one.name not in had:
            found[one.name] = of(one.name)
    return found


@cache
def text() -> tuple[Tensor, Tensor, str]:
    """Bytes to train on and to validate with, and the SHA-256 of all: Python's and torch's documentation."""
    folder = Path(next(iter(find_spec("torch").submodule_search_locations)))  # pyright: ignore
    reference = [(folder / name).read_text(encoding="utf-8") for name in ("_torch_docs.py", "_tensor_docs.py")]
    data = "\n\n".join([texts.read().content, *reference]).encode()
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    held = b"".join(pieces[9::10])
    kept = b"".join(piece for i, piece in enumerate(pieces) if i % 10 != 9)
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (kept, held))
    return train, validation, hashlib.sha256(data).hexdigest()


class TinyLM(nn.Module):
    def __init__(self, variant: Variant):
        super().__init__()
        made = [attention(variant, i) for i in range(variant.blocks)]
        budget = BLOCKS * (4 * DIM * DIM + 2 * DIM * FF) + (0 if variant.places else LENGTH * DIM)
        ff = variant.ff or max(8, round((budget - count(made)) / (variant.blocks * 2 * DIM)))
        self.embed, self.place = nn.Embedding(256, DIM), nn.Embedding(LENGTH, DIM) if variant.places else None
        for table in (self.embed, self.place):
            if table is not None:
                nn.init.normal_(table.weight, std=0.5)
        self.blocks = nn.ModuleList(Block(DIM, one, ff) for one in made)
        self.norm, self.out = nn.RMSNorm(DIM), nn.Linear(DIM, 256)
        self.ff = ff

    def forward(self, tokens: Tensor, losses: list[Tensor] | None = None) -> Tensor:
        """tokens [batch, len]. Returns logits [batch, len, 256]; the layers' own losses are added to the list."""
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            if losses is not None:
                losses += [WEIGHTS[name] * value for name, value in block.losses(x).items()]
            x = block(x)
        return self.out(self.norm(x))


def attention(variant: Variant, block: int) -> nn.Module:
    name, settings = variant.every[block % len(variant.every)] if variant.every else (variant.name, variant.settings)
    settings = {**settings}
    return build(name, DIM, settings.pop("heads", HEADS), **settings)


def run(name: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    return trained(variants()[name], seed, device, steps)


def trained(variant: Variant, seed: int, device: str, steps: int, *, far: int = 1) -> dict[str, Any]:
    """The loss on text held out, and in training the mean of each SPAN steps, [steps, loss]. far: if more than 1, also
    the loss on the rest of texts so many times as long as those of the training, `loss_far`."""
    torch.manual_seed(seed)
    model = TinyLM(variant).to(device)
    train, validation, sha256 = text()
    train, validation = train.to(device), validation.to(device)
    order = torch.Generator().manual_seed(1000 + seed)
    starts = torch.randint(len(train) - LENGTH - 1, (steps, BATCH, 1), generator=order).to(device)
    window = torch.arange(LENGTH + 1, device=device)
    seen: list[Tensor] = []

    def loss(step: int) -> Tensor:
        draw_mode(model)
        tokens, extra = train[starts[step] + window], []
        logits = model(tokens[:, :-1], extra)
        own = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        seen.append(own.detach())
        return own + sum(extra)

    seconds = fit(model, loss, steps, lr=2e-3, decay=0.1, warmup=100)
    judged = TinyLM(variant.judged or variant).to(device).eval()
    judged.load_state_dict(model.state_dict())
    batches = 2 if steps < 10 else 10**9
    more = {"loss_seeing_ahead": validate(judged, validation, batches, False)} if variant.prefixes else {}
    if far > 1:
        more["loss_far"] = validate(judged, validation, batches, False, far)
    return {
        "loss": validate(judged, validation, batches, variant.prefixes), **more,
        "parameters": count(model), "ff": model.ff,
        "curve": [[SPAN * (n + 1), part.mean().item()] for n, part in enumerate(torch.stack(seen).split(SPAN))],
        "seconds_per_step": seconds, "text_sha256": sha256,
    }  # fmt: skip


def predict(model: nn.Module, tokens: Tensor, prefixes: bool) -> Tensor:
    """Logits [batch, len, 256], each from the whole text or from a text that ends there."""
    if not prefixes:
        return model(tokens)
    return torch.stack([model(tokens[:, :n])[:, -1] for n in range(1, tokens.shape[1] + 1)], 1)


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, batches: int, prefixes: bool, far: int = 1) -> float:
    """Nats a byte over windows side by side, in the first so many batches. far: windows are so many times as long as
    those of the training, and what stands behind the first LENGTH bytes is judged, if there is more."""
    size, start = far * LENGTH + 1, LENGTH if far > 1 else 0
    windows = data[: len(data) // size * size].view(-1, size)[: batches * BATCH]
    losses = []
    for rows in windows.split(16 * BATCH if prefixes else BATCH):
        logits = predict(model, rows[:, :-1], prefixes)[:, start:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), rows[:, start + 1 :].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def beats(variant: str, other: str = "causal") -> tuple[Any, ...]:
    """Lower with the same data and seed, on average and for each seed."""

    def test(numbers: Numbers) -> Verdict:
        values(numbers, variant, "loss"), values(numbers, other, "loss")
        apart = paired(numbers, variant, other, "loss")
        return bool(apart) and max(apart) < 0, f"{variant} − {other}, by seed: {', '.join(f'{d:+.4f}' for d in apart)}"

    return (test,)


def retains(numbers: Numbers) -> Verdict:
    found = [values(numbers, v, "loss") for v in ("mhe", "causal, 1 narrow head, no rotary", "causal, no rotary")]
    mhe, single, multi = map(mean, found)
    if multi >= single:
        return False, f"several heads ({multi:.4f}) are no better than one ({single:.4f}) here"
    kept = (single - mhe) / (single - multi)
    return kept >= 0.5, f"of what heads gain over one narrow head {kept:.0%} is kept, wanted 50%"


def at_most(variant: str, other: str, **allowance: float) -> tuple[Any, ...]:
    return (lower(variant, other, "loss", **allowance),)


A, N = "deconstructed_attention approximate", "deconstructed_attention non_approximate"
CLAIMS = (
    Claim("adaptive_filter_attention", "lower loss than rotary attention", beats("adaptive_filter_attention")),
    Claim("cog_attention", "lower loss than softmax, here in all blocks", beats("cog_attention")),
    Claim(
        "deconstructed_attention", "standard < approximate < non-approximate in loss, if all blocks have it",
        (lower("causal", A, "loss"), lower(A, N, "loss")),
    ),
    Claim(
        "deconstructed_attention", "with every other block standard, non-approximate is within 3% of standard",
        at_most("deconstructed_attention non_approximate, causal in turn", "causal", factor=1.03),
    ),
    Claim("gemma2", "a window in every other block costs next to nothing (0.01 nats)",
          at_most("gemma2", "causal", plus=0.01)),
    Claim("multi_token_attention", "lower loss than softmax attention", beats("multi_token_attention")),
    Claim("neural_attention", "lower loss than dot products at equal weights", beats("neural_attention")),
    Claim("rcmha", "lower loss than multi-head attention", beats("rcmha")),
    Claim("dual_attention", "lower loss than multi-head attention", beats("dual_attention")),
    Claim("knocking_heads", "mixing heads' values lowers loss", beats("knocking_heads")),
    Claim("knocking_heads", "the linear kind lowers it, too", beats("knocking_heads linear")),
    Claim("fixed_head_size", "many narrow heads lose: 32 heads of 4 against 4 of 32",
          beats("causal", "causal, 32 heads")),
    Claim("fixed_head_size", "8 heads of 32 beat 8 of 16", beats("fixed_head_size, 8 heads of 32", "causal, 8 heads")),
    Claim("diffqkv", "cutting key heads to a quarter hurts less than value heads",
          beats("diffqkv, 1 key head", "diffqkv, 1 value head")),
    Claim("mixture_of_attention_heads", "4 heads chosen of 16 beat 4 of 4 at equal work",
          beats("mixture_of_attention_heads 4 of 16", "mixture_of_attention_heads 4 of 4")),
    Claim("moh", "75% of the heads are as good as all (0.01 nats)",
          at_most("moh, 6 of 8 heads", "causal, 8 heads", plus=0.01)),
    Claim("moh", "50% are, too", at_most("moh, 4 of 8 heads", "causal, 8 heads", plus=0.01)),
    Claim("mhe", "embeddings of heads keep at least half of what several heads gain", (retains,)),
    Claim("sparse_query_attention", "half the query heads cost less than 0.02 nats against 2 key heads",
          at_most("sparse_query_attention", "causal, 2 key heads", plus=0.02)),
    Claim("compressed_convolutional_attention", "lower loss than grouped heads with an equal cache",
          beats("compressed_convolutional_attention", "causal, 2 key heads")),
    Claim("super_attention", "at least as good as standard attention without rotary positions",
          at_most("super_attention", "causal, no rotary")),
    Claim("super_attention", "optimised attention is about as good (0.01 nats)",
          at_most("super_attention optimised", "causal, no rotary", plus=0.01)),
    Claim("minimal_attention", "one matrix in place of four costs less than 0.02 nats",
          at_most("minimal_attention", "causal, no rotary", plus=0.02)),
    Claim("combiner", "lower loss than the same blocks without spans",
          beats("combiner", "combiner's blocks without spans")),
    Claim("dynamic_mask_attention", "a quarter of the keys, chosen, have lower loss than the last ones",
          beats("dynamic_mask_attention", "sliding_window of 32")),
    Claim("moba", "a quarter of the blocks cost less than 0.02 nats", at_most("moba", "causal", plus=0.02)),
    Claim("mosa", "ten sparse heads for two dense ones have lower loss at equal work, choosing from the past alone",
          beats("mosa, 10 heads for 2 dense ones")),
    Claim("ssa", "sparse attention is 0.05 nats better than sparse use of a model trained with full attention",
          at_most("ssa, sparse", "causal, judged as ssa is", plus=-0.05)),
    Claim("ssa", "and within 0.02 nats of its own full mode", at_most("ssa, sparse", "ssa, full", plus=0.02)),
)  # fmt: skip

EXPERIMENT = Experiment(
    name="tiny_lm",
    about=f"Language model over bytes: {BLOCKS} blocks of width {DIM}, {LENGTH} bytes of context, trained on "
    f"{BATCH * LENGTH} bytes a step of Python's and torch's documentation; loss in nats a byte on text held out.",
    metric="loss", better="low", variants=tuple(variants()), baseline="causal", run=run, steps=STEPS, claims=CLAIMS,
)  # fmt: skip
