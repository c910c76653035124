"""Batch normalisation of tokens."""

from __future__ import annotations

from torch import Tensor, nn


def batch_normed(norm: nn.BatchNorm1d, x: Tensor, present: Tensor | None = None) -> Tensor:
    """x [..., batch, len, channels], normalised channel by channel over all tokens.

    present: bool [batch, len]; padding is left out of the statistics and gives 0.
    """
    if present is None:
        return norm(x.flatten(0, -2)).view(x.shape)
    tokens, out = x[..., present, :], x.new_zeros(x.shape)
    out[..., present, :] = norm(tokens.flatten(0, -2)).view(tokens.shape).to(x.dtype)
    return out
