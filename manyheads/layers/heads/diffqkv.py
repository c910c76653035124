"""DiffQKV attention, Sigma's: queries, keys and values have numbers of heads of their own, keys the fewest.

    o_h = softmax(q_h K_a^T / sqrt(d)) V_b,   a = floor(h n_k / n_q),   b = floor(h n_v / n_q)

Sigma's 1.5B model has 32 query, 4 key and 16 value heads, and a cache of (4 + 16) / (16 + 16) of that of 16 of both.
`manyheads.attention` wants as many key heads as value heads, so the fewer are repeated for the call: what is saved is
weights, and what a cache would store. The paper's wider queries (augmented Q), its keys of half the width and its
loading of only some values are not here.

Lin, Tang, Liu, Gong, et al. "Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models."
2025. arXiv:2501.13629.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, softmax_heads, turned
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, rotate, split


def reference(module, x):
    rows = []
    for row in x:
        q = turned(cut(row @ module.q.weight.T, module.heads), module.rope_theta)
        k = turned(cut(row @ module.k.weight.T, module.k_heads), module.rope_theta)
        o = softmax_heads(q, k, cut(row @ module.v.weight.T, module.v_heads))
        rows.append(torch.cat(list(o), -1) @ module.o.weight.T)
    return torch.stack(rows)


def as_many_keys_as_values():
    """With n_k = n_v it is grouped-query attention."""
    module, plain = DiffQKV(16, 8, k_heads=4, v_heads=4), Attention(16, 8, kv_heads=4)
    plain.load_state_dict(module.state_dict())
    return module, plain


def weights(dim, heads, k_heads, v_heads, head_dim=None, rope_theta=None):
    return dim * (head_dim or dim // heads) * (2 * heads + k_heads + v_heads)


@layer(
    reference=reference,
    arxiv="2501.13629",
    system="sigma-diffqkv",
    examples=(
        {"dim": 16, "heads": 8, "k_heads": 2, "v_heads": 4},
        {"dim": 10, "heads": 4, "k_heads": 4, "v_heads": 2, "head_dim": 3, "rope_theta": None},
    ),
    laws=(as_many_keys_as_values,),
    weights=weights,
)
class DiffQKV(nn.Module):
    """Causal. k_heads and v_heads divide heads, and one of them the other. head_dim: default dim // heads."""

    def __init__(
        self, dim: int, heads: int, *, k_heads: int, v_heads: int, head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
    ):  # fmt: skip
        super().__init__()
        if heads % k_heads or heads % v_heads or max(k_heads, v_heads) % min(k_heads, v_heads):
            raise ValueError(f"k_heads {k_heads} and v_heads {v_heads} must divide heads {heads}, and one the other")
        d = head_dim or dim // heads
        if rope_theta is not None and d % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {d}; or rope_theta=None")
        self.dim, self.heads, self.k_heads, self.v_heads, self.rope_theta = dim, heads, k_heads, v_heads, rope_theta
        self.q = nn.Linear(dim, heads * d, bias=False)
        self.k = nn.Linear(dim, k_heads * d, bias=False)
        self.v = nn.Linear(dim, v_heads * d, bias=False)
        self.o = nn.Linear(heads * d, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k = split(self.q(x), self.heads), split(self.k(x), self.k_heads)
        v = split(self.v(x), self.v_heads)
        if self.rope_theta is not None:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
        most = max(self.k_heads, self.v_heads)
        k, v = k.repeat_interleave(most // self.k_heads, 1), v.repeat_interleave(most // self.v_heads, 1)
        o = attention(q, k, v, "causal", q_positions=positions, kv_positions=positions)
        return self.o(o.transpose(1, 2).flatten(2))
