"""What an experiment is, what a claim is, and the model and training loop that the experiments share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from manyheads import Attention, layers, names
from manyheads.core import Form, Recurrence

Numbers = Mapping[str, Mapping[int, Mapping[str, float]]]  # of a variant, of a seed, by name
Verdict = tuple[bool, str]

SLOW = {"fade": -4.0}  # for gates that are softplus: decays of 0.98 at first, not of a half, which nothing survives


class Missing(LookupError):
    """A claim is about a run that has no result, or none that says anything."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, in our words, and the tests that decide it: it holds if each of them does.

    about: the mechanism or layer. tests: functions of an experiment's numbers that give a verdict and its numbers.
    """

    about: str
    words: str
    tests: tuple[Callable[[Numbers], Verdict], ...]

    def verdict(self, numbers: Numbers) -> Verdict:
        verdicts = [test(numbers) for test in self.tests]
        return all(right for right, _ in verdicts), "; ".join(text for _, text in verdicts)


@dataclass(frozen=True)
class Experiment:
    """Variants of one training run that differ in one thing.

    run: (variant, seed, device, steps) -> numbers by name, `metric` and `also` among them. steps: what a variant is
    trained for. better: "low" or "high". on: "cpu" if the run is so small that a GPU would only be in the way. also:
    what else claims are about.
    """

    name: str
    about: str
    metric: str
    better: str
    variants: tuple[str, ...]
    baseline: str
    run: Callable[[str, int, str, int], dict[str, Any]]
    steps: int
    claims: tuple[Claim, ...] = ()
    on: str = ""
    also: tuple[str, ...] = ()


def values(numbers: Numbers, variant: str, metric: str) -> list[float]:
    """A variant's numbers, a seed after the other. Raises Missing if there are none."""
    found = [of_seed[metric] for _, of_seed in sorted(numbers.get(variant, {}).items())]
    if not found:
        raise Missing(f"no result for {variant}")
    return found


def shown(found: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(found):.4g}" + (f" ± {stdev(found):.2g}" if len(found) > 1 else "")


def below(variant: str, metric: str, bound: float) -> Callable[[Numbers], Verdict]:
    """The mean over the seeds is below a number."""

    def test(numbers: Numbers) -> Verdict:
        found = values(numbers, variant, metric)
        return mean(found) < bound, f"{variant}: {shown(found)}, wanted < {bound:g}"

    return test


def above(variant: str, metric: str, bound: float) -> Callable[[Numbers], Verdict]:
    """The mean over the seeds is above a number."""

    def test(numbers: Numbers) -> Verdict:
        found = values(numbers, variant, metric)
        return mean(found) > bound, f"{variant}: {shown(found)}, wanted > {bound:g}"

    return test


def lower(
    variant: str, other: str, metric: str, *, factor: float = 1.0, plus: float = 0.0
) -> Callable[[Numbers], Verdict]:
    """The mean is below factor times the other variant's, and `plus`."""

    def test(numbers: Numbers) -> Verdict:
        found, theirs = values(numbers, variant, metric), values(numbers, other, metric)
        bound = factor * mean(theirs) + plus
        allowance = (f" × {factor:g}" if factor != 1 else "") + (f" + {plus:g}" if plus else "")
        return mean(found) < bound, f"{variant}: {shown(found)}, wanted below {other}: {shown(theirs)}{allowance}"

    return test


def paired(numbers: Numbers, variant: str, other: str, metric: str) -> list[float]:
    """Differences variant - other, of the seeds that both have."""
    ours, theirs = numbers.get(variant, {}), numbers.get(other, {})
    return [ours[seed][metric] - theirs[seed][metric] for seed in sorted(ours) if seed in theirs]


class Mixer(Attention):
    """Attention; a recurrence without a normaliser has an RMS norm of what each head gives, as in its paper's layer.
    fade: what is added at first to what log decays are made of."""

    def __init__(self, *sizes: Any, fade: float = 0.0, **settings: Any):
        super().__init__(*sizes, **settings)
        if fade:
            source: Any = self.operands["g"]
            nn.init.constant_(source.weight.bias, fade)
        bare = isinstance(self.form, Recurrence) and self.form.normaliser == "none"
        self.norm = nn.RMSNorm(self.head_dim) if bare else nn.Identity()

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        return self.o(self.norm(self.attend(x, present=present)).transpose(1, 2).flatten(2))


def build(name: str | Form, dim: int, heads: int, /, **settings: Any) -> nn.Module:
    """A mechanism in `Mixer`, by name or as a form, or a layer, by name."""
    if isinstance(name, Form) or name in names():
        return Mixer(dim, heads, name, **settings)
    found = layers.get(name)
    known = {"dim": dim, "heads": heads}
    return found(**{k: v for k, v in known.items() if k in found.required or k in found.settings}, **settings)


class Block(nn.Module):
    """Attention and a perceptron, each with a norm before it and a residual around it; `ff` 0 is no perceptron."""

    def __init__(self, dim: int, attention: nn.Module, ff: int, *, norm: bool = True):
        super().__init__()
        self.attention = attention
        self.before, self.between = (nn.RMSNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.ff = nn.Sequential(nn.Linear(dim, ff), nn.GELU(), nn.Linear(ff, dim)) if ff else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x if self.ff is None else x + self.ff(self.between(x))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """What the attention adds to a training loss, for the block's input x."""
        return self.attention.losses(self.before(x)) if hasattr(self.attention, "losses") else {}


def fit(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, *, lr: float, decay: float = 0.0, warmup: int = 50
) -> float:
    """Train with AdamW, a warm-up and a cosine down to a tenth; `loss` takes the step. Returns seconds a step, the
    first tenth of them not counted. Raises ArithmeticError if the loss is not a number at the end."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    cuda = parameters[0].is_cuda
    if cuda:
        to_kernels(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=cuda)
    start, last = time.perf_counter(), torch.zeros(())
    for step in range(steps):
        if step == steps // 10:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        share = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.zero_grad()
        last = loss(step)
        last.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    if not torch.isfinite(last):
        raise ArithmeticError(f"the loss is {last.item()} after {steps} steps")
    model.eval()
    return (time.perf_counter() - start) / max(1, steps - steps // 10)


def to_kernels(model: nn.Module) -> None:
    """Recurrences whose decays or strengths are computed from tokens are slow in plain torch; the kernels for them have
    to be asked for by name."""
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.form, Recurrence) and module.form.operands:
            module.engine = "triton"


def count(model: nn.Module | Iterable[nn.Module]) -> int:
    """How many numbers are trained."""
    modules = [model] if isinstance(model, nn.Module) else model
    return sum(p.numel() for module in modules for p in module.parameters())
