"""What the toy tasks share: training on fresh samples, scores of fresh samples, and parts of models."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import Block, Missing, Numbers, Verdict, count, fit, values

Sample = Callable[[int], tuple[Any, Tensor]]
IGNORED = -100  # by cross entropy
EAGER = {"engine": "eager"}  # so few tokens are not worth compiling for


def learn(
    model: nn.Module, sample: Sample, loss: Callable[[Tensor, Tensor], Tensor], seed: int, device: str, steps: int,
    *, lr: float = 2e-3, batch: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """Train on fresh samples, made on the CPU as `sample(batch)`."""
    model.to(device)

    def step(_: int) -> Tensor:
        x, y = moved(sample(batch), device)
        return loss(model(x), y)

    seconds = fit(model, step, steps, lr=lr)
    torch.manual_seed(10**6 + seed)
    return {"parameters": count(model), "seconds_per_step": seconds}


def moved(pair: tuple[Any, Tensor], device: str) -> tuple[Any, Tensor]:
    x, y = pair
    return tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device), y.to(device)


@torch.no_grad()
def judged(
    model: nn.Module, sample: Sample, score: Callable[[Tensor, Tensor], Tensor], device: str, *, parts: int = 1
) -> float:
    """The mean score of 2048 fresh samples, in so many parts where all at once would not fit."""
    scores = []
    for _ in range(parts):
        x, y = moved(sample(2048 // parts), device)
        scores.append(score(model(x), y).float().mean().item())
    return mean(scores)


def right(logits: Tensor, y: Tensor) -> Tensor:
    return logits.argmax(-1) == y


def answered(logits: Tensor, y: Tensor) -> Tensor:
    """What is right of all that is asked for, in one row."""
    return right(logits, y)[y != IGNORED]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def squares(found: Tensor, y: Tensor) -> Tensor:
    return (found - y).square()


def square(found: Tensor, y: Tensor) -> Tensor:
    return squares(found, y).mean()


def stack(entry: nn.Module, attentions: list[nn.Module], dim: int, ff: int, out: int, *, norm: bool = True):
    return nn.Sequential(entry, *(Block(dim, one, ff, norm=norm) for one in attentions), nn.Linear(dim, out))


class Facts(nn.Module):
    """Tokens that are a word and a value, [batch, len, 2], the embeddings of both added."""

    def __init__(self, words: int, values: int, dim: int):
        super().__init__()
        self.word, self.value = nn.Embedding(words, dim), nn.Embedding(values, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word(tokens[..., 0]) + self.value(tokens[..., 1])


class Last(nn.Module):
    """What a model says of the last token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, -1]


def above_less(variant: str, other: str, allowance: float) -> Callable[[Numbers], Verdict]:
    """The mean accuracy is above the other variant's, less an allowance. Raises Missing if that is not above 90%, as
    nothing then was learned that could be compared."""

    def test(numbers: Numbers) -> Verdict:
        found, theirs = (mean(values(numbers, v, "accuracy")) for v in (variant, other))
        if theirs < 0.9:
            raise Missing(f"{other} learned the task to {theirs:.4g} only")
        return found > theirs - allowance, f"{variant}: {found:.4g}, wanted above {other}: {theirs:.4g} − {allowance:g}"

    return test


def width(mixers: list[nn.Module], dim: int) -> int:
    """Of the perceptrons that makes blocks with these mixers as large as ones with attention and 4 times as wide."""
    return max(8, round((len(mixers) * 12 * dim * dim - count(mixers)) / (len(mixers) * 2 * dim)))
