"""Dependency attention: every token sends what it holds to its parents, in heads of its choice, as long as it may.

    A_ij = softmax_j(q_i . k_j / sqrt(d)) of each head,   P_i = softmax_h(W_p x_i / 0.1)
    m_i = m'_i sigmoid(w_2 . gelu(W_1 x_i)),   y_j = W_o [sum_i A_ij P_i m_i v_i of each head]

with m' the product of the layers before. Of a token's mass sum_h P_i^h A_ij m_i is what j gets: the one that gets most
is its parent. Tokens that pass little on are leaves, and the paper's light model drops the least of them in some
layers; at the end of its models tokens are averaged with m as their weight.

Ding, Shen, Fan, et al. "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention." 2023.
arXiv:2304.03282. No biases but the output's, as the paper writes weights alone.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.maps import attention_map
from manyheads.core.plain import cut
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split


def reference(module, x):
    rows = []
    for row in x:
        q, k, v = (cut(row @ p.weight.T, module.heads) for p in (module.q, module.k, module.v))
        received = [torch.zeros_like(token) for token in row]
        for i, token in enumerate(row):
            left = torch.sigmoid(module.more.weight @ nn.functional.gelu(module.less.weight @ token))
            shares = torch.softmax(module.selector.weight @ token / 0.1, 0)
            sent = [torch.softmax(k[h] @ q[h, i] / q.shape[-1] ** 0.5, 0) for h in range(module.heads)]
            for j in range(len(row)):
                parts = [sent[h][j] * shares[h] * left * v[h, i] for h in range(module.heads)]
                received[j] = received[j] + torch.cat(parts)
        rows.append(torch.stack([module.o(y) for y in received]))
    return torch.stack(rows)


@layer(
    reference=reference,
    arxiv="2304.03282",
    system="dependencyvit-reversed-attention",
    examples=({"dim": 12, "heads": 3}, {"dim": 8, "heads": 2}),
    causal=False,
)
class DependencyAttention(nn.Module):
    """Reversed attention with a head selector and a message controller."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and a multiple of heads {heads}")
        self.dim, self.heads = dim, heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim)
        self.selector = nn.Linear(dim, heads, bias=False)
        self.less, self.more = nn.Linear(dim, dim // 2, bias=False), nn.Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor, message: Tensor | None = None, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; message [batch, len], what `messages` of the layer before gave, 1 if there is none;
        present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        o = attention(
            split(self.q(x), self.heads), split(self.k(x), self.heads), split(self.v(x), self.heads),
            "reversed_attention", q_positions=positions, kv_positions=positions,
            selector=self.shares(x), message=self.messages(x, message),
        )  # fmt: skip
        y = self.o(o.transpose(1, 2).flatten(2))
        return y if present is None else y.masked_fill(~present[..., None], 0.0)

    def shares(self, x: Tensor) -> Tensor:
        """How much of each head a token uses, [batch, heads, len]."""
        return (self.selector(x) / 0.1).softmax(-1).mT

    def messages(self, x: Tensor, message: Tensor | None = None) -> Tensor:
        """How much of a token is left to send after this layer, [batch, len]."""
        left = self.more(nn.functional.gelu(self.less(x))).sigmoid().squeeze(-1)
        return left if message is None else left * message

    def dependencies(self, x: Tensor, message: Tensor | None = None) -> Tensor:
        """What token i of x [batch, len, dim] sends to token j, over all heads: [batch, len, len], i before j."""
        q, k = split(self.q(x), self.heads), split(self.k(x), self.heads)
        sent = attention_map(q, k, q.shape[-1] ** -0.5) * self.shares(x)[..., None]
        return sent.sum(1) * self.messages(x, message)[..., None]
