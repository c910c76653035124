"""alpha-entmax: a softmax that gives exact zeros.

    p_j = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)),   tau such that sum_j p_j = 1

softmax at alpha = 1, sparsemax at 2. Exact by sorting at 1.5 and 2, else by bisection to the dtype's last bit.

Peters, Niculae, Martins. "Sparse Sequence-to-Sequence Models." 2019. arXiv:1905.05702. The derivative by alpha:
Correia, Niculae, Martins. "Adaptively Sparse Transformers." 2019. arXiv:1909.00015.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

UNWEIGHTED = -2.0  # with the largest score at 0, tau is at least -1: nothing at or below it has a weight


def entmax(s: Tensor, alpha: Tensor | float) -> Tensor:
    """alpha-entmax over the last dimension of scores [..., n]. alpha >= 1; a tensor broadcasts, with 1 in place of n.

    A score of -inf has weight 0, also where all are -inf. Differentiable once, in the scores and in an alpha that is a
    tensor. Where alpha - 1 is below the root of the dtype's epsilon it is a softmax, with no gradient for alpha: that
    is nearer than a power of 1 / (alpha - 1) comes with its rounding.
    """
    top = s.detach().amax(-1, keepdim=True)
    s = s - torch.where(top.isneginf(), 0.0, top)
    if not isinstance(alpha, Tensor) and alpha in EXACT:
        return _Entmax.apply(s, torch.tensor(alpha, dtype=s.dtype, device=s.device), EXACT[alpha])
    return _Entmax.apply(s, torch.as_tensor(alpha, dtype=s.dtype, device=s.device), _bisected)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: Tensor, weights: Any) -> Tensor:
        p = weights(s, alpha)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The Jacobian in the scores is diag(r) - r r^T / sum(r), with r = p^(2 - alpha) where p > 0."""
        p, alpha = ctx.saved_tensors
        r = torch.where(p > 0, p ** (2 - alpha), 0.0)
        share = r / r.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        by_s = r * (grad - (share * grad).sum(-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return by_s, None, None
        soft = _is_softmax(alpha)
        above = torch.where(soft, 1.0, alpha - 1)
        entropy = -torch.where(p > 0, p, 1.0).log() * p
        by_alpha = (p - share) / above**2 + (entropy - share * entropy.sum(-1, keepdim=True)) / above
        return by_s, (grad * torch.where(soft, 0.0, by_alpha)).sum_to_size(alpha.shape), None


def _is_softmax(alpha: Tensor) -> Tensor:
    return alpha - 1 < torch.finfo(alpha.dtype).eps ** 0.5


def _bisected(s: Tensor, alpha: Tensor) -> Tensor:
    """tau lies between -1, where the largest score alone has weight 1, and -n^(1 - alpha), where it has 1 / n."""
    soft = _is_softmax(alpha)
    above = torch.where(soft, 1.0, alpha - 1)
    z, power = above * s, 1 / above
    low = torch.full_like(s[..., :1], -1.0)
    width = 1 - s.shape[-1] ** -above
    for _ in range(round(-math.log2(torch.finfo(s.dtype).eps)) + 1):
        width = width / 2
        too_low = ((z - low - width).clamp(min=0) ** power).sum(-1, keepdim=True) >= 1
        low = torch.where(too_low, low + width, low)
    return torch.where(soft, s.exp(), (z - low).clamp(min=0) ** power)


def _sparsemax(s: Tensor, alpha: Tensor) -> Tensor:
    """The k largest scores share 1: tau_k = (their sum - 1) / k, for the greatest k that leaves them above it."""
    order, count = _descending(s)
    tau = (order.cumsum(-1) - 1) / count
    return (s - _last(tau, order > tau)).clamp(min=0)


def _entmax15(s: Tensor, alpha: Tensor) -> Tensor:
    """sum_j (s_j / 2 - tau)^2 = 1 over the k largest, by their mean and variance; k as for sparsemax."""
    order, count = _descending(s / 2)
    mean = order.cumsum(-1) / count
    spread = order.square().cumsum(-1) - count * mean.square()
    tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    return (s / 2 - _last(tau, order >= tau)).clamp(min=0).square()


def _descending(s: Tensor) -> tuple[Tensor, Tensor]:
    """The scores in order, none infinite, and how many they are up to each."""
    order = s.sort(-1, descending=True).values.clamp(min=UNWEIGHTED)
    return order, torch.arange(1, s.shape[-1] + 1, dtype=s.dtype, device=s.device)


def _last(tau: Tensor, inside: Tensor) -> Tensor:
    return tau.gather(-1, inside.sum(-1, keepdim=True) - 1)


def _softmax(s: Tensor, alpha: Tensor) -> Tensor:
    return s.exp()


EXACT = {1.0: _softmax, 1.5: _entmax15, 2.0: _sparsemax}
