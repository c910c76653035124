"""Recall over a distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, below, build
from experiments.toys.common import EAGER, above_less, cross_entropy, judged, learn, right, stack


def pairs(batch: int) -> tuple[Tensor, Tensor]:
    """Eight keys and values, 32 tokens of noise, and the keys again in another order."""
    keys, found = torch.rand(batch, 16).argsort(1)[:, :8], torch.randint(16, 32, (batch, 8))
    again = torch.rand(batch, 8).argsort(1)
    first = torch.stack([keys, found], -1).flatten(1)
    wanted = found.gather(1, again)
    last = torch.stack([keys.gather(1, again), wanted], -1).flatten(1)
    return torch.cat([first, torch.randint(32, 48, (batch, 32)), last], 1), wanted - 16


class Every(nn.Module):
    """What a model says where the last keys stand."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, 48::2]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    turns = {"all global": (1, 1, 1), "local and global": (0, 1, 0), "all local": (0, 0, 0)}[variant]
    heads = [build("gemma2", 64, 2, layer=turn, window=8, **EAGER) for turn in turns]
    model = Every(stack(nn.Embedding(48, 64), heads, 64, 128, 16))
    numbers = learn(model, pairs, cross_entropy, seed, device, steps, batch=128)
    return {"accuracy": judged(model, pairs, right, device), **numbers}


EXPERIMENT = Experiment(
    name="recall",
    about="Eight keys and values, 32 tokens of noise, then the keys again; windows of 8 tokens, three layers.",
    metric="accuracy",
    better="high",
    variants=("all global", "local and global", "all local"),
    baseline="all global",
    run=run,
    steps=1500,
    claims=(
        Claim(
            "gemma2",
            "windows in turn recall within a point of all global; windows alone fail",
            (above_less("local and global", "all global", 0.01), below("all local", "accuracy", 0.5)),
        ),
    ),
)
