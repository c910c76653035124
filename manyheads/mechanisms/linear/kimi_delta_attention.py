"""Kimi delta attention: a state that forgets channel by channel and corrects what it stored under a key.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(d)

with |q_t| = |k_t| = 1, 0 <= beta_t <= 1 and g_t <= 0. The paper normalises q and k in its layer; it is done here, for
the state can grow without bound otherwise. The short convolutions and SiLU before, the gated norm behind and the
factors of g (a rate and a bias for each head, a low-rank projection) are the layer's. No positions are encoded.

Kimi Team. "Kimi Linear: An Expressive, Efficient Attention Architecture." 2025. arXiv:2510.26692.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Operand, Recurrence, mechanism, unit


def reference(q, k, v, *, g, beta):
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(k.shape[-2]):
        k_t, v_t, beta_t = k[..., t, :], v[..., t, :], beta[..., t, None, None]
        state = g[..., t, :, None].exp() * state
        stored = (k_t[..., None, :] @ state).squeeze(-2)
        state = state + beta_t * k_t[..., :, None] * (v_t - stored)[..., None, :]
        if t >= k.shape[-2] - q.shape[-2]:
            out.append(q[..., t - k.shape[-2], None, :] @ state / q.shape[-1] ** 0.5)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2510.26692",
    system="kimi-delta-attention",
    trained=True,
    tolerance=2.0,
    tolerance_reason="in chunks, the gradient of g is a difference of sums over the chunk",
)
def kimi_delta_attention() -> Recurrence:
    """Log decay `g` for each channel and write strength `beta` for each token."""
    return Recurrence(
        query_feature=unit,
        key_feature=unit,
        write="delta",
        operands={
            "g": Operand("batch heads len head_dim", lambda x: -F.softplus(x)),
            "beta": Operand("batch heads len", torch.sigmoid),
        },
    )
