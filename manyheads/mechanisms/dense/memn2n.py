"""End-to-end memory networks: a question reads the memory several times, each time with what it read before.

    p^n_ij = softmax_j(u^n_i . k_j),   o^n_i = sum_j p^n_ij v_j,   u^{n+1}_i = H u^n_i + G o^n_i
    o_i = o^N_i

from u^1 = q, with N hops. Memories are keys in one embedding and values in another, the same for all hops: the paper's
layer-wise tying, where G is the identity, as it starts here. An answer is read from o^N + u^N: the residual is a
layer's, as are its embeddings of sentences and their order in time. Nothing divides by sqrt(d), and there is one head.

Sukhbaatar, Szlam, Weston, Fergus. "End-To-End Memory Networks." 2015. arXiv:1503.08895.
"""

import torch

from manyheads.core import Function, Law, Operand, mechanism, one
from manyheads.core.maps import attention_map, read


def reference(q, k, v, *, h, g, hops=3):
    out = []
    for i in range(q.shape[-2]):
        u = q[..., i, :]
        for _ in range(hops):
            p = torch.softmax((u[..., None, :] * k).sum(-1), -1)
            o = (p[..., None] * v).sum(-2)
            u = torch.einsum("hde,bhe->bhd", h, u) + torch.einsum("hde,bhe->bhd", g, o)
        out.append(o)
    return torch.stack(out, -2)


def identity(w):
    return w.copy_(torch.eye(*w.shape[-2:], dtype=w.dtype, device=w.device).expand_as(w))


@mechanism(
    reference=reference,
    arxiv="1503.08895",
    system="memn2n",
    examples=({}, {"hops": 1}, {"hops": 2}),
    laws=(Law({"hops": 1}, "luong_attention"),),
    causal=False,
    trained=True,
    tolerance=2.0,
    tolerance_reason="scores that nothing divides by sqrt(d) reach tens, and a hop's error is in the next one's scores",
)
def memn2n(hops: int = 3) -> Function:
    """Softmax over all keys, `hops` times."""

    def forward(q, k, v, *, scale, h, g):
        wide = torch.promote_types(q.dtype, torch.float32)
        u, h, g = q.to(wide), h.to(wide), g.to(wide)
        o = read(attention_map(u, k, scale), v.to(wide))
        for _ in range(hops - 1):
            u = u @ h.mT + o @ g.mT
            o = read(attention_map(u, k, scale), v.to(wide))
        return o.to(q.dtype)

    return Function(
        forward=forward, default_scale=one,
        operands={
            "h": Operand("heads head_dim head_dim", init=identity),
            "g": Operand("heads head_dim v_head_dim", init=identity),
        },
    )  # fmt: skip
