"""Palindromes: a text is to be said backwards, each letter from the one behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, build, lower
from experiments.toys import mqar
from experiments.toys.common import IGNORED, above_less, answered, cross_entropy, judged, learn, stack, width
from experiments.toys.mqar import DIM, HEADS, STATE

TEXT, LETTERS = 64, 128
MEMORIES = ("lightning_attention_2", "gated linear attention", "mamba2", "gated delta rule", "kimi_delta_attention")
HYBRID = "kimi_delta_attention, then causal without rotary"


def mixers_of(variant: str) -> list[nn.Module]:
    """Two layers; the memories are those of `mqar`."""
    if variant == "causal":
        return [build("causal", DIM, HEADS) for _ in range(2)]
    first, last = ("kimi_delta_attention", "causal") if variant == HYBRID else (variant, variant)
    return [mqar.VARIANTS[name]() for name in (first, last)]


def palindromes(batch: int) -> tuple[Tensor, Tensor]:
    """Letters, no two alike, a mark, and the letters backwards, each of which is asked for when it comes next."""
    text = torch.rand(batch, LETTERS).argsort(1)[:, :TEXT]
    back = text.flip(1)
    tokens = torch.cat([text, torch.full((batch, 1), LETTERS), back[:, :-1]], 1)
    return tokens, torch.cat([torch.full_like(text, IGNORED), back], 1)


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mixers = mixers_of(variant)
    model = stack(nn.Embedding(LETTERS + 1, DIM), mixers, DIM, width(mixers, DIM), LETTERS)
    numbers = learn(model, palindromes, cross_entropy, seed, device, steps, lr=3e-3, batch=128)
    return {"accuracy": judged(model, palindromes, answered, device, parts=16), **numbers}


EXPERIMENT = Experiment(
    name="palindrome",
    about=f"{TEXT} letters, no two alike, and the same backwards; two layers of {HEADS} heads, whose states are "
    f"{STATE} times {STATE} numbers. Equal numbers of weights.",
    metric="accuracy",
    better="high",
    variants=("causal", *MEMORIES, HYBRID),
    baseline="causal",
    run=run,
    steps=800,
    claims=(
        Claim(
            "kimi_delta_attention",
            "decays of channels say palindromes as well as decays of heads, or better (1 point)",
            (
                above("kimi_delta_attention", "accuracy", 0.1),
                lower("gated delta rule", "kimi_delta_attention", "accuracy", plus=0.01),
            ),
        ),
        Claim(
            "kimi_delta_attention",
            "and better than Mamba-2 by 10 points",
            (lower("mamba2", "kimi_delta_attention", "accuracy", plus=-0.1),),
        ),
        Claim(
            "kimi_delta_attention",
            "a layer of it before one of attention without rotary positions is as good as attention (1 point)",
            (above_less(HYBRID, "causal", 0.01),),
        ),
    ),
)
