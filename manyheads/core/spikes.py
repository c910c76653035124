"""Spiking neurons: an input over time becomes spikes, 0 or 1, and a gradient passes all the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.batch_norm import batch_normed


def fire(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0. In the backward pass it is sigmoid(4 x)."""
    smooth = torch.sigmoid(4 * x)
    return (x >= 0).to(x.dtype) + (smooth - smooth.detach())  # in this order exactly 0 or 1


def lif(x: Tensor, threshold: float = 1.0, tau: float = 2.0) -> Tensor:
    """Leaky integrate and fire: the spikes s, of x's shape [steps, ...], with time in front.

        h_t = m_{t-1} + (x_t - m_{t-1}) / tau,   s_t = [h_t >= threshold],   m_t = (1 - s_t) h_t,   m_0 = 0

    The reset passes no gradient (`detach_reset`, as the models of this kind are trained).
    """
    m, spikes = torch.zeros_like(x[0]), []
    for x_t in x:
        h = m + (x_t - m) / tau
        spikes.append(fire(h - threshold))
        m = h * (1 - spikes[-1].detach())
    return torch.stack(spikes)


def spiking(x: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d, threshold: float, present: Tensor | None) -> Tensor:
    """LIF(BN(linear(x))) for x [steps, batch, len, dim]; padding, where present [batch, len] is False, gives none."""
    return lif(batch_normed(norm, linear(x), present), threshold)
