"""One fact, handed on through the layers of a sparse pattern to where no single layer sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.core import Claim, Experiment, above, below, build
from experiments.toys.common import EAGER, IGNORED, Facts, above_less, cross_entropy, judged, learn, right, stack

LENGTH, BLOCK, LAYERS, BATCH = 256, 4, 4, 32
NOTHING = 16  # stands behind the values
WINDOW = 9  # blocks that power attention sees at the most: the last five, those 8, 16 and 32 back, and the first
VARIANTS = {
    "causal": ("causal", {}),
    "power_attention": ("power_attention", {"block_size": BLOCK, "window_blocks": 5, **EAGER}),
    "sliding_window": ("sliding_window", {"window": (WINDOW - 1) * BLOCK, "sinks": BLOCK, **EAGER}),
    "every seventh block": ("s2_attention", {"block_size": BLOCK, "local_blocks": 1, "stride": 7, "group": 2, **EAGER}),
}


def texts(batch: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Noise with one fact in a block from `first` to `last`, and the fact's value for all places after it."""
    at = torch.randint(first * BLOCK, last * BLOCK + BLOCK, (batch, 1))
    word = torch.randint(32, (batch, LENGTH)).scatter(1, at, 32)
    key, here = torch.randint(NOTHING, (batch, 1)), torch.arange(LENGTH)
    return torch.stack([word, torch.where(here == at, key, NOTHING)], -1), torch.where(here > at, key, IGNORED)


def training(batch: int) -> tuple[Tensor, Tensor]:
    return texts(batch, 1, LENGTH // BLOCK - 4)


def far(batch: int) -> tuple[Tensor, Tensor]:
    """In the first half, farther back than windows reach in all layers, but not in the block that all see."""
    return texts(batch, 4, LENGTH // BLOCK // 2 - 1)


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    name, settings = VARIANTS[variant]
    attentions = [build(name, 64, 2, **settings) for _ in range(LAYERS)]
    model = stack(Facts(33, NOTHING + 1, 64), attentions, 64, 128, NOTHING)
    numbers = learn(model, training, cross_entropy, seed, device, steps, lr=2e-3, batch=BATCH)
    accuracy = judged(model, far, lambda logits, y: right(logits, y)[:, -1], device, parts=32)
    return {"accuracy": accuracy, **numbers}


EXPERIMENT = Experiment(
    name="relay",
    about=f"One token to remember in {LENGTH} of noise, to be said at every place after it, and judged at the last one "
    f"with the token in the first half; {LAYERS} layers. Patterns see nine blocks of {LENGTH // BLOCK}, or ten.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="causal",
    run=run,
    steps=400,
    claims=(
        Claim(
            "power_attention",
            "blocks at powers of two hand it on to the end (95%); a window and a stride of as many keys do not (50%)",
            (
                above_less("power_attention", "causal", 0.05),
                above("power_attention", "accuracy", 0.95),
                below("sliding_window", "accuracy", 0.5),
                below("every seventh block", "accuracy", 0.5),
            ),
        ),
    ),
)
