"""Algorithms over positions, with larger numbers than in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, build, lower
from experiments.toys.common import learn, moved, square, stack


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    name, task = variant.split(", ")
    settings = {"max_len": 8} if name == "positional_attention" else {"rope_theta": None}
    heads = [build(name, 64, 2, **settings) for _ in range(3)]
    ff = 128 if name == "full" else 184  # for as many weights
    model = stack(nn.Linear(9, 64), heads, 64, ff, 1, norm=False)  # a norm would hide how large the numbers are

    def sample(batch: int, largest: float = 2.0) -> tuple[Tensor, Tensor]:
        x = largest * (2 * torch.rand(batch, 8) - 1)
        y = x.cumsum(1) if task == "sum" else x.cummin(1).values
        return torch.cat([x[..., None], torch.eye(8).expand(batch, 8, 8)], -1), y[..., None]

    numbers = learn(model, sample, square, seed, device, steps, lr=1e-3)
    errors = {}
    for factor in (1, 3, 10):
        x, y = moved(sample(4096, 2.0 * factor), device)
        with torch.no_grad():
            errors[f"error_x{factor}"] = ((model(x) - y).abs() / y.abs().clamp(min=1e-3)).median().item()
    return {**errors, **numbers}


EXPERIMENT = Experiment(
    name="algorithm",
    about="Running sum and minimum of 8 numbers in [-2, 2], tested on numbers ten times as large.",
    metric="error_x10",
    better="low",
    variants=tuple(f"{name}, {task}" for task in ("sum", "minimum") for name in ("full", "positional_attention")),
    baseline="full, sum",
    run=run,
    steps=2000,
    claims=tuple(
        Claim(
            "positional_attention",
            f"{task}: a tenth of the relative error on numbers ten times as large",
            (lower(f"positional_attention, {task}", f"full, {task}", "error_x10", factor=0.1),),
        )
        for task in ("sum", "minimum")
    ),
    on="cpu",
)
