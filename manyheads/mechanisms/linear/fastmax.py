"""Fastmax: softmax with its exponential cut off after a few terms, so that sums over keys factor.

    o_i = sum_j f(q_i.k_j) v_j / sum_j f(q_i.k_j),   f(x) = sum_{l=0}^p x^l / l!

with p = 1 or 2 and each q and k standardised: its mean over the channels taken off, and divided by its standard
deviation. f is phi(q).phi(k) with phi(x) = (1, x, x_a x_b / sqrt(2) for all channels a, b); as x_a x_b and x_b x_a are
one number here, these are 1 + d + d (d + 1) / 2. For p = 2 weights are positive; for p = 1 they may be negative, and
their sum may vanish. There is no scale. The paper's dropout, of the quadratic numbers, is not here.

Gerami, Hoover, Dulepet, Duraiswami. "FAST: Factorizable Attention for Speeding up Transformers." 2024.
arXiv:2402.07901. The 1e-5 beside the variance is ours: a token may be constant.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Recurrence, mechanism, one


def reference(q, k, v, *, p=2, causal=True):
    q, k = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() for x in (q, k))
    x = q @ k.mT
    weights = 1 + x if p == 1 else 1 + x + x**2 / 2
    if causal:
        weights = weights.tril(k.shape[-2] - q.shape[-2])
    return weights @ v / weights.sum(-1, keepdim=True)


@mechanism(
    reference=reference,
    arxiv="2402.07901",
    system="fast-fastmax",
    examples=({}, {"p": 1}, {"causal": False}, {"p": 1, "causal": False}),
    trained=True,
    ranges={"p": (1, 2)},
    tolerance=4.0,
    tolerance_reason="products of features are greater than their sum f, and for p = 1 the sum over keys may be near 0",
)
def fastmax(p: int = 2, causal: bool = True) -> Recurrence:
    """A polynomial of degree `p`; every token sees all others unless `causal`."""

    def feature(x):
        x = F.layer_norm(x, x.shape[-1:])
        terms = [torch.ones_like(x[..., :1]), x]
        if p == 2:
            a, b = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
            terms += [0.5**0.5 * x.square(), x[..., a] * x[..., b]]
        return torch.cat(terms, -1)

    return Recurrence(query_feature=feature, key_feature=feature, normaliser="sum", causal=causal, default_scale=one)
