"""Transformer attention bottleneck (TAB): the class token's attention, gated by what it does not spend on itself.

    A = softmax(q k^T / sqrt(d)),   o_i = sum_j A_ij v_j for i > 0,   o_0 = (1 - A_00) sum_j A_0j v_j

with the class token at 0. With one head and no residual around it, as in the paper, an image has no other way through
than (1 - A_00)^2, the weight on its patches: where A_00 = 1 nothing is seen. For two images the queries are those of
one and keys and values of the other. Where the class token is not among the queries, nothing is gated.

Rahmanzadehgervi, Nguyen, Zhang, et al. "TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging
in Vision-Language Models." 2024. arXiv:2412.18675.
"""

import torch

from manyheads.core import Function, mechanism
from manyheads.core.maps import attention_map, read


def reference(q, k, v):
    out = []
    for i in range(q.shape[-2]):
        w = torch.softmax(q[..., i : i + 1, :] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        first = i + k.shape[-2] - q.shape[-2] == 0
        out.append((1 - w[..., :1] if first else 1) * (w @ v))
    return torch.cat(out, -2)


@mechanism(reference=reference, arxiv="2412.18675", system="tab-attention-bottleneck", causal=False, trained=True)
def attention_bottleneck() -> Function:
    """The class token at 0 reads with what it does not keep for itself."""

    def forward(q, k, v, *, scale):
        weights = attention_map(q, k, scale)
        if q.shape[2] == k.shape[2]:
            gate = torch.ones_like(weights[..., :1])
            gate[:, :, 0] = 1 - weights[:, :, 0, :1]
            weights = gate * weights
        return read(weights, v)

    return Function(forward=forward)
