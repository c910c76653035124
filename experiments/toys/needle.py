"""Facts far back in a text, asked for at its end, with a quarter of the keys in sight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Block, Claim, Experiment, above, below, build, count, fit, lower
from experiments.toys.common import EAGER, above_less, cross_entropy, judged, moved, right
from manyheads.layers.sparse.ssa import draw_mode

LENGTH, BLOCK, FACTS, DIM, HEADS, BATCH = 512, 16, 8, 128, 4, 16
WORDS, NOISE, LANDMARK, NOTHING = 64, 32, 96, 16  # words to ask for, noise after them; 16 values and none
ALIGNMENT = 10 / 2  # SSA's weight of its loss, which is the mean of the two layers'


@dataclass(frozen=True)
class Variant:
    """A mechanism or layer and its settings; `judged`: those that differ when it answers. draws: train as SSA does."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    judged: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False


KEYS = LENGTH // 4
STRIPES = {"block_size": BLOCK, "local_blocks": 2, "stride": 4, **EAGER}
SSA = {"block_size": BLOCK, "top_k": KEYS // BLOCK, **EAGER}
MEANS = {"block_size": BLOCK, "kernel": BLOCK // 2, "stride": BLOCK // 4, "window": BLOCK, "init_blocks": 0}
VARIANTS = {
    "causal": Variant("causal"),
    "sliding_window": Variant("sliding_window", {"window": KEYS, "sinks": 0, **EAGER}),
    "s2_attention": Variant("s2_attention", STRIPES),
    "s2_attention, the same stripes in all heads": Variant("s2_attention", {**STRIPES, "group": HEADS}),
    "moba": Variant("moba", {"block_size": BLOCK, "top_k": KEYS // BLOCK, **EAGER}),
    "infllm_v2": Variant("infllm_v2", {**MEANS, "top_k": KEYS // BLOCK - 1, "dense_len": 0, **EAGER}),
    "dynamic_mask_attention": Variant("dynamic_mask_attention", {"window": KEYS, "kv_heads": 1}),
    "landmark_attention": Variant("landmark_attention", {"block_size": BLOCK}, {"top_k": KEYS // BLOCK - 1}),
    "mosa": Variant("mosa", {"sparsity": 4, "head_dim": DIM // HEADS}),
    "routing_attention": Variant("routing_attention", {"local_heads": 0, "clusters": 4, "window": KEYS, "decay": 0.99}),
    "ssa, sparse": Variant("ssa", SSA, draws=True),
    "ssa, full": Variant("ssa", SSA, {"mode": "full"}, draws=True),
    "ssa, trained full, sparse": Variant("ssa", {**SSA, "mode": "full"}, {"mode": "sparse"}),
}


def places(batch: int, start: int, end: int) -> Tensor:
    """Places for the facts, or for questions about them, none of them a landmark's: [batch, FACTS]."""
    free = torch.tensor([i for i in range(start, end) if i % BLOCK != BLOCK - 1])
    return free[torch.rand(batch, len(free)).argsort(1)[:, :FACTS]]


def texts(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tokens, each a word and a value [batch, LENGTH, 2], where the questions are, and the values that they ask for.

    A fact is one token, a word with a value, in the first quarter. Each one's word stands again in the second quarter,
    where windows still see facts, so that what has to be learned can be; and in the last eighth."""
    word = torch.randint(WORDS, WORDS + NOISE, (batch, LENGTH))
    word[:, BLOCK - 1 :: BLOCK] = LANDMARK
    value = torch.full_like(word, NOTHING)
    words, wanted = torch.rand(batch, WORDS).argsort(1)[:, :FACTS], torch.randint(NOTHING, (batch, FACTS))
    facts = places(batch, 0, LENGTH // 4)
    word.scatter_(1, facts, words)
    value.scatter_(1, facts, wanted)
    asked, answers = [], []
    for start, end in ((LENGTH // 4, LENGTH // 2), (LENGTH - LENGTH // 8, LENGTH)):
        again = torch.rand(batch, FACTS).argsort(1)
        asked.append(places(batch, start, end))
        answers.append(wanted.gather(1, again))
        word.scatter_(1, asked[-1], words.gather(1, again))
    return (torch.stack([word, value], -1), torch.cat(asked, 1)), torch.cat(answers, 1)


class Reader(nn.Module):
    """What a model says where the questions stand."""

    def __init__(self, name: str, settings: Mapping[str, Any]):
        super().__init__()
        self.word, self.value = nn.Embedding(LANDMARK + 1, DIM), nn.Embedding(NOTHING + 1, DIM)
        self.blocks = nn.ModuleList(Block(DIM, build(name, DIM, HEADS, **settings), 2 * DIM) for _ in range(2))
        self.out = nn.Linear(DIM, NOTHING)

    def forward(self, text: tuple[Tensor, Tensor], losses: list[Tensor] | None = None) -> Tensor:
        """Logits [batch, questions, values]; the layers' own losses are added to the list."""
        (word, value), at = text[0].unbind(-1), text[1]
        x = self.word(word) + self.value(value)
        for block in self.blocks:
            if losses is not None:
                losses += block.losses(x).values()
            x = block(x)
        return self.out(x.gather(1, at[..., None].expand(-1, -1, DIM)))


def run(name: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    model = Reader(variant.name, variant.settings).to(device)

    def loss(_: int) -> Tensor:
        if variant.draws:
            draw_mode(model)
        text, wanted = moved(texts(BATCH), device)
        extra: list[Tensor] | None = [] if variant.draws else None
        answer = cross_entropy(model(text, extra), wanted)
        return answer + ALIGNMENT * sum(extra or ())

    seconds = fit(model, loss, steps, lr=1e-3)
    reader = Reader(variant.name, {**variant.settings, **variant.judged}).to(device).eval()
    reader.load_state_dict(model.state_dict())
    torch.manual_seed(10**6 + seed)
    accuracy = judged(reader, texts, lambda logits, y: right(logits, y)[:, FACTS:], device, parts=64)
    return {"accuracy": accuracy, "parameters": count(model), "seconds_per_step": seconds}


def found(variant: str, allowance: float = 0.01) -> tuple[Any, ...]:
    """Within an allowance of causal attention, where a window of as many keys fails."""
    return (above_less(variant, "causal", allowance), below("sliding_window", "accuracy", 0.5))


EXPERIMENT = Experiment(
    name="needle",
    about=f"{FACTS} facts in the first quarter of {LENGTH} tokens, asked for in the last eighth (and, for practice, in "
    "the second quarter); two layers. Each query, head or cluster sees a quarter of the keys, but for causal attention.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="causal",
    run=run,
    steps=800,
    claims=(
        Claim("dynamic_mask_attention", "a quarter of the keys recall within a point of all, and more than a window of "
              "as many", found("dynamic_mask_attention")),
        Claim("s2_attention", "stripes of each head's own recall 20 points more than the same stripes in all heads",
              (lower("s2_attention, the same stripes in all heads", "s2_attention", "accuracy", plus=-0.2),)),
        Claim("moba", "a quarter of the blocks recall within a point of all", found("moba")),
        Claim("infllm_v2", "a quarter of the blocks recall within a point of all", found("infllm_v2")),
        Claim("landmark_attention", "trained on all blocks, and reading the quarter that landmarks choose, recalls "
              "95%, where a window fails", (above("landmark_attention", "accuracy", 0.95),
                                            below("sliding_window", "accuracy", 0.5))),
        Claim("mosa", "heads that choose a quarter of the tokens recall within a point of dense ones", found("mosa")),
        Claim("routing_attention", "clusters of a quarter of the tokens recall what a window of as many does not",
              (lower("sliding_window", "routing_attention", "accuracy", plus=-0.2),)),
        Claim("ssa", "trained in both modes, sparse attention recalls within two points of full",
              (above_less("ssa, sparse", "ssa, full", 0.02),)),
        Claim("ssa", "in sparse mode, it recalls more than the same model trained in full mode",
              (lower("ssa, trained full, sparse", "ssa, sparse", "accuracy"),)),
    ),
)  # fmt: skip
