"""Fixed head size: heads as wide as the text is long, however many there are, so that none is too narrow to say all.

    out = [o_1 ... o_h] W_O,   o_i = softmax(q_i K_i^T / sqrt(d_p)) V_i,   W_Q^i, W_K^i, W_V^i [dim, d_p]

Scores q_i K_i^T have rank d_p at most. The paper proves that with d_p of at least the length a head can have any
positive attention matrix over linearly independent tokens, and that with less there are some which it cannot. The
usual d_p = dim / h makes heads narrower the more there are; here d_p is a size of its own.

Bhojanapalli, Yun, Rawat, Reddi, Kumar. "Low-Rank Bottleneck in Multi-head Attention Models." 2020. arXiv:2002.07028.
"""

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of
from manyheads.nn import Attention


def reference(module, x):
    a = module.attention
    return torch.stack([torch.cat(list(heads_of(a, row)), -1) @ a.o.weight.T for row in x])


def narrow_heads():
    """With d_p = dim / h it is ordinary multi-head attention."""
    module, plain = FixedHeadSize(12, 3, head_dim=4), Attention(12, 3)
    plain.load_state_dict(module.attention.state_dict())
    return module, plain


@layer(
    reference=reference,
    arxiv="2002.07028",
    system="low-rank-bottleneck",
    examples=({"dim": 12, "heads": 2, "head_dim": 16}, {"dim": 6, "heads": 5, "head_dim": 3, "rope_theta": None}),
    laws=(narrow_heads,),
    weights=lambda dim, heads, head_dim, rope_theta=None: 4 * dim * heads * head_dim,
)
class FixedHeadSize(nn.Module):
    """head_dim: d_p; the default is one of the paper's. Further settings are those of Attention."""

    def __init__(self, dim: int, heads: int, *, head_dim: int = 128, mechanism: str = "causal", **settings: Any):
        super().__init__()
        self.attention = Attention(dim, heads, mechanism, head_dim=head_dim, **settings)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        return self.attention(x, present=present)
