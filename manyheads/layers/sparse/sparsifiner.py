"""Sparsifiner: a small low-rank guess at each head's attention map says which keys a query attends to.

    C = softmax(q' (W_down^T k')^T / sqrt(d')),   q' = f_q(q), k' = f_k(k): half as wide;   A~ = C W_up
    S_i = the ceil(keep n) keys with the greatest A~_ij, all keys for the class token, which stands first
    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j
    loss: reconstruction = sum (A~ - A)^2,   A = softmax(q k^T / sqrt(d)) of all keys

All heads share f_q, f_k, W_down [n, rank] and W_up [rank, n], which know an image's n tokens by their places. To
choose, a row of C keeps its `top` entries and W_up those that exceed `threshold`, so that both are sparse; to learn,
neither is. The choice passes no gradient. The paper starts from a trained model: 5 epochs with the loss times 0.01, A
the trained model's and no choice made, then 45 in which the choice is made. Its models may drop tokens besides.

The released code scales q' k' by the number of heads, and of W_up it takes magnitudes to choose but not to learn.

Wei, Duke, Jiang, Aarabi, Taylor, Shkurti. "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
Vision Transformers." 2023. arXiv:2303.13755.
"""

import math

import torch
from torch import Tensor, nn

from manyheads.core.choosing import best
from manyheads.core.layer import layer
from manyheads.core.maps import read, score_map
from manyheads.core.plain import cut
from manyheads.nn import Attention, from_front, positions_of, split, to_front


def reference(module, x):
    rows = []
    for row in x:
        q, k, v = (cut(p(row), module.heads) for p in (module.q, module.k, module.v))
        heads = []
        for h in range(module.heads):
            guess = _guess(module, q[h], k[h], sparse=True).tolist()
            out = []
            for i in range(len(row)):
                seen = _greatest(guess[i], math.ceil(module.keep * module.tokens) if i else len(row))
                out.append((k[h, seen] @ q[h, i] / q.shape[-1] ** 0.5).softmax(0) @ v[h, seen])
            heads.append(torch.stack(out))
        rows.append(module.o(torch.cat(heads, -1)))
    return torch.stack(rows)


def reference_losses(module, x):
    total = x.new_zeros(())
    for row in x:
        q, k = (cut(p(row), module.heads) for p in (module.q, module.k))
        for h in range(module.heads):
            wanted = torch.softmax(q[h] @ k[h].T / q.shape[-1] ** 0.5, -1).detach()
            total = total + ((_guess(module, q[h], k[h], sparse=False) - wanted) ** 2).sum()
    return {"reconstruction": total}


def _guess(module, q, k, sparse):
    """A~ of one head, entry by entry."""
    n, rank = len(q), module.down.shape[1]
    q, k = module.f_q(q), module.f_k(k)
    pooled = torch.stack([torch.stack([module.down[j, r] * k[j] for j in range(n)]).sum(0) for r in range(rank)])
    basis = module.up * (module.up.abs() > module.threshold) if sparse else module.up
    rows = []
    for i in range(n):
        c = torch.softmax(pooled @ q[i] / q.shape[-1] ** 0.5, 0)
        used = _greatest(c.tolist(), module.top if sparse else rank)
        rows.append(torch.stack([c[used] @ basis[used, j] for j in range(n)]))
    return torch.stack(rows)


def _greatest(values, count):
    """Where they are; of equal ones the first."""
    return sorted(range(len(values)), key=lambda n: -values[n])[:count]


def everything_kept():
    """With keep = 1 it is full attention."""
    module, plain = Sparsifiner(12, 3, tokens=13, keep=1.0), Attention(12, 3, "full", bias=True, rope_theta=None)
    for name in "qkvo":
        setattr(plain, name, getattr(module, name))
    return module, plain


@layer(
    reference=reference,
    losses=reference_losses,
    arxiv="2303.13755",
    system="sparsifiner",
    examples=(
        {"dim": 12, "heads": 3, "tokens": 13, "rank": 4, "top": 2},
        {"dim": 8, "heads": 2, "tokens": 20, "keep": 0.4, "rank": 5, "top": 3, "threshold": 0.3},
    ),
    laws=(everything_kept,),
    causal=False,
    ranges={"keep": (0, 1)},
)
class Sparsifiner(nn.Module):
    """For images of up to `tokens` tokens, of which each attends to the share `keep`. rank: default tokens // 6."""

    def __init__(
        self, dim: int, heads: int, *, tokens: int = 197, keep: float = 0.25, rank: int | None = None, top: int = 8,
        threshold: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        if dim % heads or dim // heads < 2:
            raise ValueError(f"dim {dim} must be a multiple of heads {heads}, two channels for each at the least")
        self.dim, self.heads, self.tokens = dim, heads, tokens
        self.keep, self.top, self.threshold = keep, top, threshold
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        d = dim // heads
        self.f_q, self.f_k = nn.Linear(d, d // 2), nn.Linear(d, d // 2)
        rank = rank or max(1, tokens // 6)
        self.down, self.up = nn.Parameter(torch.empty(tokens, rank)), nn.Parameter(torch.empty(rank, tokens))
        for basis in (self.down, self.up):
            nn.init.trunc_normal_(basis, std=0.02)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim].
        Raises ValueError for rows of more than `tokens`."""
        positions = positions_of(x, present, self.dim)
        row, there = self._placed(x, positions)
        q, k, v = (split(p(row), self.heads) for p in (self.q, self.k, self.v))
        weights = softmax_of(q, k, self.choose(q, k, there))
        return from_front(self.o(read(weights, v).transpose(1, 2).flatten(2)), positions, x.shape[1])

    def losses(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        positions = positions_of(x, present, self.dim)
        row, there = self._placed(x, positions)
        q, k = (split(p(row), self.heads) for p in (self.q, self.k))
        wanted = softmax_of(q, k, there[:, None, None]).detach()
        both = there[:, None, :, None] & there[:, None, None]
        gap = (self.guess(q, k, there) - wanted).masked_fill(~both, 0.0)
        return {"reconstruction": gap.square().sum()}

    def guess(self, q: Tensor, k: Tensor, there: Tensor, *, sparse: bool = False) -> Tensor:
        """A~ [batch, heads, len, len] of q and k [batch, heads, len, head_dim] and the tokens that are there."""
        n = q.shape[2]
        small = self.f_k(k).masked_fill(~there[:, None, :, None], 0.0)
        c = score_map(self.f_q(q), self.down[:n].T @ small, small.shape[-1] ** -0.5).softmax(-1)
        basis = self.up[:, :n].to(c.dtype)
        if sparse:
            c = c * best(c, self.top)
            basis = basis * (basis.abs() > self.threshold)
        return c @ basis

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, there: Tensor) -> Tensor:
        """Which keys each query attends to, bool [batch, heads, len, len]."""
        guess = self.guess(q, k, there, sparse=True).masked_fill(~there[:, None, None], -torch.inf)
        # Where W_up is sparse, many keys have the same 0: of those the first.
        order = torch.argsort(guess, dim=-1, descending=True, stable=True)[..., : math.ceil(self.keep * self.tokens)]
        kept = torch.zeros_like(guess, dtype=torch.bool).scatter(-1, order, True)
        kept[:, :, 0] = True
        return kept & there[:, None, None]

    def _placed(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens at their places, and where there is one, bool [batch, len]."""
        row = to_front(x, positions, min(x.shape[1], self.tokens))
        counts = row.new_full((len(row),), row.shape[1]) if positions is None else (positions >= 0).sum(1)
        return row, torch.arange(row.shape[1], device=x.device) < counts[:, None]


def softmax_of(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """The map [batch, heads, len, len] over the keys that are seen; over all, rather than NaN, where none is."""
    s = score_map(q, k, q.shape[-1] ** -0.5)
    return s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
