"""Softmax attention, recurrences, short convolutions and spikes as slow, plain code, for the references of layers.
Shares nothing with engines or `nn`."""

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


def recurrent_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """q, k [heads, len, d], v [heads, len, e], log decays g [heads, len], of one row: o [heads, len, e], head by head.

    o_t = S_t^T q_t, with S_t = exp(g_t) S_{t-1} + k_t v_t^T.
    """
    out = []
    for h in range(len(q)):
        state = q.new_zeros(q.shape[-1], v.shape[-1])
        for t in range(q.shape[1]):
            state = g[h, t].exp() * state + torch.outer(k[h, t], v[h, t])
            out.append(q[h, t] @ state)
    return torch.stack(out).view(*q.shape[:2], -1)


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


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [len, channels], each channel with its taps weight [channels, size] over the tokens up to its own, whose tap
    is the last."""
    taps = weight.flip(-1)
    seen = [range(min(weight.shape[1], t + 1)) for t in range(len(x))]
    out = torch.stack([torch.stack([taps[:, c] * x[t - c] for c in cs]).sum(0) for t, cs in enumerate(seen)])
    return out if bias is None else out + bias


def selected(s: Any, row: Tensor, scans: tuple[tuple[Tensor, bool], ...]) -> Tensor:
    """What a `SelectiveState` gives for a row [len, channels], token by token: the sum over the scans, each with an
    A_log of its own, and from the last token on if so asked."""
    u = convolved(row, s.conv1d.weight[:, 0], s.conv1d.bias)
    u = u / (1 + (-u).exp())
    outputs = []
    for A_log, backwards in scans:
        h, out = torch.zeros_like(A_log), []
        for u_t in u.flip(0) if backwards else u:
            parts = (s.x_proj.weight @ u_t).split(s.sizes)
            if s.norms is not None:
                parts = [w * p / (p.square().mean() + 1e-6).sqrt() for w, p in zip(s.norms, parts, strict=True)]
            r, b, c = parts
            dt = (1 + (s.dt_proj.weight @ r + s.dt_proj.bias).exp()).log()
            h = (-dt[:, None] * A_log.exp()).exp() * h + torch.outer(dt * u_t, b)
            out.append(h @ c + s.D * u_t)
        outputs.append(torch.stack(out[::-1] if backwards else out))
    return sum(outputs[1:], outputs[0])


def spiked(frames: list[Tensor], threshold: float = 1.0) -> list[Tensor]:
    """Frame by frame, what leaky neurons with a time constant of 2 make of their input: 0, and 1 where they fire."""
    held, out = torch.zeros_like(frames[0]), []
    for frame in frames:
        held = held + (frame - held) / 2
        soft = 1 / (1 + torch.exp(-4 * (held - threshold)))
        hard = (held.detach() >= threshold).to(held.dtype)
        out.append(hard + (soft - soft.detach()))
        held = torch.where(hard > 0, 0.0, held)
    return out


def standardised(norm: Any, x: Tensor) -> Tensor:
    """A trained batch normalisation of x [..., channels]."""
    return norm.weight * (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() + norm.bias
