"""Mixture of sparse attention (MoSA): each head chooses the few tokens that it attends among, by what they are.

    r = sigmoid(X w),   I = the k tokens of greatest r,   k = T / sparsity, but 2 at least
    Y_i = r_i sum_{j in I, j <= i} softmax_j(q_i . k_j / sqrt(d)) v_j W_o for i in I, and 0 for all other tokens

for each head, with w, projections and choice of its own; the layer's output is the sum over heads. Queries, keys and
values of the k tokens alone are computed and kept, so a head costs k^2 instead of T^2, and many stand in for one dense
head. `dense_heads` causal heads work beside them, as the paper needs for stable training. Gradients reach w through r.

Heads choose from the whole text, so later tokens decide who is in, if not what is read. The paper names no choice to
generate text with.

Piękos, Csordás, Schmidhuber. "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing." 2025. arXiv:2505.00315.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of, turned
from manyheads.nn import Attention, positions_of, rotate


def reference(module, x):
    return torch.stack([reference_row(module, row) for row in x])


def reference_row(module, row):
    n, size = len(row), min(len(row), max(2, len(row) // module.sparsity))
    out = [torch.zeros_like(x_t) for x_t in row]
    for h, (w_qkv, w_o) in enumerate(zip(module.qkv, module.o, strict=True)):
        q, k, v = (row @ w_qkv).chunk(3, -1)
        if module.rotated:
            q, k = (
                torch.cat([turned(t[None, :, : module.rotated], module.rope_theta)[0], t[:, module.rotated :]], -1)
                for t in (q, k)
            )
        r = [torch.sigmoid(module.router.weight[h] @ x_t) for x_t in row]
        chosen = sorted(range(n), key=lambda t, r=r: (t > 0 or not module.include_first, -r[t].item()))[:size]
        for i in chosen:
            seen = [j for j in chosen if j <= i]
            w = torch.softmax(k[seen] @ q[i] / q.shape[-1] ** 0.5, 0)
            out[i] = out[i] + r[i] * (w @ v[seen] @ w_o)
    sparse = torch.stack(out)
    if module.dense is None:
        return sparse
    return sparse + heads_of(module.dense, row).transpose(0, 1).flatten(1) @ module.dense.o.weight.T


def every_token():
    """A head that takes every token, all of them half, is half a head of causal attention."""
    module, plain = MoSA(12, 3, sparsity=1, head_dim=4, rotated=1.0), Attention(12, 3)
    with torch.no_grad():
        module.router.weight.zero_()
        module.qkv.copy_(torch.cat([p.weight.view(3, 4, 12).mT for p in (plain.q, plain.k, plain.v)], -1))
        module.o.copy_(2 * plain.o.weight.T.view(3, 4, 12))
    return module, plain


@layer(
    reference=reference,
    arxiv="2505.00315",
    system="mosa",
    examples=(
        {"dim": 12, "heads": 4, "sparsity": 4, "head_dim": 6},
        {"dim": 8, "heads": 3, "sparsity": 3, "head_dim": 4, "dense_heads": 2, "include_first": True},
        {"dim": 8, "heads": 2, "sparsity": 2, "head_dim": 4, "rotated": 0.0},
    ),
    laws=(every_token,),
    weights=lambda dim, heads, sparsity, head_dim, dense_heads=0, **others: (
        dim * heads + 4 * dim * head_dim * (heads + dense_heads)
    ),
    sees_future="each head takes its tokens from the whole text, so later ones may push earlier ones out",
    ranges={"dense_heads": (0, float("inf")), "rotated": (0.0, 1.0)},
)
class MoSA(nn.Module):
    """`heads` heads that take one token of `sparsity`, the first one always if `include_first`; `rotated` is the share
    of their channels that positions rotate. Weights of the heads: qkv [heads, dim, 3 head_dim], o [heads, head_dim,
    dim]."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        sparsity: int,
        head_dim: int,
        dense_heads: int = 0,
        include_first: bool = False,
        rotated: float = 0.5,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        self.dim, self.sparsity, self.include_first, self.rope_theta = dim, sparsity, include_first, rope_theta
        self.rotated = 2 * int(rotated * head_dim / 2)
        self.router = nn.Linear(dim, heads, bias=False)
        self.qkv = nn.Parameter(torch.empty(heads, dim, 3 * head_dim).normal_(std=dim**-0.5))
        self.o = nn.Parameter(torch.empty(heads, head_dim, dim).normal_(std=(heads * head_dim) ** -0.5))
        self.dense = Attention(dim, dense_heads, head_dim=head_dim, rope_theta=rope_theta) if dense_heads else None

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        r = self.router(x).sigmoid().mT
        at, there = self.choose(r.detach(), positions)
        own = at[..., None].expand(-1, -1, -1, self.dim)
        tokens = x[:, None].expand(-1, at.shape[1], -1, -1).gather(2, own)
        q, k, v = (tokens @ self.qkv).chunk(3, -1)
        place = positions[:, None].expand_as(r).gather(2, at)
        if self.rotated:
            q, k = self._rotate(q, place), self._rotate(k, place)
        unseen = (place[..., None, :] > place[..., None]) | ~there[..., None, :]
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(unseen, torch.finfo(q.dtype).min)
        y = (r.gather(2, at) * there)[..., None] * (s.softmax(-1) @ v @ self.o)
        out = torch.zeros_like(x).scatter_add(1, own.flatten(1, 2), y.flatten(1, 2))
        return out if self.dense is None else out + self.dense(x, present=present)

    def choose(self, r: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of each head for r [batch, heads, len]: (at, there) [batch, heads, k]; those not there are for
        longer rows. positions [batch, len], -1 for an absent token."""
        length = positions.shape[1]
        likes = r.masked_fill((positions < 0)[:, None], -torch.inf)
        if self.include_first:
            likes = likes.masked_fill((positions == 0)[:, None], torch.inf)
        at = likes.topk(min(length, max(2, length // self.sparsity)), -1).indices
        present = (positions >= 0).sum(1)
        count = torch.minimum((present // self.sparsity).clamp(min=2), present)
        there = torch.arange(at.shape[-1], device=r.device) < count[:, None, None]
        return at, there.expand_as(at)

    def _rotate(self, x: Tensor, place: Tensor) -> Tensor:
        """x [batch, heads, k, head_dim] by where each token stands, [batch, heads, k]."""
        turned, rest = x.split([self.rotated, x.shape[-1] - self.rotated], -1)
        turned = rotate(turned.flatten(0, 1)[:, None], place.flatten(0, 1), self.rope_theta)
        return torch.cat([turned.view_as(x[..., : self.rotated]), rest], -1)
