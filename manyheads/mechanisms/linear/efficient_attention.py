"""Efficient attention: softmax over the channels of each query and over the tokens of each key channel.

    G = sum_j rho_k(K)_j v_j^T,   o_i = G^T rho_q(q_i)
    rho_q(q)_c = exp(q_c) / sum_c' exp(q_c'),   rho_k(K)_{jc} = exp(k_jc) / sum_j' exp(k_j'c)

Each channel of the keys is one attention map over all tokens, and a query mixes these maps. There is no scale. The
1x1 convolutions and the residual around it are the block's.

Shen, Zhang, Zhao, Yi, Li. "Efficient Attention: Attention with Linear Complexities." 2018. arXiv:1812.01243.
"""

import torch

from manyheads.core import Recurrence, mechanism, one


def reference(q, k, v):
    weights = k.exp() / k.exp().sum(-2, keepdim=True)
    context = sum(weights[..., j, :, None] * v[..., j, None, :] for j in range(k.shape[-2]))
    return torch.cat([q[..., i : i + 1, :].softmax(-1) @ context for i in range(q.shape[-2])], -2)


@mechanism(
    reference=reference,
    arxiv="1812.01243",
    system="efficient-attention-shen",
    causal=False,
    trained=True,
)
def efficient_attention() -> Recurrence:
    """The paper's softmax normalisation."""
    return Recurrence(query_feature=lambda q: q.softmax(-1), key_softmax=True, causal=False, default_scale=one)
