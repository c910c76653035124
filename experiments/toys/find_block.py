"""The block that has both letters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, below, build
from experiments.toys.common import cross_entropy, judged, learn, right, stack


def blocks(batch: int, number: int = 10, size: int = 5) -> tuple[Tensor, Tensor]:
    """Blocks of letters with a dot behind each, two letters asked for, and the letters of the block that has both."""
    letters = torch.rand(batch, number, 26).argsort(-1)[..., :size]
    at = torch.randint(number, (batch,))
    block = letters[torch.arange(batch), at]
    asked = block.gather(1, torch.rand(batch, size).argsort(1)[:, :2])
    text = F.pad(letters, (0, 1), value=26).flatten(1)
    tokens = torch.cat([text, torch.full((batch, 1), 27), asked, block[:, :-1]], 1)
    return tokens, block


class Places(nn.Module):
    """Tokens and learned positions, added."""

    def __init__(self, vocabulary: int, length: int, dim: int):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.place.weight[: tokens.shape[1]]


class Answer(nn.Module):
    """What a model says from the last of the letters asked for on."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, -self.size :]


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    own = {"c_q": 2, "c_k": 9, "c_h": 2} if variant == "multi_token_attention" else {}
    heads = [build(variant, 128, 2, **own) for _ in range(3)]
    model = Answer(stack(Places(28, 68, 128), heads, 128, 256, 26), 5)
    numbers = learn(model, blocks, cross_entropy, seed, device, steps, lr=1e-3, batch=128)
    wrong = judged(model, blocks, lambda logits, y: ~right(logits, y)[:, 0], device)
    return {"wrong": wrong, **numbers}


EXPERIMENT = Experiment(
    name="find_block",
    about="Ten blocks of five letters: which one has both letters that are asked for?",
    metric="wrong",
    better="low",
    variants=("causal", "multi_token_attention"),
    baseline="causal",
    run=run,
    steps=2000,
    claims=(
        Claim(
            "multi_token_attention",
            "finds the block (error below 2%) where softmax attention does not (30%)",
            (below("multi_token_attention", "wrong", 0.02), above("causal", "wrong", 0.3)),
        ),
    ),
)
