"""The rank of one head's scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.core import Claim, Experiment, above, below, build, count, fit
from manyheads.core.maps import attention_map


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    wanted = (2 * torch.randn(16, 16, device=device)).log_softmax(-1)
    layer = build("fixed_head_size", 16, 1, head_dim=int(variant), mechanism="full", rope_theta=None).to(device)
    x, inner = torch.eye(16, device=device), layer.attention

    def divergence(_: int) -> Tensor:
        found = attention_map(inner.q(x)[None, None], inner.k(x)[None, None], int(variant) ** -0.5)[0, 0].log()
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    seconds = fit(layer, divergence, steps, lr=2e-2)
    with torch.no_grad():
        return {"kl": divergence(0).item(), "parameters": count([inner.q, inner.k]), "seconds_per_step": seconds}


EXPERIMENT = Experiment(
    name="rank",
    about="Fit a random attention map of 16 tokens with one head: its divergence by the head's width.",
    metric="kl",
    better="low",
    variants=("2", "4", "8", "12", "16"),
    baseline="16",
    run=run,
    steps=3000,
    claims=(
        Claim(
            "fixed_head_size",
            "a head as wide as the text is long can have any map, a narrow one cannot",
            (above("4", "kl", 0.05), below("16", "kl", 1e-4)),
        ),
    ),
    on="cpu",
)
