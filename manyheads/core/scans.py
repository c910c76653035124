"""Mamba's selective scan: a diagonal state for each channel, of which tokens choose what decays and what is read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.core.convolution import causal_conv
from manyheads.core.state_space import initial_rates, normed

CHUNK = 256  # tokens whose states are in memory at a time


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t,   h [channels, n]

    x, dt [batch, len, channels], dt >= 0: where it is 0, a token writes nothing and lets nothing decay.
    a [channels, n], below 0; b, c [batch, len, n]; state [batch, channels, n], as an earlier call returned it.
    Returns (y [batch, len, channels], the state after the last token), in float32 or wider.

    Only exp(dt a) <= 1 and products of such are taken, so nothing overflows. Time is linear in length, and so is
    memory, with gradients too: between chunks only the state is kept, and a chunk's states are computed again.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, a, b, c = (t.to(wide) for t in (x, dt, a, b, c))
    h = x.new_zeros(x.shape[0], *a.shape) if state is None else state.to(wide)
    if not x.shape[1]:
        return x, h
    again = torch.is_grad_enabled() and x.shape[1] > CHUNK
    outputs = []
    for part in zip(*(t.split(CHUNK, 1) for t in (x, dt, b, c)), strict=True):
        args = a, h, *part
        made: Any = checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False) if again else _chunk(*args)
        y, h = made
        outputs.append(y)
    return torch.cat(outputs, 1), h


def _chunk(a: Tensor, state: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    decay = (dt[..., None] * a).exp()
    write = (dt * x)[..., None] * b[:, :, None]
    first = write[:, :1] + decay[:, :1] * state[:, None]
    h = _scanned(decay, torch.cat([first, write[:, 1:]], 1))
    return (h * c[:, :, None]).sum(-1), h[:, -1]  # not a product of matrices, which autocast would round


def _scanned(decay: Tensor, write: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + write_t along dimension 1, from h = 0: the odd places from pairs of neighbours, as a scan
    of half the length, and the even ones each from the place before."""
    n = write.shape[1]
    if n == 1:
        return write
    left, right = slice(0, n - n % 2, 2), slice(1, None, 2)
    odd = _scanned(decay[:, right] * decay[:, left], write[:, right] + decay[:, right] * write[:, left])
    even = write[:, 2::2] + decay[:, 2::2] * odd[:, : (n - 1) // 2]
    even = torch.cat([write[:, :1], even], 1)
    h = torch.stack([even[:, : n // 2], odd], 2).flatten(1, 2)
    return torch.cat([h, even[:, n // 2 :]], 1) if n % 2 else h


class SelectiveState(nn.Module):
    """The path of a Mamba layer between its projections, for x [batch, len, channels].

    u = silu(conv(x)),   [r, B, C] = W_x u,   dt = softplus(W_dt r + b),   y = scan(u, dt, -exp(A_log), B, C) + D u

    norms: r, B and C each through an RMS norm. Parameters have the names and the start of the authors' code
    (state-spaces/mamba).
    """

    def __init__(self, channels: int, *, state_dim: int, conv_size: int, dt_rank: int, norms: bool = False):
        super().__init__()
        self.sizes = [dt_rank, state_dim, state_dim]
        self.conv1d = nn.Conv1d(channels, channels, conv_size, groups=channels)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.norms = nn.ParameterList(torch.ones(size) for size in self.sizes) if norms else None
        self.dt_proj = nn.Linear(dt_rank, channels)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        _, bias = initial_rates(channels)
        self.dt_proj.bias = nn.Parameter(bias)
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(*self.choose(x), self.A_log)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(u, dt, B, C), dt in float32 or wider."""
        u = F.silu(causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias))
        r, b, c = self.x_proj(u).split(self.sizes, -1)
        if self.norms is not None:
            r, b, c = (normed(t, weight) for weight, t in zip(self.norms, (r, b, c), strict=True))
        raw = self.dt_proj(r)
        return u, F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32))), b, c

    def scan(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, A_log: Tensor) -> Tensor:
        y, _ = selective_scan(u, dt, -A_log.to(dt.dtype).exp(), b, c)
        return y.to(u.dtype) + self.D * u
