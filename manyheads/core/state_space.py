"""What the layers around a state space share: how rates start, time steps, and the gated norm behind."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def initial_rates(heads: int) -> tuple[Tensor, Tensor]:
    """(A_log, dt_bias), each [heads], as Mamba-2 starts them (state-spaces/mamba): -A uniform from 1 to 16, time steps
    uniform in the logarithm from 0.001 to 0.1."""
    steps = torch.exp(torch.rand(heads) * math.log(0.1 / 0.001) + math.log(0.001))
    return torch.empty(heads).uniform_(1, 16).log(), steps + torch.log(-torch.expm1(-steps))  # softplus undone


def time_steps(raw: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """dt = softplus(raw + dt_bias) and the log decay -exp(A_log) dt, both [batch, heads, len] in float32 or wider, from
    raw [batch, len, heads]."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    dt = F.softplus(raw.to(wide) + dt_bias).mT
    return dt, -A_log.to(wide).exp()[:, None] * dt


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., channels] through an RMS norm with that weight [channels], which under autocast is wider than x."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """The RMS norm of y silu(z), all [batch, len, channels], over each of `groups` runs of channels; times weight
    [channels]."""
    gated = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2) * weight


def for_each_head(t: Tensor, heads: int) -> Tensor:
    """t [batch, groups, len, d] as [batch, heads, len, d], each group for its run of heads. A view of one group."""
    return t[:, :, None].expand(-1, -1, heads // t.shape[1], -1, -1).flatten(1, 2)
