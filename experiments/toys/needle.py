"""Facts far back in a text, asked for at its end, with a quarter of the keys in sight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Block, Claim, Experiment, above, below, build, count, fit, lower
from experiments.tiny_lm import WEIGHTS, Variant, of
from experiments.toys.common import EAGER, Facts, above_less, cross_entropy, judged, moved, right
from manyheads.layers.sparse.ssa import draw_mode

LENGTH, BLOCK, FACTS, DIM, HEADS, BATCH = 256, 8, 8, 128, 4, 32
WORDS, NOISE, LANDMARK, NOTHING = 64, 32, 96, 16  # words to ask for, noise after them; 16 values and none
SECTION = 16  # tokens up to a landmark
KEYS, EIGHTH = LENGTH // 4, LENGTH // 8
STRIPES = {"block_size": BLOCK, "local_blocks": 2, "stride": 4, **EAGER}
QUARTER = {"block_size": BLOCK, "top_k": KEYS // BLOCK, **EAGER}
MEANS = {"block_size": BLOCK, "window": BLOCK, "top_k": KEYS // BLOCK - 1, "init_blocks": 0, "dense_len": 0, **EAGER}
VARIANTS = {
    "causal": of("causal"),
    "sliding_window": of("sliding_window", window=KEYS, sinks=0, **EAGER),
    "s2_attention": of("s2_attention", **STRIPES),
    "s2_attention, the same stripes in all heads": of("s2_attention", group=HEADS, **STRIPES),
    "moba": of("moba", **QUARTER),
    "infllm_v2": of("infllm_v2", kernel=BLOCK // 2, stride=BLOCK // 4, **MEANS),
    "dynamic_mask_attention": of("dynamic_mask_attention", window=KEYS),
    "landmark_attention": Variant(
        "landmark_attention", {"block_size": SECTION},
        judged=of("landmark_attention", block_size=SECTION, top_k=KEYS // SECTION - 1),
    ),
    "mosa": of("mosa", sparsity=4, head_dim=DIM // HEADS),
    "routing_attention": of("routing_attention", local_heads=0, clusters=4, window=KEYS),
    "ssa": of("ssa", **QUARTER),
    "causal, judged as ssa is": Variant("causal", judged=of("infllm_v2", kernel=BLOCK, stride=BLOCK, **MEANS)),
}  # fmt: skip


def places(batch: int, start: int, end: int) -> Tensor:
    """Places for the facts, or for questions about them, none of them a landmark's: [batch, FACTS]."""
    free = torch.tensor([i for i in range(start, end) if i % SECTION != SECTION - 1])
    return free[torch.rand(batch, len(free)).argsort(1)[:, :FACTS]]


def texts(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tokens, each a word and a value [batch, LENGTH, 2], where the questions are, and the values that they ask for.

    A fact is one token, a word with a value, in the first three eighths. Each one's word stands again in the next two,
    where a window still sees some facts and what is to be learned can be, and in the last, where two windows see none.
    """
    word = torch.randint(WORDS, WORDS + NOISE, (batch, LENGTH))
    word[:, SECTION - 1 :: SECTION] = LANDMARK
    value = torch.full_like(word, NOTHING)
    words, wanted = torch.rand(batch, WORDS).argsort(1)[:, :FACTS], torch.randint(NOTHING, (batch, FACTS))
    facts = places(batch, 0, 3 * EIGHTH)
    word.scatter_(1, facts, words)
    value.scatter_(1, facts, wanted)
    asked, answers = [], []
    for start, end in ((3 * EIGHTH, 5 * EIGHTH), (7 * EIGHTH, LENGTH)):
        again = torch.rand(batch, FACTS).argsort(1)
        asked.append(places(batch, start, end))
        answers.append(wanted.gather(1, again))
        word.scatter_(1, asked[-1], words.gather(1, again))
    return (torch.stack([word, value], -1), torch.cat(asked, 1)), torch.cat(answers, 1)


class Reader(nn.Module):
    """What a model says where the questions stand."""

    def __init__(self, variant: Variant):
        super().__init__()
        self.entry = Facts(LANDMARK + 1, NOTHING + 1, DIM)
        attentions = [build(variant.name, DIM, HEADS, **variant.settings) for _ in range(2)]
        self.blocks = nn.ModuleList(Block(DIM, one, 2 * DIM) for one in attentions)
        self.out = nn.Linear(DIM, NOTHING)

    def forward(self, text: tuple[Tensor, Tensor], losses: list[Tensor] | None = None) -> Tensor:
        """Logits [batch, questions, values]; the layers' own losses are added to the list."""
        x, at = self.entry(text[0]), text[1]
        for block in self.blocks:
            if losses is not None:
                losses += [WEIGHTS[name] * value for name, value in block.losses(x).items()]
            x = block(x)
        return self.out(x.gather(1, at[..., None].expand(-1, -1, DIM)))


def run(name: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    model = Reader(variant).to(device)

    def loss(_: int) -> Tensor:
        draw_mode(model)
        text, wanted = moved(texts(BATCH), device)
        extra: list[Tensor] = []
        return cross_entropy(model(text, extra), wanted) + sum(extra)

    seconds = fit(model, loss, steps, lr=2e-3)
    reader = Reader(variant.judged or variant).to(device).eval()
    reader.load_state_dict(model.state_dict())
    torch.manual_seed(10**6 + seed)
    accuracy = judged(reader, texts, lambda logits, y: right(logits, y)[:, FACTS:], device, parts=32)
    return {"accuracy": accuracy, "parameters": count(model), "seconds_per_step": seconds}


def found(variant: str) -> tuple[Any, ...]:
    """Within a point of causal attention, where a window of as many keys fails."""
    return (above_less(variant, "causal", 0.01), below("sliding_window", "accuracy", 0.5))


EXPERIMENT = Experiment(
    name="needle",
    about=f"{FACTS} facts in the first three eighths of {LENGTH} tokens, asked for in the last one, and for practice "
    "in the next two; two layers. A query, a head or a cluster has a quarter of the keys; causal attention has all.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="causal",
    run=run,
    steps=500,
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
        Claim("mosa", "heads that choose a quarter of the tokens recall 20 points more than a window of as many",
              (lower("sliding_window", "mosa", "accuracy", plus=-0.2),)),
        Claim("routing_attention", "clusters of a quarter of the tokens recall 20 points more than a window of as many",
              (lower("sliding_window", "routing_attention", "accuracy", plus=-0.2),)),
        Claim("ssa", "a quarter of the blocks recall within a point of all", found("ssa")),
        Claim("ssa", "a quarter of the blocks recall more than in sparse use of a model trained with full attention",
              (lower("causal, judged as ssa is", "ssa", "accuracy"),)),
    ),
)  # fmt: skip
