"""What a signal was a thousand steps ago, by state spaces that start with waves or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, build, lower
from experiments.toys.common import judged, learn, square, stack

LAG, HELD, DIM = 1000, 100, 32
LENGTH = 2 * LAG


def signals(batch: int) -> tuple[Tensor, Tensor]:
    """A signal of +1 and -1 that may change every HELD steps [batch, LENGTH, 1], and what it was LAG steps before each
    step of the second half [batch, LAG, 1]. Where it may change differs from signal to signal."""
    runs = 2 * torch.randint(2, (batch, LENGTH // HELD + 1)) - 1.0
    at = torch.arange(LENGTH) + torch.randint(HELD, (batch, 1))
    x = runs.gather(1, at // HELD)[..., None]
    return x, x[:, :LAG]


class Second(nn.Module):
    """What a model says in the second half."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, LAG:]


def agrees(found: Tensor, y: Tensor) -> Tensor:
    return found.sign() == y


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Second(stack(nn.Linear(1, DIM), [build("s4d", DIM, 1, start=variant)], DIM, 2 * DIM, 1))
    numbers = learn(model, signals, square, seed, device, steps, lr=5e-3, batch=16)
    return {"accuracy": judged(model, signals, agrees, device, parts=16), **numbers}


EXPERIMENT = Experiment(
    name="long_lag",
    about=f"What a signal of +1 and -1, which may change every {HELD} steps, was {LAG} steps ago; one layer. A guess "
    "is right in half of all cases.",
    metric="accuracy",
    better="high",
    variants=("legs", "inv", "lin", "real"),
    baseline="real",
    run=run,
    steps=500,
    claims=tuple(
        Claim(
            "s4d",
            f'start "{start}" is 20 points more accurate than "real", without waves',
            (lower("real", start, "accuracy", plus=-0.2),),
        )
        for start in ("lin", "inv", "legs")
    ),
)
