"""Recall and long copies by one model: attention and a state side by side, in turn, or either alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import SLOW, Claim, Experiment, above, build, lower
from experiments.hybrids import side_by_side
from experiments.toys import recall
from experiments.toys.common import EAGER, IGNORED, answered, cross_entropy, judged, learn, stack, width
from manyheads.core import Form

COPIED, DIM, HEADS = 40, 64, 4
LENGTH, START, SYMBOLS = 2 * COPIED, 48, 16  # START is a token; what is copied are the values of recall
Setting = tuple[str | Form, dict[str, Any]]
KIMI: Setting = ("kimi_delta_attention", {"rope_theta": None, **SLOW})
NEAR: Setting = ("sliding_window", {"window": 16, "sinks": 0, **EAGER})
VARIANTS: dict[str, tuple[Setting, ...]] = {  # in turn
    "hymba": (("hymba", {"expand": 1, "meta": 4}),),
    "hymba, window of 16": (("hymba", {"expand": 1, "meta": 4, "window": 16}),),
    "causal": (("causal", {}),),
    "mamba": (("audio_mamba", {"variant": "fo-fo"}),),
    "kimi": (KIMI,),
    "kimi, then causal without rotary": (KIMI, ("causal", {"rope_theta": None})),
    "window of 16": (NEAR,),
    "kimi, then a window of 16": (KIMI, NEAR),
    "kimi beside a window of 16": ((side_by_side(16), {"rope_theta": None, **SLOW}),),
}


def copies(batch: int) -> tuple[Tensor, Tensor]:
    """A text, START, and the text again: what comes next is asked from START on."""
    text = torch.randint(SYMBOLS, 2 * SYMBOLS, (batch, COPIED))
    tokens = torch.cat([text, torch.full((batch, 1), START), text[:, :-1]], 1)
    return tokens, torch.cat([torch.full_like(text, IGNORED), text - SYMBOLS], 1)


def recalls(batch: int) -> tuple[Tensor, Tensor]:
    """Behind noise, keys and values, noise, and the keys again with their values, each of which is asked for."""
    tokens, found = recall.pairs(batch)
    wanted = torch.full((batch, LENGTH), IGNORED)
    ahead = LENGTH - tokens.shape[1]
    wanted[:, ahead + 48 :: 2] = found
    return torch.cat([torch.randint(32, 48, (batch, ahead)), tokens], 1), wanted


def both(batch: int) -> tuple[Tensor, Tensor]:
    tokens, wanted = zip(copies(batch // 2), recalls(batch // 2), strict=True)
    return torch.cat(tokens), torch.cat(wanted)


def mixers_of(variant: str) -> list[nn.Module]:
    every = VARIANTS[variant]
    return [build(name, DIM, HEADS, **settings) for name, settings in (every[0], every[-1])]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mixers = mixers_of(variant)
    model = stack(nn.Embedding(START + 1, DIM), mixers, DIM, width(mixers, DIM), SYMBOLS)
    numbers = learn(model, both, cross_entropy, seed, device, steps, lr=2e-3, batch=64)
    copied, recalled = (judged(model, sample, answered, device, parts=8) for sample in (copies, recalls))
    return {"accuracy": (copied + recalled) / 2, "copied": copied, "recalled": recalled, **numbers}


def as_good(variant: str, other: str) -> Any:
    """Not more than a point below."""
    return lower(other, variant, "accuracy", plus=0.01)


EXPERIMENT = Experiment(
    name="copying",
    about=f"One model is to copy {COPIED} tokens and to recall eight values by their keys; two layers of equal size. "
    "The accuracy is the mean of the two.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="causal",
    run=run,
    steps=1500,
    claims=(
        Claim(
            "hymba",
            "attention and a state in parallel are as good as either alone, or better (1 point)",
            (above("hymba", "accuracy", 0.5), as_good("hymba", "causal"), as_good("hymba", "mamba")),
        ),
        Claim(
            "hymba",
            "with a window of 16, they are better than a state alone by 5 points",
            (lower("mamba", "hymba, window of 16", "accuracy", plus=-0.05),),
        ),
        Claim(
            "hymba",
            "a window of 16 beside Kimi delta attention is better than either alone",
            tuple(lower(alone, "kimi beside a window of 16", "accuracy") for alone in ("kimi", "window of 16")),
        ),
        Claim(
            "kimi_delta_attention",
            "a layer of it before one of attention without rotary positions is as good as attention (1 point)",
            (as_good("kimi, then causal without rotary", "causal"),),
        ),
    ),
)
