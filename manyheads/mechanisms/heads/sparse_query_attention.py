"""Sparse query attention: fewer query heads than the model has heads, which divides the cost of the scores.

    O = [head_1 ... head_{H_q}] W_O,   head_n = softmax(Q_n K_{g(n)}^T / sqrt(d)) V_{g(n)},   H_q < H

g(n) is the key and value head that query head n shares, as in grouped-query attention. Each head is causal softmax
attention: what differs is how many there are, so this says it to the layer. The paper's SQA has H_q = H / 2 and half as
many key and value heads again; its symmetric form, as many as query heads, is what a layer takes unless told.

Filipek. "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads Reduction."
2025. arXiv:2510.01817.
"""

import torch

from manyheads.core import Law, Projections, Scores, mechanism


def reference(q, k, v, *, query_share=0.5):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        w = torch.softmax(q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2510.01817",
    system="sparse-query-attention",
    examples=({}, {"query_share": 0.25}),
    laws=(Law({}, "causal"),),
    trained=True,
    ranges={"query_share": (1e-3, 1)},
)
def sparse_query_attention(query_share: float = 0.5) -> Scores:
    """A layer keeps `query_share` of the model's heads."""
    return Scores(mask=lambda b, h, i, j: j <= i, projections=Projections(query_share=query_share))
