"""Entmax attention: softmax that gives exact zeros, sparsemax at alpha = 2.

    o_i = sum_j entmax_j(q_i . k_j / sqrt(d)) v_j
    entmax_j(s) = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)),   tau such that the weights sum to 1

Peters, Niculae, Martins. "Sparse Sequence-to-Sequence Models." 2019. arXiv:1905.05702. There a decoder looks at a whole
source; causal is the decoder's look at itself. `adaptive_sparse_attention` learns alpha.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, alpha=1.5, causal=False):
    out, before = [], k.shape[-2] - q.shape[-2]
    for i in range(q.shape[-2]):
        s = (q[..., i, None, :] * k).sum(-1) / q.shape[-1] ** 0.5
        if causal:
            s = s[..., : before + i + 1]
        p = torch.softmax(s, -1) if alpha == 1 else by_support(s, alpha)
        out.append(p[..., None, :] @ v[..., : s.shape[-1], :])
    return torch.cat(out, -2)


def by_support(s, alpha):
    """The weights of tau, found by bisection without a gradient; their support and one step of Newton's give it one."""
    z = (alpha - 1) * s
    with torch.no_grad():
        low = z.amax(-1, keepdim=True) - 1
        high = low + 1
        for _ in range(60):
            tau = (low + high) / 2
            heavy = (torch.relu(z - tau) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
            low, high = torch.where(heavy, tau, low), torch.where(heavy, high, tau)
        p = torch.relu(z - low) ** (1 / (alpha - 1))
        r = torch.where(p > 0, p ** (2 - alpha), 0.0)
    tau = low.detach() + (r / r.sum(-1, keepdim=True) * (z - z.detach())).sum(-1, keepdim=True)
    return torch.relu(z - tau) ** (1 / (alpha - 1))


@mechanism(
    reference=reference,
    arxiv="1905.05702",
    examples=({}, {"alpha": 2.0}, {"alpha": 1.3}, {"alpha": 1.5, "causal": True}),
    laws=(Law({"alpha": 1.0}, "full"), Law({"alpha": 1.0, "causal": True}, "causal")),
    causal=False,
    trained=True,
    ranges={"alpha": (1.0, math.inf)},
)
def entmax_attention(alpha: float = 1.5, causal: bool = False) -> Scores:
    """Entmax over all keys, or those up to the query's own; exact for alpha 1.5 and 2."""
    mask = past if causal else None
    return Scores(mask=mask) if alpha == 1 else Scores(mask=mask, normaliser="entmax", alpha=alpha)


def past(b, h, i, j):
    return j <= i
