"""Relational attention: what is read from a token is how it relates to the query, beside a symbol that names it.

    a_ij = softmax_{j <= i}(q_i . k_j / sqrt(d)),   r_ijl = x_il . y_jl / sqrt(p),   l = 1 ... R
    o_i^h = sum_{j <= i} a_ij^h (W_r^h r_ij + s_j^h)

with x, y further projections of the same tokens, the same for all heads, and s_j, the values, projections of symbols
instead of tokens. A dual attention layer has heads of this kind beside ordinary ones; by default as many relations as
relational heads. Symmetric relations have x = y.

Altabaa, Lafferty. "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures."
2024. arXiv:2405.16727.
"""

import torch

from manyheads.core import Function, Operand, as_linear, mechanism
from manyheads.core.maps import attention_map, read


def reference(q, k, v, *, x, y, w_r, relations=8, width=64):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        a = torch.softmax(q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        r = (x[:, :, offset + i, None] * y[:, :, seen]).sum(-1) / width**0.5
        messages = torch.einsum("hel,blj->bhje", w_r, r) + v[..., seen, :]
        out.append(a @ messages)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2405.16727",
    system="dual-attention-transformer",
    examples=({"relations": 3, "width": 2}, {"relations": 1, "width": 5}),
    trained=True,
)
def relational_attention(relations: int = 8, width: int = 64) -> Function:
    """`relations` inner products, each of `width` channels; the paper has head_dim * heads / relations channels."""

    def forward(q, k, v, *, scale, x, y, w_r):
        a = attention_map(q, k, scale, causal=True)
        wide = a.dtype
        # sum_j a_ij r_ij = x_i . sum_j a_ij y_j: what each relation reads, then its product with the query's side.
        found = torch.einsum("bhij,bljp->bhilp", a, y.to(wide))
        asking = torch.nn.functional.pad(x.to(wide), (0, 0, q.shape[2] - k.shape[2], 0))  # the queries are the last
        r = torch.einsum("bhilp,blip->bhil", found, asking) / width**0.5
        return (read(a, v.to(wide)) + r @ w_r.to(wide).mT).to(v.dtype)

    tokens, mixing = f"batch {relations} len {width}", f"heads v_head_dim {relations}"
    # A layer's projections start at 0, where a product of two has no gradient.
    side = Operand(tokens, lambda raw: 1 + raw)
    return Function(forward=forward, operands={"x": side, "y": side, "w_r": Operand(mixing, init=as_linear)})
