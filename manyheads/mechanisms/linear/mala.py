"""Magnitude-aware linear attention (MALA): linear attention whose weights get sharper with the length of the query.

    s_ij = phi(q_i) . phi(k_j) / (n sqrt(d)),   S_i = sum_j s_ij,   phi(x) = elu(x) + 1
    o_i = sum_j (beta_i s_ij - gamma_i) v_j,   beta_i = 1 + 1 / S_i,   gamma_i = S_i / n

for n tokens. The weights of a row sum to 1 and may be negative. A feature phi(q_i) that is c times as long has the
weights s_ij / S_i + c (s_ij - S_i / n): those of normalised linear attention, which knows no length, and behind them c
times how far each s is from the mean. That is how it is computed: as two linear attentions, one with centred keys.

The paper's s has neither n nor the root; they are those of its code (qhfan/MALA). The rotary positions there come
behind S, and rows sum to 1 without them only; these, a 5 x 5 convolution of v and a gate belong to the vision block.

Fan, Huang, Ai, He. "Rectifying Magnitude Neglect in Linear Attention." 2025. arXiv:2507.00698.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Recurrence, Sum, mechanism


def reference(q, k, v):
    n, d = k.shape[-2:]
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    out = []
    for i in range(q.shape[-2]):
        s = torch.stack([(q[..., i, :] * k[..., j, :]).sum(-1) for j in range(n)], -1) / (n * d**0.5)
        total = s.sum(-1, keepdim=True)
        weights = (1 + 1 / total) * s - total / n
        out.append((weights[..., None] * v).sum(-2))
    return torch.stack(out, -2)


@mechanism(
    reference=reference,
    arxiv="2507.00698",
    system="mala",
    causal=False,
    trained=True,
)
def mala() -> Sum:
    """The paper's feature."""

    def feature(x):
        return F.elu(x) + 1

    def apart(k):
        """How far the features are from their mean, divided by their number."""
        k = feature(k)
        return (k - k.mean(-2, keepdim=True)) / k.shape[-2]

    shape = Recurrence(query_feature=feature, key_feature=feature, normaliser="sum", causal=False)
    size = Recurrence(query_feature=feature, key_feature=apart, causal=False)
    return Sum(parts=(shape, size), gates=(None, None))
