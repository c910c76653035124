"""S2-attention: all heads see recent blocks, and each its own shard of the older ones, so that heads share the past.

    S_i = {j <= i : block(i) - block(j) < local_blocks, or (block(j) + g step) mod stride = 0},   g = h // group
    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j

Stripes stand at absolute positions: a key that a head has left out once is never read by it again, and its place in the
cache is free. With step = 1, `stride` heads together see everything; fewer spread evenly with step = stride // heads.
Query heads that share a key head share its stripes: `group` is how many they are. Key heads from number `sparse_heads`
on are dense, and the paper's models have dense layers too. Defaults are those of the released kernels' example.

Lin, Zhang, Ge, Ren, et al. "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads." 2024.
arXiv:2407.17678, whose first version is called "Efficient LLM Training and Serving with Heterogeneous Context Sharding
among Attention Heads".
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, block_size=64, local_blocks=32, stride=8, step=1, group=1, sparse_heads=None):
    n, out = k.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for h in range(q.shape[1]):
        shard = h // group
        for row, i in enumerate(range(n - q.shape[-2], n)):
            seen = []
            for j in range(i + 1):
                recent = i // block_size - j // block_size < local_blocks
                striped = (j // block_size + shard * step) % stride == 0
                dense = sparse_heads is not None and shard >= sparse_heads
                if recent or striped or dense:
                    seen.append(j)
            w = torch.softmax(q[:, h, row, None] @ k[:, h, seen].mT / q.shape[-1] ** 0.5, -1)
            out[:, h, row] = (w @ v[:, h, seen])[:, 0]
    return out


@mechanism(
    reference=reference,
    arxiv="2407.17678",
    system="s2-attention",
    examples=(
        {"block_size": 2, "local_blocks": 1, "stride": 3, "group": 2},
        {"block_size": 1, "local_blocks": 2, "stride": 8, "step": 2, "sparse_heads": 3},
    ),
    laws=(
        Law({"block_size": 2, "local_blocks": 1, "stride": 1}, "causal"),
        Law({"block_size": 2, "local_blocks": 10**6}, "causal"),
        Law({"block_size": 2, "local_blocks": 1, "sparse_heads": 0}, "causal"),
    ),
    at=lambda context: {"block_size": max(1, context // 32), "local_blocks": 4, "stride": 8},
    ranges={"sparse_heads": (0, math.inf)},
)
def s2_attention(
    block_size: int = 64, local_blocks: int = 32, stride: int = 8, step: int = 1, group: int = 1,
    sparse_heads: int | None = None,
) -> Scores:  # fmt: skip
    """The last `local_blocks` blocks of `block_size` keys and every `stride`-th, `step` blocks further in each head."""

    def mask(b, h, i, j):
        shard, column = h // group, j // block_size
        kept = (i // block_size - column < local_blocks) | ((column + shard * step) % stride == 0)
        if sparse_heads is not None:
            kept = kept | (shard >= sparse_heads)
        return (j <= i) & kept

    return Scores(mask=mask)
