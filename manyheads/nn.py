"""The layer: projections, rotary positions and operands around any mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.checks import check_dropout
from manyheads.core.forms import Form, Operand
from manyheads.core.names import unknown
from manyheads.dispatch import ENGINES, attention
from manyheads.mechanisms import get

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Attention(nn.Module):
    """Attention over x [batch, len, dim] by any mechanism, ready to train.

    dim: width of x. heads: heads of the model; kv_heads (default heads): heads of k and v.
    mechanism: a name, whose settings are keyword arguments, or a form. Each operand that the form declares gets a
        projection from x (or a parameter, if it has no value per token).
    head_dim: default dim // heads. rope: rotary positions with base rope_theta, or None for none.
    max_len: needed by mechanisms whose scores come from positions: the longest input.
    engine: as in `manyheads.attention`.
    dropout: of the weights, in training alone, each call with a seed that torch's generator on the device gives.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Form = "causal",
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        rope_theta: float | None = 10000.0,
        max_len: int | None = None,
        engine: str = "auto",
        dropout: float = 0.0,
        **settings: Any,
    ):
        super().__init__()
        known = () if isinstance(mechanism, Form) else get(mechanism).settings
        self.mechanism = f"a {type(mechanism).__name__}" if isinstance(mechanism, Form) else mechanism
        for name in settings:
            if name not in known:
                raise TypeError(unknown(f"setting of {self.mechanism} or argument of Attention", name, known))
        self.form: Form = mechanism if isinstance(mechanism, Form) else get(mechanism)(**settings)
        for name, size in {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a positive integer, not {size!r}")
        if engine not in ("auto", *ENGINES):
            raise ValueError(unknown("engine", engine, ("auto", *ENGINES)))
        check_dropout(self.form, dropout)
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; give head_dim")
        self.head_dim = head_dim or dim // heads
        self.heads = max(1, round(heads * self.form.projections.query_share))
        self.kv_heads = kv_heads or self.heads
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide the {self.heads} query heads of {self.mechanism}")
        self.by_position = self.form.projections.scores_from == "positions"
        self.dim, self.engine, self.dropout = dim, engine, dropout
        self.rope_theta = None if self.by_position else rope_theta
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}; or rope_theta=None")
        if self.by_position:
            if max_len is None:
                raise ValueError(f"{self.mechanism} scores positions, so it needs max_len, the longest input")
            # One-hot encodings times a projection: a row of the projection for each position.
            self.q_position = nn.Parameter(torch.randn(max_len, self.heads * self.head_dim) * self.head_dim**-0.25)
            self.k_position = nn.Parameter(torch.randn(max_len, self.kv_heads * self.head_dim) * self.head_dim**-0.25)
        else:
            self.q = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
            self.k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(self.heads * self.head_dim, dim, bias=bias)
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "v_head_dim": self.head_dim}
        self.operands = nn.ModuleDict({n: OperandSource(o, dim, sizes) for n, o in self.form.operands.items()})

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        return self.o(self.attend(x, present=present).transpose(1, 2).flatten(2))

    def attend(
        self, x: Tensor, *, present: Tensor | None = None, change: Change | None = None, form: Form | None = None
    ) -> Tensor:
        """What the heads give, [batch, heads, len, head_dim], before they are mixed. `change` maps (q, k, v) to others
        of the same shapes, before positions rotate them; `form` is computed in place of the layer's own, which must
        have the same operands."""
        positions = positions_of(x, present, self.dim)
        q, k = self._from_positions(x, positions) if self.by_position else self._from_content(x)
        v = split(self.v(x), self.kv_heads)
        if change is not None:
            q, k, v = change(q, k, v)
        if self.rope_theta is not None:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
        rate = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if rate else None  # which nobody waits for
        return attention(
            q, k, v, form or self.form, engine=self.engine,
            q_positions=positions, kv_positions=positions, dropout=rate, seed=seed,
            **{n: source(x) for n, source in self.operands.items()},
        )  # fmt: skip

    def _from_content(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return split(self.q(x), self.heads), split(self.k(x), self.kv_heads)

    def _from_positions(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        if length > len(self.q_position):
            raise ValueError(f"x has {length} tokens, more than max_len {len(self.q_position)}")
        if positions is None:
            q, k = (p[:length].expand(batch, -1, -1) for p in (self.q_position, self.k_position))
        else:
            q, k = (p[positions.clamp(min=0)] for p in (self.q_position, self.k_position))
        return split(q.to(x.dtype), self.heads), split(k.to(x.dtype), self.kv_heads)

    def extra_repr(self) -> str:
        return f"{self.mechanism}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


class OperandSource(nn.Module):
    """Where a layer's operand comes from: a projection of x without a bias at first, or a parameter."""

    def __init__(self, operand: Operand, dim: int, sizes: dict[str, int]):
        super().__init__()
        self.operand = operand
        inner = tuple(n for n in operand.names if n not in ("batch", "len"))
        self.inner = tuple(int(n) if n.isdigit() else sizes[n] for n in inner)
        if operand.per_token:
            # With zeros the operand starts as what its activation makes of 0, the same for every token.
            self.weight = nn.Linear(dim, max(1, int(torch.tensor(self.inner).prod())))
            nn.init.zeros_(self.weight.bias)
            with torch.no_grad():
                operand.init(self.weight.weight)
        else:
            self.weight = nn.Parameter(torch.empty(self.inner))
            with torch.no_grad():
                operand.init(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The operand for x [batch, len, dim], in its declared order of dimensions."""
        if isinstance(self.weight, nn.Parameter):
            return self.operand.activation(self.weight)
        raw = self.weight(x)
        raw = raw.unflatten(-1, self.inner) if self.inner else raw.squeeze(-1)
        have = ["batch", "len", *(n for n in self.operand.names if n not in ("batch", "len"))]
        return self.operand.activation(raw.permute([have.index(n) for n in self.operand.names]))


def positions_of(x: Tensor, present: Tensor | None, dim: int) -> Tensor | None:
    """Where each token of x [batch, len, dim] stands in its own row, int64 [batch, len], with -1 for padding; None if
    nothing is said of padding. Raises ValueError for another shape or dtype."""
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be a tensor [batch, len, {dim}], not {tuple(x.shape)}")
    if present is None:
        return None
    if present.dtype != torch.bool or present.shape != x.shape[:2]:
        given = f"{present.dtype} {tuple(present.shape)}"
        raise ValueError(f"present must be a bool tensor {tuple(x.shape[:2])}, not {given}")
    return torch.where(present, present.cumsum(1) - 1, -1)


def split(x: Tensor, heads: int) -> Tensor:
    """[batch, len, heads * head_dim] as [batch, heads, len, head_dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on x [batch, heads, len, head_dim], halves as pairs."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def to_front(x: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """The tokens of x [batch, len, dim] at their positions in [batch, length, dim], zeros elsewhere: padding goes to
    the end, for layers that count places. positions: as from `positions_of`. Raises ValueError for longer rows."""
    if x.shape[1] > length and (positions is None or int(positions.max()) >= length):
        raise ValueError(f"x has rows of more than {length} tokens, which is as long as this layer was made for")
    if positions is None:
        return F.pad(x, (0, 0, 0, length - x.shape[1]))
    place = torch.where(positions < 0, length, positions)[..., None].expand_as(x)
    return x.new_zeros(x.shape[0], length + 1, x.shape[2]).scatter(1, place, x)[:, :length]


def from_front(y: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """The inverse of `to_front`, for x of this length; what is absent is 0."""
    if positions is None:
        return y[:, :length]
    found = y.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, y.shape[2]))
    return found.masked_fill((positions < 0)[..., None], 0.0)
