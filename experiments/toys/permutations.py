"""Permutations of five things, multiplied out: a state has to be turned in four dimensions."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import SLOW, Block, Claim, Experiment, above, below, build
from experiments.toys.common import cross_entropy, judged, learn, right, width
from experiments.toys.state_tracking import table, words

THINGS, TRAINED, TESTED, DIM, HEADS, BATCH = 5, 128, 256, 128, 4, 256
ALL = torch.tensor(list(permutations(range(THINGS))))
TABLE = table(THINGS)


def delta(writes: int, **settings: Any) -> tuple[str, dict[str, Any]]:
    """Strengths reach to 2, and eigenvalues to -1, if nothing is said."""
    fade = SLOW if settings.get("gated") else {}
    return "deltaproduct", {"products": writes, "rope_theta": None, **settings, **fade}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 writes": delta(4),
    "3 writes": delta(3),
    "2 writes": delta(2),
    "1 write": delta(1),
    "4 writes up to 1": delta(4, negative=False),
    "1 write up to 1": delta(1, negative=False),
    "4 writes, gated": delta(4, gated=True),
    "1 write, gated": delta(1, gated=True),
    "1 write up to 1, gated": delta(1, gated=True, negative=False),
    "kimi_delta_attention": ("kimi_delta_attention", {"rope_theta": None, **SLOW}),
    "causal": ("causal", {}),
}


class Model(nn.Module):
    """What one block says, behind the token for the start, of each place: [batch, len, places, things]."""

    def __init__(self, block: nn.Module):
        super().__init__()
        out = nn.Linear(DIM, THINGS * THINGS)
        self.model = nn.Sequential(nn.Embedding(len(ALL) + 1, DIM), block, nn.RMSNorm(DIM), out)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, 1:].unflatten(-1, (THINGS, THINGS))


def products(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Words [batch, length + 1], as in `state_tracking`; what each prefix brings to each place [batch, length, 5]."""
    tokens, prefixes = words(TABLE, batch, length)
    return tokens, ALL[prefixes]


def block(variant: str) -> Block:
    name, settings = VARIANTS[variant]
    mixer = build(name, DIM, HEADS, **settings)
    return Block(DIM, mixer, width([mixer], DIM))


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, step = Model(block(variant)), iter(range(steps))

    def growing(batch: int) -> tuple[Tensor, Tensor]:
        """Words of 2, 4, ... 64 elements in the first two thirds of the training, and of 128 in the last."""
        return products(batch, min(TRAINED, 2 ** (1 + 9 * next(step) // steps)))

    numbers = learn(model, growing, cross_entropy, seed, device, steps, lr=5e-3, batch=BATCH)

    def accuracy(start: int, end: int) -> float:
        def score(logits: Tensor, y: Tensor) -> Tensor:
            return right(logits, y).all(-1)[:, start:end]

        return judged(model, lambda batch: products(batch, end), score, device, parts=32)

    halves = {"accuracy": (TRAINED // 2, TRAINED), "accuracy_longer": (TESTED // 2, TESTED)}
    return {name: accuracy(*half) for name, half in halves.items()} | numbers


def fail(*variants: str) -> tuple[Any, ...]:
    return tuple(below(variant, "accuracy", 0.75) for variant in variants)


EXPERIMENT = Experiment(
    name="permutations",
    about="The product of each prefix of a word of S5, the 120 permutations of five things. One layer of equal size, "
    f"trained on words of up to {TRAINED} elements, judged in the second half of them, and of words twice as long. "
    "Right is a product with all five in their places.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="1 write up to 1",
    run=run,
    steps=1500,
    claims=(
        Claim(
            "deltaproduct",
            "four writes with negative eigenvalues track S5 (99%); one, two, or strengths up to 1, do not (75%)",
            (above("4 writes", "accuracy", 0.99), *fail("1 write", "2 writes", "1 write up to 1", "4 writes up to 1")),
        ),
        Claim("deltaproduct", "nor do three (75%)", fail("3 writes")),
        Claim(
            "deltaproduct",
            "four writes do so in words twice as long as those of the training (90%)",
            (above("4 writes", "accuracy_longer", 0.9),),
        ),
        Claim("deltaproduct", "and with a gate (99%)", (above("4 writes, gated", "accuracy", 0.99),)),
        Claim(
            "deltaproduct",
            "what writes once, with a gate or without, or attends, does not (75%)",
            fail("1 write, gated", "1 write up to 1, gated", "kimi_delta_attention", "causal"),
        ),
    ),
    also=("accuracy_longer",),
)
