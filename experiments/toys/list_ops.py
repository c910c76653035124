"""Nested lists of digits under MIN, MAX and SUM, to be worked out: which digit belongs to which list is local."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.core import Claim, Experiment, build, lower
from experiments.toys.common import Last, cross_entropy, judged, learn, right, stack

MIN, MAX, SUM, END, BLANK = range(10, 15)  # behind the ten digits
LISTS, DIGITS, DIM = 4, 4, 64
LENGTH = 2 + LISTS * (2 + DIGITS)
VARIANTS = ("chela", "chela without convolutions", "mega", "causal")


def values(ops: Tensor, digits: Tensor, there: Tensor) -> Tensor:
    """What each list [..., digits] comes to, of the digits that are there; sums are modulo 10."""
    least, most = digits.masked_fill(~there, 9).amin(-1), digits.masked_fill(~there, 0).amax(-1)
    total = (digits * there).sum(-1) % 10
    return torch.where(ops == MIN, least, torch.where(ops == MAX, most, total))


def lists(batch: int) -> tuple[Tensor, Tensor]:
    """[op [op d d d] d [op d d] ...] at the end of [batch, LENGTH] tokens, and what it comes to. Each of the LISTS
    members is a digit in one of four cases, and else a list of 2 to DIGITS of them."""
    ops, digits = torch.randint(MIN, END, (batch, LISTS)), torch.randint(10, (batch, LISTS, DIGITS))
    single = torch.rand(batch, LISTS) < 0.25
    many = torch.randint(2, DIGITS + 1, (batch, LISTS)).masked_fill(single, 1)
    there = torch.arange(DIGITS) < many[..., None]
    outer = torch.randint(MIN, END, (batch,))
    inner = torch.cat(
        [
            ops.masked_fill(single, BLANK)[..., None],
            torch.where(there, digits, BLANK),
            torch.full_like(ops, END).masked_fill(single, BLANK)[..., None],
        ],
        -1,
    ).flatten(1)
    tokens = torch.cat([outer[:, None], inner, torch.full_like(outer, END)[:, None]], 1)
    order = (tokens != BLANK).long().argsort(dim=1, stable=True)  # blanks go to the front
    members = values(ops, digits, there)
    return tokens.gather(1, order), values(outer, members, torch.ones_like(members, dtype=torch.bool))


class Placed(nn.Module):
    """Embeddings of tokens and of places."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(BLANK + 1, DIM), nn.Embedding(LENGTH, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.place.weight


def mixer(variant: str) -> nn.Module:
    if variant in ("mega", "causal"):
        return build(variant, DIM, 2, **({"shared": 32, "values": DIM} if variant == "mega" else {}))
    module: Any = build("chela", DIM, 2, long=LENGTH)
    if variant == "chela without convolutions":
        with torch.no_grad():
            for taps, own in ((module.short, -1), (module.branch, 0), (module.long, 0)):
                taps.requires_grad_(False).zero_()
                taps[:, own] = 0.0 if taps is module.branch else 1.0
    return module


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Last(stack(Placed(), [mixer(variant) for _ in range(2)], DIM, 2 * DIM, 10))
    numbers = learn(model, lists, cross_entropy, seed, device, steps, lr=2e-3, batch=128)
    return {"accuracy": judged(model, lists, right, device, parts=4), **numbers}


EXPERIMENT = Experiment(
    name="list_ops",
    about=f"The value of a list of {LISTS} digits or lists of up to {DIGITS} digits, each list under its minimum, "
    "maximum or sum modulo 10; two layers, learned places.",
    metric="accuracy",
    better="high",
    variants=VARIANTS,
    baseline="causal",
    run=run,
    steps=1500,
    claims=(
        Claim(
            "chela",
            "its convolutions tell linear attention which digits are together: 5 points more than without",
            (lower("chela without convolutions", "chela", "accuracy", plus=-0.05),),
        ),
    ),
)
