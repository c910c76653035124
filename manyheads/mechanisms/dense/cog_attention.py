"""Cog attention: weights may be negative, the score's sign being moved out of the softmax.

    s_ij = q_i . k_j / sqrt(d)
    o_i = sum_{j <= i} sign(s_ij) softmax_j(|s_ij|) v_j

The sign has no gradient. The paper keeps ordinary softmax in a model's first and last layer.

Lv, Xie, Li, et al. "More Expressive Attention with Negative Weights." 2024. arXiv:2411.07176.
"""

import torch

from manyheads.core import Scores, mechanism


def reference(q, k, v):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        s = q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5
        out.append((torch.sign(s) * torch.softmax(s.abs(), dim=-1)) @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(reference=reference, arxiv="2411.07176", system="cog-attention", trained=True)
def cog_attention() -> Scores:
    """Signed softmax over the past."""
    return Scores(mask=lambda b, h, i, j: j <= i, normaliser="signed")
