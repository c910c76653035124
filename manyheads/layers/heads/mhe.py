"""Multi-head embeddings (MHE): one projection for all heads, which an embedding of each head tells apart.

    q_i = (x W_Q) * (1 + e_i^Q)   ("mul"),   or   q_i = x W_Q + e_i^Q   ("add"),   and likewise k_i and v_i
    out = [o_1 ... o_n] W_O,   o_i = softmax(q_i K_i^T / sqrt(d)) V_i

W_Q, W_K, W_V are dim x d, d the size of one head. The n heads cost 3 n d numbers more than a single one.

Xue, Aletras. "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head
Attention." 2023. arXiv:2310.07911.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of


def reference(module, x):
    rows = []
    for row in x:
        qkv = []
        for p, e in ((module.q, module.q_heads), (module.k, module.k_heads), (module.v, module.v_heads)):
            u = row @ p.weight.T
            qkv.append(torch.stack([u + e_i if module.add else u + u * e_i for e_i in e]))
        rows.append(torch.cat(list(softmax_heads(*qkv)), -1) @ module.o.weight.T)
    return torch.stack(rows)


def one_head():
    """With embeddings of 0 a single head is ordinary single-head attention."""
    module = MultiHeadEmbedding(10, 1, head_dim=4)
    plain = Attention(10, 1, head_dim=4, rope_theta=None)
    for name in "qkvo":
        setattr(plain, name, getattr(module, name))
    for e in (module.q_heads, module.k_heads, module.v_heads):
        nn.init.zeros_(e)
    return module, plain


def weights(dim, heads, head_dim=None, add=False):
    d = head_dim or dim // heads
    return 3 * dim * d + 3 * heads * d + heads * d * dim


@layer(
    reference=reference,
    arxiv="2310.07911",
    system="mhe",
    examples=({"dim": 10, "heads": 3, "head_dim": 4}, {"dim": 12, "heads": 4, "add": True}),
    laws=(one_head,),
    weights=weights,
)
class MultiHeadEmbedding(nn.Module):
    """Causal, without positions. head_dim: default dim // heads. `add`: embeddings are added, not multiplied."""

    def __init__(self, dim: int, heads: int, *, head_dim: int | None = None, add: bool = False):
        super().__init__()
        d = head_dim or dim // heads
        self.dim, self.add = dim, add
        self.q, self.k, self.v = (nn.Linear(dim, d, bias=False) for _ in range(3))
        # Small and random: equal embeddings would make heads equal for good.
        self.q_heads, self.k_heads, self.v_heads = (nn.Parameter(0.02 * torch.randn(heads, d)) for _ in range(3))
        self.o = nn.Linear(heads * d, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        projected = ((self.q(x), self.q_heads), (self.k(x), self.k_heads), (self.v(x), self.v_heads))
        q, k, v = (self.tell_apart(u[:, None], e[:, None]) for u, e in projected)
        o = attention(q, k, v, "causal", q_positions=positions, kv_positions=positions)
        return self.o(o.transpose(1, 2).flatten(2))

    def tell_apart(self, u: Tensor, e: Tensor) -> Tensor:
        return u + e if self.add else u * (1 + e)
