"""The largest of a set."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, lower
from experiments.toys.common import judged, learn
from manyheads.layers.dense.set_transformer import PMA, SetAttention


def sets(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One to ten numbers from 0 to 1, and which of the ten are there."""
    x = torch.rand(batch, 10)
    present = torch.arange(10) < torch.randint(1, 11, (batch, 1))
    return (x[..., None], present), x.masked_fill(~present, 0.0).amax(1, keepdim=True)


class SetModel(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, dim = kind, 64
        if kind == "deep sets, mean":
            self.each = nn.Sequential(*mlp(1, 128, 128, 128))
            self.whole = nn.Sequential(*mlp(128, 128, 1))
        else:
            self.into = nn.Linear(1, dim)
            self.among = SetAttention(dim, 4, points=16 if kind == "ISAB and PMA" else None, norm=False)
            self.pool, self.out = PMA(dim, 4, 1, norm=False), nn.Linear(dim, 1)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        x, present = given
        if self.kind == "deep sets, mean":
            mask = present[..., None].float()
            return self.whole((self.each(x) * mask).sum(1) / mask.sum(1))
        return self.out(self.pool(self.among(self.into(x), present=present), present=present)[:, 0])


def mlp(*sizes: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return parts[:-1]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = SetModel(variant)
    numbers = learn(model, sets, lambda found, y: (found - y).abs().mean(), seed, device, steps, lr=1e-3)
    return {"mae": judged(model, sets, lambda found, y: (found - y).abs(), device), **numbers}


EXPERIMENT = Experiment(
    name="largest",
    about="The largest of one to ten numbers in [0, 1]. Settled after seed 0 was seen at 2,000 steps: fewer, for time.",
    metric="mae",
    better="low",
    variants=("deep sets, mean", "SAB and PMA", "ISAB and PMA"),
    baseline="deep sets, mean",
    run=run,
    steps=1500,
    claims=(
        Claim(
            "set_transformer",
            "a fifth of the error of a mean over the members",
            (lower("SAB and PMA", "deep sets, mean", "mae", factor=0.2),),
        ),
    ),
    on="cpu",
)
