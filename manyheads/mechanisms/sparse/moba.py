"""Mixture of block attention: each query attends to its own block and to the past blocks whose mean key it likes best.

    s_n = q_i . mean(K_n),   I_i = top-k of {s_n : n < block(i)} together with block(i), k counting it
    o_i = sum_{j <= i, block(j) in I_i} softmax_j(q_i . k_j / sqrt(d)) v_j

The gate only chooses: no gradient flows through it.

Lu et al. "MoBA: Mixture of Block Attention for Long-Context LLMs." 2025. arXiv:2502.13189.
"""

import torch

from manyheads.core import Law, Scores, Selection, mechanism
from manyheads.core.choosing import Past, best_past, block_means


def reference(q, k, v, *, block_size=512, top_k=3):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        past = k[..., : offset + i + 1, :]
        q_i, own = q[..., i, :], (offset + i) // block_size
        means = [past[..., n * block_size : (n + 1) * block_size, :].mean(-2) for n in range(own)]
        likes = (
            torch.stack([(q_i * mean).sum(-1) for mean in means], -1) if means else q_i.new_zeros(*q_i.shape[:-1], 0)
        )
        best = likes.topk(min(top_k - 1, own), dim=-1).indices
        block = torch.arange(past.shape[-2]) // block_size
        seen = (block == own) | (block[:, None] == best[..., None, :]).any(-1)
        s = (past @ q_i[..., None]).squeeze(-1) / q.shape[-1] ** 0.5
        out.append(s.masked_fill(~seen, -torch.inf).softmax(-1)[..., None, :] @ v[..., : offset + i + 1, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2502.13189",
    system="moba",
    examples=({"block_size": 4, "top_k": 2}, {"block_size": 3, "top_k": 1}),
    laws=(Law({"block_size": 4, "top_k": 10**6}, "causal"), Law({"block_size": 10**6}, "causal")),
    at=lambda context: {"block_size": max(16, context // 32), "top_k": 8},
)
def moba(block_size: int = 512, top_k: int = 3) -> Selection:
    """`top_k` blocks of `block_size` keys for each query, its own included."""

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        return best_past(q, block_means(k, block_size), top_k, Past(query_block=1, key_block=block_size, offset=offset))

    return Selection(select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=1, key_block=block_size)
