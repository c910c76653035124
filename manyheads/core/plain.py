"""Softmax attention as slow, plain code, for the references of layers. Shares nothing with engines or `nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def softmax_heads(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """q [heads, len, d], k [n, len, d] and v [m, len, e], of one row: o [heads, len, e], head by head, token by token.

    n and m divide heads; head h reads key head h * n // heads and value head h * m // heads.
    """
    heads, length, d = q.shape
    out = []
    for h in range(heads):
        key, value = k[h * len(k) // heads], v[h * len(v) // heads]
        for i in range(length):
            seen = i + 1 if causal else length
            s = key[:seen] @ q[h, i] * (d**-0.5 if scale is None else scale)
            w = (s - s.max().detach()).exp()
            out.append((w / w.sum()) @ value[:seen])
    return torch.stack(out).view(heads, length, -1)


def heads_of(a: Any, row: Tensor, change: Callable | None = None) -> Tensor:
    """What the heads of an `Attention` with softmax give for a row [len, dim]: [heads, len, head_dim]. `change` is what
    a layer does to (q, k, v)."""
    q, k, v = (cut(row @ p.weight.T, n) for p, n in ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads)))
    if change is not None:
        q, k, v = change(q, k, v)
    return softmax_heads(turned(q, a.rope_theta), turned(k, a.rope_theta), v, causal=a.mechanism == "causal")


def turned(x: Tensor, theta: float | None) -> Tensor:
    """x [heads, len, d] with each pair (channel c, channel c + d/2) turned by an angle of position * theta^(-2c/d)."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[1]).float()[:, None] * speed  # in float32 as everywhere, whatever x is
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


def cut(x: Tensor, heads: int) -> Tensor:
    """[len, heads * d] as [heads, len, d]."""
    return torch.stack(x.chunk(heads, -1))
