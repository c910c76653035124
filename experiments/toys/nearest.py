"""The nearest number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, below, build
from experiments.toys.common import Last, cross_entropy, judged, learn, right


def nearest_number(batch: int) -> tuple[Tensor, Tensor]:
    """Eight of 16 numbers from -1 to 1, each with a letter; the last token asks for that of the nearest to its own."""
    x = torch.rand(batch, 16).argsort(1)[:, :8] / 7.5 - 1
    letters, at = torch.randint(8, (batch, 8)), torch.randint(8, (batch, 1))
    asked = x.gather(1, at) + (torch.rand(batch, 1) - 0.5) * 0.6 / 7.5
    tokens = torch.cat([x[..., None], F.one_hot(letters, 8), torch.zeros(batch, 8, 1)], -1)
    query = torch.cat([asked, torch.zeros(batch, 8), torch.ones(batch, 1)], -1)[:, None]
    return torch.cat([tokens, query], 1), letters.gather(1, at)[:, 0]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    own = {"width": 16} if variant == "neural_attention" else {}
    model = Last(nn.Sequential(build(variant, 10, 1, head_dim=16, bias=True, rope_theta=None, **own), nn.Linear(10, 8)))
    numbers = learn(model, nearest_number, cross_entropy, seed, device, steps, lr=1e-2)
    return {"accuracy": judged(model, nearest_number, right, device), **numbers}


EXPERIMENT = Experiment(
    name="nearest",
    about="The letter of the number nearest to the query's, numbers being fed in as they are.",
    metric="accuracy",
    better="high",
    variants=("causal", "neural_attention"),
    baseline="causal",
    run=run,
    steps=2000,
    claims=(
        Claim(
            "neural_attention",
            "a network finds the nearest (> 95%), one product cannot (< 70%)",
            (above("neural_attention", "accuracy", 0.95), below("causal", "accuracy", 0.7)),
        ),
    ),
    on="cpu",
)
