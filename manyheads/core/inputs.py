"""What an engine is given beside a form: tensors, positions, scale, operands, state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.core.dropout import Dropout


@dataclass(frozen=True)
class Run:
    """A range, for torch.compile, which takes the bounds of a range for constants."""

    start: int
    stop: int
    step: ClassVar[int] = 1


Positions = range | Run | Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len,
    v_head_dim]; positions are a range, the same for every row, or int64 [batch, len] with -1 for an absent token."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    q_positions: Positions
    kv_positions: Positions
    operands: Mapping[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def kv_len(self) -> int:
        return self.k.shape[2]

    @property
    def v_head_dim(self) -> int:
        return self.v.shape[3]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(
            batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, len=self.kv_len,
            head_dim=self.q.shape[3], v_head_dim=self.v_head_dim,
        )  # fmt: skip

    @property
    def ragged(self) -> bool:
        """Some row may have absent tokens, or positions of its own."""
        return isinstance(self.q_positions, Tensor) or isinstance(self.kv_positions, Tensor)

    @property
    def wants_grad(self) -> bool:
        """A backward pass may follow."""
        return torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.q, self.k, self.v, *self.operands.values())
        )

    def nothing(self) -> Tensor:
        """What comes out where nobody sees anything: zeros [batch, heads, q_len, v_head_dim]. They still depend on the
        inputs, so that a backward pass finds its way."""
        zeros = self.q.new_zeros(self.batch, self.heads, self.q_len, self.v_head_dim)
        return zeros + 0 * (self.q.sum() + self.k.sum() + self.v.sum())

    def with_(self, **changes) -> Inputs:
        return replace(self, **changes)


def default_positions(q_len: int, kv_len: int) -> tuple[range | Run, range | Run]:
    """Queries and keys end at the same position: the queries are the last q_len."""
    n = max(q_len, kv_len)
    run = Run if torch.compiler.is_compiling() else range
    return run(n - q_len, n), run(n - kv_len, n)


def as_range(positions: Positions) -> range | Tensor:
    return range(positions.start, positions.stop) if isinstance(positions, Run) else positions


def as_rows(positions: Positions, device: torch.device) -> Tensor:
    """Positions as int64 [1 | batch, len]."""
    if not isinstance(positions, Tensor):
        return torch.arange(positions.start, positions.stop, device=device)[None]
    return positions if positions.ndim == 2 else positions[None]
