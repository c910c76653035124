"""Reversed attention: a token sends its value to the tokens it attends to, instead of gathering theirs.

    A_ij = softmax_j(q_i . k_j / sqrt(d)),   o_j = sum_i A_ij P_i m_i v_i

with P_i = softmax_h(W x_i / 0.1), how much of head h token i uses, and m_i in (0, 1), how much of its message is left:
the product of sigmoid(MLP(x_i)) over the layers so far. Each sender gives exactly P_i m_i in all, and a receiver may
get any amount; who receives most of a token is its parent, and a dependency tree emerges. A token without a query
sends nothing.

Ding, Shen, Fan, et al. "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention." 2023.
arXiv:2304.03282.
"""

import torch

from manyheads.core import Function, Operand, mechanism
from manyheads.core.maps import attention_map


def reference(q, k, v, *, selector, message):
    n, q_len = k.shape[-2], q.shape[-2]
    offset = n - q_len
    out = torch.zeros_like(v)
    for i in range(q_len):
        sent = torch.softmax(q[..., i : i + 1, :] @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        left = selector[:, :, offset + i] * message[:, None, offset + i]
        out = out + sent.mT * left[..., None, None] * v[:, :, offset + i, None]
    return out[:, :, offset:]


@mechanism(
    reference=reference, arxiv="2304.03282", system="dependencyvit-reversed-attention", causal=False, trained=True
)
def reversed_attention() -> Function:
    """`selector` shares a token among heads, `message` says how much of it is sent."""

    def forward(q, k, v, *, scale, selector, message):
        offset = k.shape[2] - q.shape[2]
        if offset < 0:
            raise ValueError(f"reversed_attention sends a value for each query: {q.shape[2]} exceed {k.shape[2]} keys")
        weights = attention_map(q, k, scale)[..., offset:]
        left = (selector * message[:, None])[:, :, offset:].unflatten(1, (v.shape[1], -1))
        sent = left[..., None].to(weights.dtype) * v[:, :, None, offset:]
        return (weights.mT @ sent.flatten(1, 2)).to(v.dtype)

    return Function(
        forward=forward,
        operands={
            "selector": Operand("batch heads len", lambda x: (x / 0.1).softmax(1)),
            "message": Operand("batch len", torch.sigmoid),
        },
    )
