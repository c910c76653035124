"""Filtering a noisy linear system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, build, lower
from experiments.toys.common import judged, learn, square, squares

TURN, DECAY, PROCESS, SEEN = 0.3, 0.05, 0.1, 0.5


def system(batch: int, steps: int = 64) -> tuple[Tensor, Tensor]:
    """What is seen of a damped rotation in the plane that noise keeps going, and what it really was."""
    move, state, states = motion(), torch.randn(batch, 2), []
    for _ in range(steps):
        state = state @ move.T + PROCESS * torch.randn(batch, 2)
        states.append(state)
    true = torch.stack(states, 1)
    return true + SEEN * torch.randn_like(true), true


def motion() -> Tensor:
    turn = torch.tensor(TURN)
    shrink = torch.exp(torch.tensor(-DECAY))
    return shrink * torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])


class Kalman(nn.Module):
    """The best that can be done, for one who knows the system: nothing to learn."""

    def forward(self, seen: Tensor) -> Tensor:
        move, state, variance, found = motion().to(seen), torch.zeros_like(seen[:, 0]), 1.0, []
        for y in seen.unbind(1):
            state, variance = state @ move.T, variance * float(torch.det(move)) + PROCESS**2
            gain = variance / (variance + SEEN**2)
            state, variance = state + gain * (y - state), (1 - gain) * variance
            found.append(state)
        return torch.stack(found, 1)


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    if variant == "Kalman filter":
        return {"mse": judged(Kalman(), system, squares, device), "parameters": 0, "seconds_per_step": 0.0}
    name, *noise = variant.split()
    head = build(name, 16, 1, **({"noise": noise[0]} if noise else {}))
    model = nn.Sequential(nn.Linear(2, 16, bias=False), head, nn.Linear(16, 2, bias=False))
    numbers = learn(model, system, square, seed, device, steps, lr=5e-3, batch=64)
    return {"mse": judged(model, system, squares, device), **numbers}


EXPERIMENT = Experiment(
    name="filtering",
    about="Where a noisy, damped rotation in the plane really is, from noisy sight of it: one head of 16.",
    metric="mse",
    better="low",
    variants=("causal", "adaptive_filter_attention student", "adaptive_filter_attention gaussian", "Kalman filter"),
    baseline="causal",
    run=run,
    steps=1000,
    claims=(
        Claim(
            "adaptive_filter_attention",
            "error below rotary attention's, within 10% of a Kalman filter's",
            (
                lower("adaptive_filter_attention student", "causal", "mse"),
                lower("adaptive_filter_attention student", "Kalman filter", "mse", factor=1.1),
            ),
        ),
    ),
    on="cpu",
)
