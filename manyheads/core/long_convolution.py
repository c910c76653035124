"""Convolutions as long as the row, through Fourier space, and kernels that are sums of decaying exponentials."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_{l <= t} kernel[:, l] x_{t-l}, each channel by itself, with zeros before the row and behind the kernel.

    x [batch, len, channels], kernel [channels, size] with a token's own tap first. Returns x's shape and dtype;
    computes in float32 or wider, with an error relative to the greatest numbers of a row and its kernel, as Fourier
    space mixes all of them. Time is len log len.
    """
    if not x.numel():
        return x
    length = x.shape[1]
    wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    taps = kernel[:, :length].to(wide)
    n = 1 << (length + taps.shape[1] - 2).bit_length()  # so long that the end does not come round to the start
    y = torch.fft.irfft(torch.fft.rfft(x.mT.to(wide), n) * torch.fft.rfft(taps, n), n)
    return y[..., :length].mT.to(x.dtype)


def exponentials(weight: Tensor, step: Tensor, length: int) -> Tensor:
    """sum_n weight[:, n] exp(l step[:, n]) for l = 0 ... length - 1, [channels, length].

    weight, step [channels, n], both real or both complex; no real part of a step exceeds 0. As l = size m + r, a
    product of matrices [m, n] and [n, r]: nothing holds channels * n * length numbers.
    """
    size = math.isqrt(max(length - 1, 0)) + 1
    fine, coarse = (torch.arange(n, device=step.device) for n in (size, -(-length // size)))
    with torch.autocast(step.device.type, enabled=False):
        near = (step[..., None] * fine).exp()
        far = weight[..., None] * (step[..., None] * (size * coarse)).exp()
        return (far.mT @ near).flatten(1)[:, :length]
