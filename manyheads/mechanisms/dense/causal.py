"""Causal softmax attention: every query sees itself and what came before.

    o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(d)) v_j

computed without the matrix of scores: a running maximum m and a running sum make the softmax lazy, so that memory is
linear in length.

Rabe, Staats. "Self-attention Does Not Need O(n^2) Memory." 2021. arXiv:2112.05682.
"""

import torch

from manyheads.core import Scores, mechanism


def reference(q, k, v):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        w = torch.softmax(q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(reference=reference, arxiv="2112.05682", system="memory-efficient-attention")
def causal() -> Scores:
    """Softmax over the past."""
    return Scores(mask=lambda b, h, i, j: j <= i)
