"""Words of a group, each prefix of which is to be multiplied out: parity, and permutations of three things."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, below, build
from experiments.toys.common import cross_entropy, judged, learn, right, stack

TRAINED, TESTED, DIM, HEADS, BATCH = 128, 512, 64, 2, 64
THINGS = {"parity": 2, "S3": 3}
WRITES = {  # products of reflections or, with strengths up to 1, of projections
    "1 write": {"products": 1},
    "1 write up to 1": {"products": 1, "negative": False},
    "2 writes": {"products": 2},
    "2 writes up to 1": {"products": 2, "negative": False},
}


def table(things: int) -> Tensor:
    """The product of each two permutations, all of them numbered: [n, n]."""
    all_of = list(permutations(range(things)))
    return torch.tensor([[all_of.index(tuple(a[i] for i in b)) for b in all_of] for a in all_of])


def words(products: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A token for the start, and random elements behind it [batch, length + 1]; the product of each prefix."""
    elements = torch.randint(len(products), (batch, length))
    start, prefix, found = torch.full((batch, 1), len(products)), elements[:, 0], [elements[:, 0]]
    for n in range(1, length):
        prefix = products[prefix, elements[:, n]]
        found.append(prefix)
    return torch.cat([start, elements], 1), torch.stack(found, 1)


class Behind(nn.Module):
    """What a model says behind the token for the start."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, 1:]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    group, writes = variant.split(", ")
    products, step = table(THINGS[group]), iter(range(steps))

    def growing(batch: int) -> tuple[Tensor, Tensor]:
        """Words of 4 to 128 tokens in the first third of the training, and of 128 in the others."""
        return words(products, batch, min(TRAINED, 4 * 2 ** (18 * next(step) // steps)))

    mixer = build("deltaproduct", DIM, HEADS, rope_theta=None, **WRITES[writes])
    model = Behind(stack(nn.Embedding(len(products) + 1, DIM), [mixer], DIM, DIM, len(products)))
    numbers = learn(model, growing, cross_entropy, seed, device, steps, lr=5e-3, batch=BATCH)

    def accuracy(start: int, end: int) -> float:
        def score(logits: Tensor, y: Tensor) -> Tensor:
            return right(logits, y)[:, start:end]

        return judged(model, lambda batch: words(products, batch, end), score, device, parts=32)

    return {"accuracy": accuracy(TESTED // 2, TESTED), "accuracy_trained": accuracy(0, TRAINED), **numbers}


def fails(variant: str) -> Any:
    return below(variant, "accuracy", 0.75)


EXPERIMENT = Experiment(
    name="state_tracking",
    about="The product of each prefix of a word of a group: parity, or S3, the permutations of three things. One "
    f"layer, trained on words of up to {TRAINED} tokens, judged in the second half of {TESTED}.",
    metric="accuracy",
    better="high",
    variants=tuple(f"{group}, {writes}" for group in THINGS for writes in WRITES),
    baseline="S3, 1 write",
    run=run,
    steps=1200,
    claims=(
        Claim(
            "deltaproduct",
            "two writes with negative eigenvalues track S3 (99%); one write, or strengths up to 1, do not (75%)",
            (
                above("S3, 2 writes", "accuracy", 0.99),
                *map(fails, ("S3, 1 write", "S3, 1 write up to 1", "S3, 2 writes up to 1")),
            ),
        ),
        Claim(
            "deltaproduct",
            "one write with a negative eigenvalue tracks parity (99%); strengths up to 1 do not (75%)",
            (
                above("parity, 1 write", "accuracy", 0.99),
                *map(fails, ("parity, 1 write up to 1", "parity, 2 writes up to 1")),
            ),
        ),
    ),
)
