"""A flag at the start of a text, to be known at its end, chunks of attention later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, below, build
from experiments.toys.common import IGNORED, above_less, cross_entropy, judged, learn, right, stack

LENGTH, CHUNK, FLAGS, NOISE, DIM = 64, 16, 8, 32, 64
VARIANTS = {"mega": None, "mega in chunks": CHUNK, "mega in chunks without averages": CHUNK}


def texts(batch: int) -> tuple[Tensor, Tensor]:
    """Noise, with a flag in the first chunk, and the flag for all places from there on."""
    flag, at = torch.randint(FLAGS, (batch, 1)), torch.randint(CHUNK, (batch, 1))
    noise = torch.randint(FLAGS, FLAGS + NOISE, (batch, LENGTH))
    return noise.scatter(1, at, flag), torch.where(torch.arange(LENGTH) < at, IGNORED, flag)


def without_averages(module: Any) -> nn.Module:
    """Its moving average reads nothing, and is not trained."""
    for parameter in module.average.parameters():
        parameter.requires_grad_(False)
    nn.init.zeros_(module.average.eta)
    return module


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mixers = [build("mega", DIM, 1, shared=32, values=DIM, chunk=VARIANTS[variant]) for _ in range(2)]
    if "without" in variant:
        mixers = [without_averages(mixer) for mixer in mixers]
    model = stack(nn.Embedding(FLAGS + NOISE, DIM), mixers, DIM, 2 * DIM, FLAGS)
    numbers = learn(model, texts, cross_entropy, seed, device, steps, lr=1e-2, batch=64)
    return {"accuracy": judged(model, texts, lambda logits, y: right(logits, y)[:, -1], device, parts=4), **numbers}


EXPERIMENT = Experiment(
    name="long_flag",
    about=f"One of {FLAGS} flags in the first {CHUNK} of {LENGTH} tokens, the others noise; the flag is to be said "
    f"from there on, and judged at the end. Two layers. Attention in chunks sees {CHUNK} tokens at the most.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="mega",
    run=run,
    steps=600,
    claims=(
        Claim(
            "mega",
            "in chunks, the moving average brings what is longer ago than a chunk (95% of full attention); without it "
            "there is chance",
            (
                above_less("mega in chunks", "mega", 0.05),
                below("mega in chunks without averages", "accuracy", 0.25),
            ),
        ),
    ),
)
