"""Set Transformer: attention among the members of a set, by way of a few learned points so that cost is linear.

    MAB(X, Y) = LN(H + relu(W_f H)),   H = LN(W_q X + concat_h softmax(Q_h K_h^T / sqrt(dim)) V_h)
    SAB(X) = MAB(X, X),   ISAB(X) = MAB(X, MAB(I, X)),   PMA(X) = MAB(S, relu(W X))

with Q, K, V projections of X, Y and Y, and learned points I, which stand between members, and S, which are what a set
comes down to. Members have no order: their outputs are reordered with them, and PMA's stay as they are.

Queries are projected before they are added, scores are divided by the square root of the whole width and there is no
output projection, as in the authors' code. Keys' projection has no bias: it would be the same for all keys of a query.

Lee, Lee, Kim, Kosiorek, Choi, Teh. "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural
Networks." 2018. arXiv:1810.00825.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split


def reference(module, x):
    if module.points is None:
        return torch.stack([reference_mab(module.read, row, row) for row in x])
    return torch.stack([reference_mab(module.read, row, reference_mab(module.gather, module.points, row)) for row in x])


def reference_mab(module, x, y):
    out = []
    for member in x:
        q, heads = module.q(member), []
        for h in range(module.heads):
            own = slice(h * len(q) // module.heads, (h + 1) * len(q) // module.heads)
            s = torch.stack([module.k(other)[own] @ q[own] / len(q) ** 0.5 for other in y])
            heads.append(torch.softmax(s, 0) @ torch.stack([module.v(other)[own] for other in y]))
        hidden = module.first(q + torch.cat(heads))
        out.append(module.second(hidden + torch.relu(module.mix(hidden))))
    return torch.stack(out)


class MAB(nn.Module):
    """Each of x reads all of y; `norm` as in the paper, without as the authors' code has it unless asked."""

    def __init__(self, dim: int, heads: int, *, norm: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.q, self.v, self.mix = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)
        self.first, self.second = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [batch, n, dim], y [batch, m, dim] with positions, -1 for an absent member. Returns [batch, n, dim]."""
        q = self.q(x)
        at = None if positions is None else torch.arange(x.shape[1], device=x.device)
        o = attention(
            split(q, self.heads), split(self.k(y), self.heads), split(self.v(y), self.heads), "full",
            scale=q.shape[-1] ** -0.5, q_positions=at, kv_positions=positions,
        )  # fmt: skip
        hidden = self.first(q + o.transpose(1, 2).flatten(2))
        return self.second(hidden + self.mix(hidden).relu())


@layer(
    reference=reference,
    arxiv="1810.00825",
    system="set-transformer",
    examples=(
        {"dim": 12, "heads": 3, "points": 4},
        {"dim": 8, "heads": 2, "points": None, "norm": False},
    ),
    causal=False,
)
class SetAttention(nn.Module):
    """ISAB with `points` learned points, or SAB, in which each member reads all the others, with None."""

    def __init__(self, dim: int, heads: int, *, points: int | None = 32, norm: bool = True):
        super().__init__()
        self.dim = dim
        self.points = None if points is None else nn.Parameter(nn.init.xavier_uniform_(torch.empty(points, dim)))
        self.gather = None if points is None else MAB(dim, heads, norm=norm)
        self.read = MAB(dim, heads, norm=norm)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        if self.points is None or self.gather is None:
            y = self.read(x, x, positions)
        else:
            y = self.read(x, self.gather(self.points.expand(len(x), -1, -1), x, positions))
        return y if present is None else y.masked_fill(~present[..., None], 0.0)


class PMA(nn.Module):
    """A set as `seeds` vectors, whatever the order of its members."""

    def __init__(self, dim: int, heads: int, seeds: int = 1, *, norm: bool = True):
        super().__init__()
        self.dim = dim
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(seeds, dim)))
        self.mix = nn.Linear(dim, dim)
        self.read = MAB(dim, heads, norm=norm)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: as for SetAttention. Returns [batch, seeds, dim]."""
        positions = positions_of(x, present, self.dim)
        return self.read(self.seeds.expand(len(x), -1, -1), self.mix(x).relu(), positions)
