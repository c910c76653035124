"""Dropout of attention weights. Which ones go is a hash of where they stand, so that no mask is ever stored.

    p'_ij = p_ij keep_ij / (1 - rate),    keep_ij = hash(seed, b, h, i, j) >= 2^32 rate

p are the weights after the normaliser, and the lse is that of p. i and j are absolute positions: the same tokens go
whatever the engine, its tiles, or how queries and keys are split, forward and backward.

Srivastava et al. "Dropout: A Simple Way to Prevent Neural Networks from Overfitting." JMLR 15, 2014. On attention
weights: Vaswani et al. "Attention Is All You Need." 2017. arXiv:1706.03762.

The hash is on 32 bits and short, as kernels take it for every pair. Seed, batch row and head make the two words of a
key, by two rounds of a Feistel network, which is one to one. The first word is mixed with the query's position;
that and the key's position pass one round more together, into which the second word goes. Shifts and factors of a round
are from a search for such with little bias, https://github.com/skeeto/hash-prospector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # 32 bits, which int64 holds and products leave: factors below 2^31 keep them in 63
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # factors of the two rounds
QUERY, KEY, START = 0x2C1B3C6D, 0x297A2D39, 0x5BD1E995
ROW, HEAD = 0x9E3779B97F, 0xD1B54A32D1  # row b of a batch is the first one of seed + ROW b: see `of_row`


@dataclass(frozen=True, eq=False)
class Dropout:
    """0 < rate < 1; seed int64 [1], on the device of what is dropped."""

    rate: float
    seed: Tensor

    @property
    def threshold(self) -> int:
        """Weights whose hash is below it go."""
        return min(round(self.rate * 2**32), WORD)

    @property
    def inflation(self) -> float:
        """What those that stay are multiplied with, 1 / (1 - rate), of the rate that the threshold stands for."""
        return 1 / (1 - self.threshold / 2**32)

    def of_row(self, b: int) -> Dropout:
        """That of row b, for a batch of this row alone."""
        return replace(self, seed=self.seed + b * ROW)

    def drop(self, weights: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """weights [batch, heads, rows, columns] of queries at i [batch | 1, 1, rows, 1] and keys at j [batch | 1, 1, 1,
        columns], after dropout."""
        batch, heads = (torch.arange(n, device=weights.device) for n in weights.shape[:2])
        keep = hashed(self.seed, batch.view(-1, 1, 1, 1), heads.view(1, -1, 1, 1), i, j) >= self.threshold
        return torch.where(keep, weights, 0.0) * self.inflation


def hashed(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """A number from 0 to 2^32 - 1 for each pair, int64: batch row, head, positions of query and key."""
    both = seed + b * ROW + h * HEAD
    low, high = both & WORD, (both >> 32) & WORD
    high = high ^ _mixed(low + START & WORD)
    low = low ^ _mixed(high + START & WORD)
    x = _folded(i * QUERY + low & WORD) ^ _folded(j * KEY & WORD)
    x = x * FIRST + high & WORD
    return (x ^ x >> 15) * SECOND & WORD


def _folded(x: Tensor) -> Tensor:
    return x ^ x >> 16


def _mixed(x: Tensor) -> Tensor:
    x = _folded(x) * FIRST & WORD
    x = (x ^ x >> 15) * SECOND & WORD
    return x ^ x >> 15


def dropout_of(rate: float, seed: int | Tensor | None, device: torch.device) -> Dropout | None:
    """None for a rate of 0. Nobody waits for the seed, but it is copied: a backward pass needs it as it is now.

    Raises ValueError for a seed that is neither an int of 64 bits nor one int64 on the device."""
    if not rate:
        return None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be one int64, not {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device} but q is on {device}; they must agree")
        return Dropout(rate, seed.detach().reshape(1).clone())
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"dropout needs a seed, an int of 64 bits or an int64 tensor with one, not {seed!r}")
    return Dropout(rate, torch.full((1,), seed, dtype=torch.int64, device=device))
