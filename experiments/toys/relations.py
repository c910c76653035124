"""Same or different?"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, Numbers, Verdict, build, values
from experiments.toys.common import Last, cross_entropy, judged, learn, right, stack


def same(batch: int) -> tuple[Tensor, Tensor]:
    """Two things, each 16 numbers, and a third token that asks if they are the same."""
    first, other, y = torch.randn(batch, 16), torch.randn(batch, 16), torch.rand(batch) < 0.5
    pair = torch.stack([first, torch.where(y[:, None], first, other), torch.zeros_like(first)], 1)
    return pair + 0.1 * torch.randn_like(pair), y.long()


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    name, samples = variant.rsplit(" ", 1)
    if name == "dual_attention":
        heads = [build(name, 32, 2, relational=1, symbols="position", library=3, symmetric=True) for _ in range(2)]
    else:
        heads = [build(name, 32, 2) for _ in range(2)]
    # The dual layers have 1 more matrix of half a square; the perceptrons of the others make up for it.
    model = Last(stack(nn.Linear(16, 32), heads, 32, 64 if name == "dual_attention" else 72, 2))
    x, y = same(int(samples))

    def few(batch: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(x), (batch,))
        return x[at], y[at]

    numbers = learn(model, few, cross_entropy, seed, device, steps, batch=64)
    return {"accuracy": judged(model, same, right, device), **numbers}


SAMPLES = (250, 500, 1000, 2000, 4000)


def half_the_samples(numbers: Numbers) -> Verdict:
    needed = {}
    for name in ("dual_attention", "causal"):
        enough = [n for n in SAMPLES if mean(values(numbers, f"{name} {n}", "accuracy")) >= 0.95]
        needed[name] = enough[0] if enough else 2 * SAMPLES[-1]  # or more: at least this many
    told = [f"{name} reaches 95% with {'none tried' if n > SAMPLES[-1] else n}" for name, n in needed.items()]
    return needed["dual_attention"] <= SAMPLES[-1] and 2 * needed["dual_attention"] <= needed["causal"], ", ".join(told)


EXPERIMENT = Experiment(
    name="relations",
    about="Are two noisy things the same? Trained on so many samples, tested on others.",
    metric="accuracy",
    better="high",
    variants=tuple(f"{name} {n}" for n in SAMPLES for name in ("causal", "dual_attention")),
    baseline="causal 4000",
    run=run,
    steps=800,
    claims=(Claim("dual_attention", "95% with at most half the samples", (half_the_samples,)),),
    on="cpu",
)
