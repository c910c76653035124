"""Deconstructed attention: two relaxations of the form of softmax attention, made to see what of it matters.

    approximate:      A_ij = t(s_ij) / sum_{j <= i} t(s_ij),   t(s) = 1 + s + s^2 / 2,   s_ij = q_i . k_j / sqrt(d)
    non_approximate:  A_ij = softmax_{j <= i}(g_j . k_j / sqrt(d)),   g_j = silu(W x_j)
    o_i = sum_{j <= i} A_ij v_j

The first is the exponential's Taylor polynomial, which is never 0 or less. The second knows no queries: a token weighs
what it weighs for all that follow, against a sum that only grows. The paper's further variants compute softmax
attention: with queries and keys of random, fixed or static embeddings; its last one mixes no tokens.

Xue, Moosavi, Aletras. "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling."
2025. arXiv:2510.11602. All orders of the polynomial are divided by one sum, as in its equation 6 and in what it follows
(Arora, Eyuboglu, Zhang, et al., arXiv:2402.18668); its appendix writes a sum for each order.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Function, Operand, Scores, mechanism
from manyheads.core.maps import read, softmax_of_past
from manyheads.core.names import unknown

VARIANTS = ("approximate", "non_approximate")


def reference(q, k, v, *, variant="approximate", g=None):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        if variant == "approximate":
            s = (q[..., i, None, :] * k[..., seen, :]).sum(-1) / q.shape[-1] ** 0.5
            w = 1 + s + s**2 / 2
            w = w / w.sum(-1, keepdim=True)
        else:
            assert g is not None, "this variant declares it"
            products = (g[..., seen, c] * k[..., seen, c] for c in range(g.shape[-1]))
            w = torch.softmax(sum(products) / q.shape[-1] ** 0.5, -1)
        out.append(w[..., None, :] @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2510.11602",
    system="deconstructing-attention",
    examples=({}, {"variant": "non_approximate"}),
    trained=True,
)
def deconstructed_attention(variant: str = "approximate") -> Scores | Function:
    """`variant` is "approximate" or "non_approximate"."""
    if variant not in VARIANTS:
        raise ValueError(unknown("variant", variant, VARIANTS))
    if variant == "approximate":
        return Scores(
            mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: torch.log(1 + s + s * s / 2)
        )  # fmt: skip

    def forward(q, k, v, *, scale, g):
        wide = torch.promote_types(q.dtype, torch.float32)
        s = scale * (g.to(wide) * k.to(wide)).sum(-1)
        weights = softmax_of_past(s[:, :, None].expand(-1, -1, q.shape[2], -1))
        return read(weights.repeat_interleave(q.shape[1] // k.shape[1], 1), v)

    return Function(forward=forward, operands={"g": Operand("batch kv_heads len head_dim", F.silu)})
