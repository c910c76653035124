"""Full softmax attention: every query sees every key.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

computed, as `causal` is, with a running maximum and a running sum, so that memory is linear in length.

Rabe, Staats. "Self-attention Does Not Need O(n^2) Memory." 2021. arXiv:2112.05682.
"""

import torch

from manyheads.core import Scores, mechanism


def reference(q, k, v):
    out = []
    for i in range(q.shape[-2]):
        w = torch.softmax(q[..., i : i + 1, :] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v)
    return torch.cat(out, -2)


@mechanism(reference=reference, arxiv="2112.05682", system="memory-efficient-attention", causal=False)
def full() -> Scores:
    """Softmax over all keys."""
    return Scores()
