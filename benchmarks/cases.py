"""What is timed: masks, scores and normalisers by name, at the shapes that people run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.forms import Operand, Scores

WINDOW, CAP, PREFIX, STRIDE = 1024, 50.0, 2048, 8
DOCUMENT = 3000  # tokens of a packed document, on average


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int


class Case(NamedTuple):
    """A form, its operands, and how many pairs of tokens count: those that the mask allows. dropout: a rate."""

    form: Scores
    operands: dict[str, Tensor]
    pairs: Callable[[int], float]
    dropout: float = 0.0


def causal_pairs(n: int) -> float:
    return n * (n + 1) / 2


def window_pairs(n: int) -> float:
    return causal_pairs(n) - (causal_pairs(n - WINDOW) if n > WINDOW else 0)


def documents(n: int) -> Tensor:
    """For each token the number of its document; lengths are drawn between half and one and a half of DOCUMENT."""
    lengths = torch.randint(DOCUMENT // 2, 3 * DOCUMENT // 2, (3 * n // DOCUMENT + 2,), generator=seed())
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:n].int()


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def case(name: str, heads: int, length: int, device: str = "cuda") -> Case:
    """A new case of one of NAMES: new functions each time, as a user's program would have."""
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)

    def causal(b, h, i, j):
        return j <= i

    def window(b, h, i, j):
        return (j <= i) & (i - j < WINDOW)

    def softcap(s, b, h, i, j):
        return CAP * torch.tanh(s / CAP)

    def alibi(s, b, h, i, j):
        return s + slopes[h] * (j - i)

    def plain(mask, score, pairs):
        return Case(Scores(mask=mask, score=score), {}, pairs)

    if name == "bias":
        table = torch.randn(heads, 2 * length - 1, generator=seed()).to(device)
        return plain(causal, lambda s, b, h, i, j: s + table[h, i - j + (length - 1)], causal_pairs)
    if name == "documents":
        of = documents(length)
        count = float((of.bincount().double() * (of.bincount() + 1) / 2).sum())
        of = of.to(device)
        return plain(lambda b, h, i, j: (of[i] == of[j]) & (j <= i), None, lambda n: count)
    if name == "sinks":
        form = Scores(mask=window, sink="sink", operands={"sink": Operand("heads")})
        return Case(form, {"sink": torch.randn(heads, generator=seed()).to(device)}, window_pairs)
    if name == "sigmoid":
        form = Scores(mask=causal, score=lambda s, b, h, i, j: torch.sigmoid(s - 9.0), normaliser="none")
        return Case(form, {}, causal_pairs)
    if name == "signed":
        return Case(Scores(mask=causal, normaliser="signed"), {}, causal_pairs)
    if name == "dropout":
        return plain(causal, None, causal_pairs)._replace(dropout=0.1)
    if name == "entmax":
        return Case(Scores(mask=causal, normaliser="entmax", alpha=1.5), {}, causal_pairs)
    if name == "top-k":
        return Case(Scores(mask=causal, normaliser="top_k", top_k=64), {}, causal_pairs)
    if name == "prefix":
        n_prefix = min(PREFIX, length)
        return plain(
            lambda b, h, i, j: (j <= i) | (j < n_prefix), None, lambda n: causal_pairs(n) + causal_pairs(n_prefix - 1)
        )
    if name == "dilation":
        return plain(
            lambda b, h, i, j: (j <= i) & (i - j < STRIDE * WINDOW) & ((i - j) % STRIDE == 0), None,
            lambda n: sum(min(i // STRIDE + 1, WINDOW) for i in range(n)),
        )  # fmt: skip
    return {
        "full": plain(None, None, lambda n: float(n) * n),
        "causal": plain(causal, None, causal_pairs),
        "window": plain(window, None, window_pairs),
        "softcap": plain(causal, softcap, causal_pairs),
        "alibi": plain(causal, alibi, causal_pairs),
        "window_softcap": plain(window, softcap, window_pairs),
        "window_alibi": plain(window, alibi, window_pairs),
    }[name]


NAMES = (
    "full", "causal", "window", "softcap", "alibi", "bias", "sinks", "sigmoid", "signed", "documents", "prefix",
    "dilation", "window_softcap", "window_alibi", "dropout", "entmax", "top-k",
)  # fmt: skip

K = 1024
# Sets of work, by name: (case, shape).
SETS: dict[str, list[tuple[str, Shape]]] = {
    "dense": [(c, Shape(16 * K // n, 16, 16, n, 128)) for c in ("full", "causal") for n in (4 * K, 16 * K)],
    "long": [(c, Shape(1, 16, 16, 64 * K, 128)) for c in ("full", "causal")],
    "functions": [(c, Shape(1, 16, 16, 16 * K, 128)) for c in NAMES[2:]],
    "narrow": [(c, Shape(16 * K // n, 16, 16, n, 64)) for c in ("full", "causal") for n in (4 * K, 16 * K)],
    "widths": [("causal", Shape(1, 16, 16, 8 * K, d)) for d in (72, 80, 96, 192, 256)],
    "grouped": [("causal", Shape(1, 32, 8, 16 * K, 128))],
    "small": [
        ("causal", Shape(1, 16, 16, 512, 128)), ("causal", Shape(64, 16, 16, 256, 64)),
        ("causal", Shape(1, 1, 1, 4 * K, 128)), ("full", Shape(1, 8, 8, 1000, 64)),
    ],
    "packed": [("documents", Shape(1, 16, 16, 128 * K, 128))],
}  # fmt: skip


def work(sets: list[str]) -> Iterator[tuple[str, Shape]]:
    for name in sets:
        yield from SETS[name]
