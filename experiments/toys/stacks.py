"""Stacks: what was put on one last comes off first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.core import Claim, Experiment, above, lower
from experiments.toys.common import IGNORED, Facts, answered, cross_entropy, judged, learn, stack, width
from experiments.toys.mqar import DIM, HEADS, STATE
from experiments.toys.palindrome import HYBRID, MEMORIES, mixers_of

STACKS, LENGTH, VALUES = 16, 128, 16  # VALUES stands for none: something is taken off


def stacks(batch: int) -> tuple[Tensor, Tensor]:
    """A token is a stack with a value that is put on it, or with none: what comes off is asked for then. Half of the
    tokens take off, if there is something."""
    which, values = torch.randint(STACKS, (batch, LENGTH)), torch.randint(VALUES, (batch, LENGTH))
    put, wanted = torch.rand(batch, LENGTH) < 0.5, torch.full((batch, LENGTH), IGNORED)
    held, heights = torch.zeros(batch, STACKS, LENGTH, dtype=torch.long), torch.zeros(batch, STACKS, dtype=torch.long)
    row = torch.arange(batch)
    for t in range(LENGTH):
        at = which[:, t]
        height = heights[row, at]
        put[:, t] |= height == 0
        on = put[:, t]
        wanted[~on, t] = held[row, at, height - 1][~on]
        held[row[on], at[on], height[on]] = values[on, t]
        heights[row, at] = torch.where(on, height + 1, height - 1)
    return torch.stack([which, values.where(put, torch.tensor(VALUES))], -1), wanted


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mixers = mixers_of(variant)
    model = stack(Facts(STACKS, VALUES + 1, DIM), mixers, DIM, width(mixers, DIM), VALUES)
    numbers = learn(model, stacks, cross_entropy, seed, device, steps, lr=3e-3, batch=128)
    return {"accuracy": judged(model, stacks, answered, device, parts=16), **numbers}


EXPERIMENT = Experiment(
    name="stacks",
    about=f"{STACKS} stacks: {LENGTH} times a value is put on one of them or comes off, and is to be said then; two "
    f"layers of {HEADS} heads, whose states are {STATE} times {STATE} numbers. Equal numbers of weights.",
    metric="accuracy",
    better="high",
    variants=("causal", *MEMORIES, HYBRID),
    baseline="causal",
    run=run,
    steps=1000,
    claims=(
        Claim(
            "kimi_delta_attention",
            "decays of channels keep stacks as well as decays of heads, or better (1 point)",
            (
                above("kimi_delta_attention", "accuracy", 2 / VALUES),
                lower("gated delta rule", "kimi_delta_attention", "accuracy", plus=0.01),
            ),
        ),
        Claim(
            "kimi_delta_attention",
            "and better than Mamba-2 by 10 points",
            (lower("mamba2", "kimi_delta_attention", "accuracy", plus=-0.1),),
        ),
    ),
)
