"""Explicit sparse attention: a softmax over the k largest scores of each query.

    o_i = sum_{j in T_i} softmax_{j in T_i}(q_i . k_j / sqrt(d)) v_j,   T_i = {j: s_ij >= the k-th largest of s_i}

with s_ij the scores. Scores that equal the k-th largest are all kept, as in the authors' code; a query that sees fewer
than k keys keeps them all. No gradient flows through the choice.

Zhao, Lin, Zhang, et al. "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection." 2019.
arXiv:1912.11637. In models trained with softmax: Gupta, Dar, Goodman, et al. "Memory-efficient Transformers via Top-k
Attention." 2021. arXiv:2106.06899. Only their abstracts and the first one's code were at hand.
"""

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, top_k=8, causal=False):
    out, before = [], k.shape[-2] - q.shape[-2]
    for i in range(q.shape[-2]):
        s = (q[..., i, None, :] * k).sum(-1) / q.shape[-1] ** 0.5
        if causal:
            s = s[..., : before + i + 1]
        larger = (s[..., None, :] > s[..., :, None]).sum(-1)
        p = torch.softmax(s.where(larger < top_k, -torch.inf), -1)
        out.append(p[..., None, :] @ v[..., : s.shape[-1], :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="1912.11637",
    examples=({}, {"top_k": 1}, {"top_k": 3, "causal": True}),
    laws=(Law({"top_k": 10000}, "full"), Law({"top_k": 10000, "causal": True}, "causal")),
    causal=False,
)
def explicit_sparse(top_k: int = 8, causal: bool = False) -> Scores:
    """The `top_k` best of all keys, or of those up to the query's own."""
    return Scores(mask=past if causal else None, normaliser="top_k", top_k=top_k)


def past(b, h, i, j):
    return j <= i
