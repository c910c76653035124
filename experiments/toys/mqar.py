"""Recall of many facts by many questions (MQAR): what a state of a given size holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import SLOW, Claim, Experiment, above, build, lower
from experiments.toys.common import IGNORED, Facts, answered, cross_entropy, judged, learn, stack, width
from manyheads.core import Form, Operand, Recurrence

LENGTH, FACTS, WORDS, NOISE, NOTHING, DIM, HEADS = 192, 64, 128, 16, 16, 64, 2
STATE = DIM // HEADS  # channels of keys and of values
# Gated linear attention (Yang et al. 2023, arXiv:2312.06635): it forgets channel by channel, and has no slots.
GATED_LINEAR = Recurrence(operands={"g": Operand("batch heads len head_dim", lambda x: F.logsigmoid(x) / 16)})


def titans(**memory: Any) -> nn.Module:
    return build("titans", DIM, HEADS, variant="lmm", chunk=32, largest=0.03, **memory)


def linear(name: str | Form, **settings: Any) -> nn.Module:
    return build(name, DIM, HEADS, rope_theta=None, **settings)


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "causal": lambda: linear("causal"),
    "lightning_attention_2": lambda: linear("lightning_attention_2"),
    "gated linear attention": lambda: linear(GATED_LINEAR),
    "gated_slot_attention": lambda: linear("gated_slot_attention", slots=STATE // 2),
    "mamba2": lambda: build("mamba2", DIM, HEADS, expand=1, head_dim=STATE, state_dim=STATE),
    "gated delta rule": lambda: linear("deltaproduct", products=1, gated=True, negative=False, **SLOW),
    "deltaproduct": lambda: linear("deltaproduct"),
    "kimi_delta_attention": lambda: linear("kimi_delta_attention", **SLOW),
    "titans, linear memory": lambda: titans(memory_heads=1, depth=1),
    "titans, memory of two layers": lambda: titans(memory_heads=2, depth=2, widen=1),
}


def texts(batch: int) -> tuple[Tensor, Tensor]:
    """A fact is one token, a word with a value, in the first half; all words stand again, alone, in the second half."""
    at = torch.cat([LENGTH // 2 * n + torch.rand(batch, LENGTH // 2).argsort(1)[:, :FACTS] for n in (0, 1)], 1)
    word = torch.randint(WORDS, WORDS + NOISE, (batch, LENGTH))
    value, wanted = torch.full_like(word, NOTHING), torch.full_like(word, IGNORED)
    words, values = torch.rand(batch, WORDS).argsort(1)[:, :FACTS], torch.randint(NOTHING, (batch, FACTS))
    word.scatter_(1, at, torch.cat([words, words], 1))
    value.scatter_(1, at[:, :FACTS], values)
    return torch.stack([word, value], -1), wanted.scatter_(1, at[:, FACTS:], values)


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mixers = [VARIANTS[variant]() for _ in range(2)]
    model = stack(Facts(WORDS + NOISE, NOTHING + 1, DIM), mixers, DIM, width(mixers, DIM), NOTHING)
    numbers = learn(model, texts, cross_entropy, seed, device, steps, lr=3e-3, batch=128)
    return {"accuracy": judged(model, texts, answered, device, parts=16), **numbers}


def more(variant: str, other: str, **allowance: float) -> Any:
    """By a model that has learned something: twice as much as a guess."""
    return above(variant, "accuracy", 2 / NOTHING), lower(other, variant, "accuracy", **allowance)


EXPERIMENT = Experiment(
    name="mqar",
    about=f"{FACTS} words with values among {LENGTH} tokens, and all words again, each asking for its value; two "
    f"layers of {HEADS} heads, whose states are {STATE} times {STATE} numbers. Those of gated slot attention are as "
    f"large ({STATE // 2} slots), those of titans are {DIM} times {DIM} in a layer. Equal numbers of weights.",
    metric="accuracy",
    better="high",
    variants=tuple(VARIANTS),
    baseline="causal",
    run=run,
    steps=600,
    claims=(
        Claim("kimi_delta_attention", "decays of channels recall as much as decays of heads, or more (1 point)",
              more("kimi_delta_attention", "gated delta rule", plus=0.01)),
        Claim("gated_slot_attention", "slots recall more than gated linear attention with a state of the same size",
              more("gated_slot_attention", "gated linear attention")),
        Claim("titans", "a memory of two layers recalls more than a linear one of the same size",
              more("titans, memory of two layers", "titans, linear memory")),
        Claim("deltaproduct", "writes that correct recall 10 points more than ones that add up",
              more("deltaproduct", "lightning_attention_2", plus=-0.1)),
    ),
)  # fmt: skip
