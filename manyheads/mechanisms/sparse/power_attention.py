"""PowerAttention: blocks of keys at distances that are powers of two, so that d layers reach 2^d blocks.

    x = block(i) - block(j)
    S_i = {j <= i : x < window_blocks, or x = 0, 1, 2, 4, 8, ..., or block(j) = 0}
    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j

The paper trains models on with it, and keeps full attention in some layers.

Chen, Xu, An, et al. "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention."
2025. arXiv:2503.03588, algorithm 1.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, block_size=256, window_blocks=5):
    offset, out = k.shape[-2] - q.shape[-2], []
    powers = {2**n for n in range(40)}
    for i in range(q.shape[-2]):
        seen = []
        for j in range(offset + i + 1):
            distance = (offset + i) // block_size - j // block_size
            if distance < window_blocks or distance == 0 or distance in powers or j < block_size:
                seen.append(j)
        w = torch.softmax(q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2503.03588",
    system="power-attention",
    examples=({"block_size": 2, "window_blocks": 3}, {"block_size": 1, "window_blocks": 1}),
    laws=(Law({"block_size": 2, "window_blocks": 10**9}, "causal"), Law({"block_size": 10**6}, "causal")),
    at=lambda context: {"block_size": max(1, context // 32)},
    ranges={"window_blocks": (0, math.inf)},
)
def power_attention(block_size: int = 256, window_blocks: int = 5) -> Scores:
    """Blocks of `block_size` keys: the last `window_blocks`, the first, and those at powers of two."""

    def mask(b, h, i, j):
        distance = i // block_size - j // block_size
        power = (distance & (distance - 1)) == 0  # of two, or zero
        return (j <= i) & ((distance < window_blocks) | power | (j < block_size))

    return Scores(mask=mask)
