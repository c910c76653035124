"""Positional attention: who attends to whom depends on positions alone, never on the tokens' content.

    A = softmax(P W_Q (P W_K)^T / sqrt(d)),   o = A V

with P the positional encodings, the same in every layer and for every input. Once q = P W_Q and k = P W_K are given
this is softmax over all keys; that they come from positions is what a layer does with it.

Back de Luca, Giapitzakis, Yang, et al. "Positional Attention: Expressivity and Learnability of Algorithmic
Computation." 2024. arXiv:2410.01686. The experiments use one-hot P.
"""

import torch

from manyheads.core import Law, Projections, Scores, mechanism


def reference(q, k, v):
    out = []
    for i in range(q.shape[-2]):
        w = torch.softmax(q[..., i : i + 1, :] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2410.01686",
    system="positional-attention",
    laws=(Law({}, "full"),),
    causal=False,
    trained=True,
)
def positional_attention() -> Scores:
    """Softmax over all keys, with queries and keys from positions."""
    return Scores(projections=Projections(scores_from="positions"))
