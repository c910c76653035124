"""Attention replaced by a feed-forward network over the whole padded text.

    out = W_2 norm(leaky_relu(W_1 norm(z) + b_1)) + b_2,   z = [x_1 ... x_L], all L * dim numbers in a row

This is the paper's ALR, which stands for multi-head attention alone and is trained to give what a trained attention
layer gave. W_1 narrows to L dim / shrink numbers: shrink is 256, 128, 8 and 2 in the paper's XS, S, M and L. Missing
tokens are zeros. Weights belong to places, so there is no text longer than L.

Bozic, Dordevic, Coppola, Thommes, Singh. "Rethinking Attention: Exploring Shallow Feed-Forward Neural Networks as an
Alternative to Attention Layers in Transformers." 2023. arXiv:2311.10642.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.nn import from_front, positions_of, to_front


def reference(module, x):
    norm_1, narrow, _, norm_2, wide = module.ff
    rows = []
    for row in x:
        z = torch.cat([*row, x.new_zeros(module.length * module.dim - row.numel())])
        for norm, linear in ((norm_1, narrow), (norm_2, wide)):
            centred = z - z.sum() / len(z)
            z = norm.weight * centred / (centred.square().sum() / len(z) + norm.eps) ** 0.5 + norm.bias
            z = linear.bias + linear.weight @ z
            if linear is narrow:
                z = torch.stack([one if one > 0 else 0.01 * one for one in z])
        rows.append(torch.stack([z[t * module.dim : (t + 1) * module.dim] for t in range(len(row))]))
    return torch.stack(rows)


def weights(dim, length=50, shrink=8):
    wide, narrow = length * dim, length * dim // shrink
    return 2 * wide * narrow + 3 * wide + 3 * narrow


@layer(
    reference=reference,
    arxiv="2311.10642",
    system="attentionless-ffn",
    examples=({"dim": 4, "length": 13, "shrink": 2}, {"dim": 3, "length": 16, "shrink": 8}),
    weights=weights,
    causal=False,
)
class AttentionlessFFN(nn.Module):
    """length: L, the most tokens a row may have."""

    def __init__(self, dim: int, *, length: int = 50, shrink: int = 8):
        super().__init__()
        wide, narrow = length * dim, length * dim // shrink
        if not narrow:
            raise ValueError(f"shrink={shrink} leaves nothing of length * dim = {wide}")
        self.dim, self.length = dim, length
        self.ff = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, narrow), nn.LeakyReLU(), nn.LayerNorm(narrow), nn.Linear(narrow, wide)
        )

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        y = self.ff(to_front(x, positions, self.length).flatten(1)).unflatten(1, (self.length, self.dim))
        return from_front(y, positions, x.shape[1])
