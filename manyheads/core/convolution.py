"""The short convolution over time that layers put before a recurrence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, present: Tensor | None = None) -> Tensor:
    """y_t = sum_{c < size} weight[:, size - 1 - c] x_{t-c} + bias, each channel by itself, with zeros before the row.

    x [batch, len, channels], weight [channels, size] with a token's own tap last, as in `nn.Conv1d`; bias [channels].
    present: bool [batch, len], False where a row is padding, which counts as zeros. Returns x's shape.
    """
    if not x.shape[1]:
        return x  # torch convolves nothing shorter than a kernel's input
    if present is not None:
        x = x.masked_fill(~present[..., None], 0.0)
    before = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.conv1d(before, weight[:, None], bias, groups=weight.shape[0]).mT
