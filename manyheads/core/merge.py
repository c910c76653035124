"""The one identity behind split keys, rings and trees: attention over two sets of keys from attention over each."""

import torch
from torch import Tensor


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge (o, lse) of two disjoint sets of keys. o [..., len, v_head_dim], lse [..., len], natural logarithm.

    An empty side has o = 0 and lse = -inf; two empty sides give an empty one. A sink counts once: one side has it.
    """
    (o_a, lse_a), (o_b, lse_b) = a, b
    top = torch.maximum(lse_a, lse_b)
    safe = torch.where(top.isneginf(), 0.0, top)  # -inf - -inf would be NaN
    w_a, w_b = (lse_a - safe).exp(), (lse_b - safe).exp()
    total = w_a + w_b
    divisor = torch.where(total > 0, total, 1.0)
    o = (o_a * (w_a / divisor)[..., None] + o_b * (w_b / divisor)[..., None]).to(o_a.dtype)
    return o, torch.where(total > 0, safe + divisor.log(), -torch.inf)


def merge_into(o: Tensor, lse: Tensor, o_b: Tensor, lse_b: Tensor) -> None:
    """The same in place: o, wider than o_b, and lse become those of both. Not for gradients."""
    both = torch.logaddexp(lse, lse_b)
    safe = torch.where(both.isneginf(), 0.0, both)
    o.mul_((lse - safe).exp()[..., None]).addcmul_(o_b, (lse_b - safe).exp()[..., None])
    lse.copy_(both)
