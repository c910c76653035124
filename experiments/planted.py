"""Queries and keys with a pattern planted in their attention map: what a choice of keys can be expected to find."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.kept import Dense

HEADS, DIM = 4, 128
SCORE = 10.0  # of a planted pair; others have scores around 0
PLANTED = 4  # columns, diagonals, blocks or keys, for each query as far as it has a past


def stripes(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every query looks at the same few keys."""
    keys, shown = _codes(n, draw), _codes(1, draw)
    for h in range(HEADS):
        keys[h, torch.randperm(n // 8, generator=draw)[:PLANTED]] = shown[h]  # early, so that most queries see them
    return shown.expand(-1, n, -1), keys


def diagonals(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every query looks at the keys at a few distances before it."""
    keys, queries = _codes(n, draw), torch.zeros(HEADS, n, DIM)
    for h in range(HEADS):
        for distance in torch.randperm(n // 2, generator=draw)[:PLANTED].tolist():
            queries[h, distance:] += keys[h, : n - distance]
    return queries, keys


def blocks(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every block of queries looks at a few past blocks of keys. There are 64 blocks."""
    size = -(-n // 64)
    codes, queries = _codes(64, draw), torch.zeros(HEADS, 64, DIM)
    for h in range(HEADS):
        for m in range(1, 64):
            queries[h, m] = codes[h, torch.randperm(m, generator=draw)[:PLANTED]].sum(0)
    return tuple(x.repeat_interleave(size, 1)[:, :n] for x in (queries, codes))  # pyright: ignore[reportReturnType]


def scattered(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every query looks at a few past keys of its own, anywhere."""
    keys, queries = _codes(n, draw), torch.zeros(HEADS, n, DIM)
    for h in range(HEADS):
        for i in range(1, n):
            queries[h, i] = keys[h, torch.randint(i, (PLANTED,), generator=draw).unique()].sum(0)
    return queries, keys


PATTERNS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    made.__name__: made for made in (stripes, diagonals, blocks, scattered)
}


def planted(name: str, n: int, device: str = "cpu") -> Dense:
    """A pattern in heads that were drawn one by one, in float32."""
    draw = torch.Generator().manual_seed(0)
    q, k = PATTERNS[name](n, draw)
    v = torch.randn(HEADS, n, DIM, generator=draw)
    return Dense(*(x[None].to(device) for x in (q * SCORE * DIM**0.5, k, v)))


def _codes(n: int, draw: torch.Generator) -> Tensor:
    """Directions that are nearly orthogonal, [heads, n, dim]."""
    return F.normalize(torch.randn(HEADS, n, DIM, generator=draw), dim=-1)
