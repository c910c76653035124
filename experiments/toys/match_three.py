"""Three that add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, below, build
from experiments.toys.common import cross_entropy, judged, learn, right, stack


def threes(batch: int, modulus: int = 32) -> tuple[Tensor, Tensor]:
    """Eight angles; a token's answer is if it and two of them, which may be itself, make a whole turn."""
    x = torch.randint(modulus, (batch, 8))
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None]
    angle = 2 * torch.pi / modulus * x[..., None] * torch.arange(1, 17)
    return torch.cat([angle.cos(), angle.sin()], -1), (sums % modulus == 0).flatten(2).any(-1).long()


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    name, heads = variant.split(", ")
    one = build(name, 64, int(heads.split()[0]), rope_theta=None)
    model = stack(nn.Linear(32, 64), [one], 64, 128 if name == "full" else 64, 2)
    numbers = learn(model, threes, cross_entropy, seed, device, steps)
    return {"accuracy": judged(model, threes, right, device), **numbers}


EXPERIMENT = Experiment(
    name="match_three",
    about="Eight angles of 32: does a token make a whole turn with two of them? 68% do. The third version of the task: "
    "in the first two all, or softmax with 4 heads, did alike.",
    metric="accuracy",
    better="high",
    variants=("full, 1 head", "full, 4 heads", "tensor_attention, 1 head"),
    baseline="full, 1 head",
    run=run,
    steps=2000,
    claims=(
        Claim(
            "tensor_attention",
            "one layer finds threes (> 90%) that softmax attention does not (< 75%)",
            (
                above("tensor_attention, 1 head", "accuracy", 0.9),
                below("full, 1 head", "accuracy", 0.75),
                below("full, 4 heads", "accuracy", 0.75),
            ),
        ),
    ),
)
