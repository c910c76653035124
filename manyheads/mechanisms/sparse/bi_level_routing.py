"""Bi-level routing: each region of tokens attends to the few regions that its mean query likes best, in all heads.

    A^r_mn = sum_h mean(Q^h_m) . mean(K^h_n),   I_m = top-k of row m of A^r
    o_i = sum_{region(j) in I_region(i)} softmax_j(q_i . k_j / sqrt(d)) v_j

The routing only chooses: no gradient flows through it. A region is a run of `region_size` tokens, so an image's tokens
are passed region by region, in the order of `region_order`. The paper adds a depthwise convolution of V to o, over the
image's rows and columns: that belongs to a layer. Its code divides scores by the square root of the whole width, not of
one head's, which `scale` can ask for.

Zhu, Wang, Ke, Zhang, Lau. "BiFormer: Vision Transformer with Bi-Level Routing Attention." 2023. arXiv:2303.08810.
"""

import torch

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import best_blocks, block_means, products


def reference(q, k, v, *, region_size=64, top_k=4):
    n, offset, out = k.shape[-2], k.shape[-2] - q.shape[-2], []
    for q_b, k_b, v_b in zip(q, k, v, strict=True):
        tokens = []
        for i in range(offset, n):
            first = i // region_size * region_size
            mean = q_b[:, max(0, first - offset) : first + region_size - offset].mean(1)
            likes = {m: (mean * k_b[:, m : m + region_size].mean(1)).sum().item() for m in range(0, n, region_size)}
            chosen = sorted(likes, key=lambda m: -likes[m])[:top_k]
            seen = [j for j in range(n) if j // region_size * region_size in chosen]
            w = torch.softmax(q_b[:, i - offset, None] @ k_b[:, seen].mT / q.shape[-1] ** 0.5, -1)
            tokens.append(w @ v_b[:, seen])
        out.append(torch.cat(tokens, 1))
    return torch.stack(out)


@mechanism(
    reference=reference,
    arxiv="2303.08810",
    system="biformer-bra",
    examples=({"region_size": 4, "top_k": 2}, {"region_size": 3, "top_k": 1}),
    laws=(Law({"region_size": 4, "top_k": 10**6}, "full"), Law({"region_size": 10**6}, "full")),
    causal=False,
    trained=True,
    at=lambda context: {"region_size": max(1, context // 32), "top_k": 8},
)
def bi_level_routing(region_size: int = 64, top_k: int = 4) -> Selection:
    """`top_k` regions of `region_size` tokens for each region. The defaults are those of the paper's first layers, with
    7 x 7 regions of a map of 56 x 56, and of its code; deeper layers take 4, 16 and all regions."""

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        likes = products(block_means(q, region_size, offset % region_size), block_means(k, region_size)).sum(1)
        blocks, heads = best_blocks(likes[:, None], top_k), q.shape[1]
        return Blocks(blocks.indices.expand(-1, heads, -1, -1), blocks.counts.expand(-1, heads, -1))

    return Selection(select=select, scores=Scores(), query_block=region_size, key_block=region_size)


def region_order(height: int, width: int, side: int) -> torch.Tensor:
    """For a map stored row by row, the index [height * width] that puts its side x side regions one after another;
    its argsort undoes that. Raises ValueError if `side` does not divide both."""
    if height % side or width % side:
        raise ValueError(f"a map of {height} x {width} has no {side} x {side} equal regions")
    return torch.arange(height * width).view(side, height // side, side, width // side).transpose(1, 2).flatten()
