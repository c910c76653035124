"""Routing attention: some heads see a local window, the others attend within clusters of tokens that are alike.

    r_i = layernorm(q_i), without scale and bias, for queries and keys alike
    M_c = the `window` tokens of greatest mu_c . r_i
    o_i = mean over the clusters c with i in M_c of sum_{j in M_c, j <= i} softmax_j(r_i . r_j / sqrt(d)) v_j

and 0 for a token in no cluster. Centroids mu_c are no parameters: in training each one moves by 1 - decay towards the
mean of the tokens that like it best. Local heads have keys of their own and, with `rope_theta`, rotary positions; the
paper has learned relative ones there.

Clusters take their tokens from the whole text, so what comes later decides who is in, if not what is read. The mean
over clusters, and over tokens in the centroids' update, are those of the authors' code, which for models that need not
be causal also takes separate keys; the paper adds sums up.

Roy, Saffar, Vaswani, Grangier. "Efficient Content-Based Sparse Attention with Routing Transformers." 2020.
arXiv:2003.05997.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, turned
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, rotate, split


def reference(module, x):
    rows, local = [], module.local_heads
    for row in x:
        q, v = (cut(row @ p.weight.T, module.heads) for p in (module.q, module.v))
        heads = []
        for h in range(module.heads):
            if h < local:
                k = turned(cut(row @ module.k.weight.T, local), module.rope_theta)[h]
                a, clusters = turned(q, module.rope_theta)[h], [range(len(row))]
            else:
                k = a = torch.stack([(t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt() for t in q[h]])
                likes = [[(mu @ t).item() for t in k] for mu in module.centroids[h - local]]
                clusters = [sorted(range(len(k)), key=lambda i: -like[i])[: module.window] for like in likes]
            tokens = []
            for i in range(len(row)):
                first = i - module.window + 1 if h < local else 0
                reads = [[j for j in range(first, i + 1) if j in members] for members in clusters if i in members]
                found = [torch.softmax(k[seen] @ a[i] / len(a[i]) ** 0.5, 0) @ v[h, seen] for seen in reads]
                tokens.append(sum(found) / max(1, len(found)) + torch.zeros_like(v[h, i]))
            heads.append(torch.stack(tokens))
        rows.append(torch.cat(heads, -1) @ module.o.weight.T)
    return torch.stack(rows)


def one_cluster():
    """One cluster of all tokens is causal attention with normalised queries that are keys too."""
    module = RoutingAttention(12, 3, local_heads=0, clusters=1, window=100)
    plain = Attention(12, 3, rope_theta=None)
    plain.q, plain.v, plain.o = module.q, module.v, module.o
    plain.attend = partial(plain.attend, change=lambda q, k, v: (alike(q), alike(q), v))
    return module, plain


@layer(
    reference=reference,
    arxiv="2003.05997",
    system="routing-transformer",
    examples=(
        {"dim": 12, "heads": 3, "local_heads": 1, "clusters": 5, "window": 3},
        {"dim": 16, "heads": 4, "local_heads": 0, "clusters": 6, "window": 4},
        {"dim": 12, "heads": 6, "clusters": 4, "window": 2, "rope_theta": None},
    ),
    laws=(one_cluster,),
    sees_future="each cluster takes its tokens from the whole text, so later ones may push earlier ones out",
    ranges={"local_heads": (0, float("inf")), "decay": (0, 1)},
)
class RoutingAttention(nn.Module):
    """Causal. `local_heads` (None: half of the heads) see the last `window` tokens; each of the others has `clusters`
    of `window` tokens. Buffer `centroids` [routing heads, clusters, head_dim] learns in training, by `decay`."""

    centroids: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        local_heads: int | None = None,
        clusters: int = 16,
        window: int = 256,
        decay: float = 0.999,
        rope_theta: float | None = 10000.0,
    ):
        super().__init__()
        local_heads = heads // 2 if local_heads is None else local_heads
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if local_heads >= heads:
            raise ValueError(f"local_heads={local_heads} must leave one of heads={heads} to routing")
        self.dim, self.heads, self.local_heads, head_dim = dim, heads, local_heads, dim // heads
        self.window, self.decay, self.rope_theta = window, decay, rope_theta
        self.q, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.k = nn.Linear(dim, local_heads * head_dim, bias=False) if local_heads else None
        self.register_buffer("centroids", alike(torch.randn(heads - local_heads, clusters, head_dim)))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        here = torch.ones_like(x[..., 0], dtype=torch.bool) if present is None else present
        q_local, q = split(self.q(x), self.heads).split([self.local_heads, self.heads - self.local_heads], 1)
        v_local, v = split(self.v(x), self.heads).split([self.local_heads, self.heads - self.local_heads], 1)
        heads = [self._route(alike(q), v, here)]
        if self.k is not None:
            heads.insert(0, self._look_around(q_local, split(self.k(x), self.local_heads), v_local, positions))
        return self.o(torch.cat(heads, 1).transpose(1, 2).flatten(2))

    def _look_around(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
        if self.rope_theta is not None:
            at = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
            q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
        return attention(
            q, k, v, "sliding_window", window=self.window, sinks=0, q_positions=positions, kv_positions=positions
        )

    def _route(self, r: Tensor, v: Tensor, here: Tensor) -> Tensor:
        """r, v [batch, heads, len, head_dim]; here: bool [batch, len]. Returns [batch, heads, len, head_dim]."""
        at = self._members(r, here).flatten(2)
        r, v = (t.gather(2, at[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (r, v))
        r, v = (t.unflatten(2, (self.centroids.shape[1], -1)) for t in (r, v))
        there = here[:, None].expand(-1, len(self.centroids), -1).gather(2, at).view(r.shape[:-1])
        past = torch.ones(r.shape[3], r.shape[3], dtype=torch.bool, device=r.device).tril()  # members are in order
        s = (r @ r.mT * r.shape[-1] ** -0.5).masked_fill(~(past & there[..., None, :]), torch.finfo(r.dtype).min)
        o = (s.softmax(-1) @ v * there[..., None]).flatten(2, 3)
        total = o.new_zeros(*o.shape[:2], here.shape[1], o.shape[-1]).scatter_add(2, at[..., None].expand_as(o), o)
        count = o.new_zeros(total.shape[:3]).scatter_add(2, at, there.flatten(2).to(o.dtype))
        return total / count.clamp(min=1)[..., None]

    @torch.no_grad()
    def _members(self, r: Tensor, here: Tensor) -> Tensor:
        """Who is in each cluster, in order, [batch, heads, clusters, size]; in training the centroids move after."""
        likes = self.centroids.float() @ r.float().mT  # rounded, near ties would go to others
        members = likes.masked_fill(~here[:, None, None], -torch.inf).topk(min(self.window, r.shape[2]), -1).indices
        if self.training:
            own = F.one_hot(likes.argmax(2), likes.shape[2]) * here[:, None, :, None]
            count = own.sum((0, 2))[..., None]
            mean = torch.einsum("bhnc,bhnd->hcd", own.to(r.dtype), r) / count.clamp(min=1)
            self.centroids.copy_(torch.where(count > 0, self.centroids.lerp(mean, 1 - self.decay), self.centroids))
        return members.sort(-1).values


def alike(x: Tensor) -> Tensor:
    """Tokens of mean 0 and length sqrt(d)."""
    return F.layer_norm(x, x.shape[-1:])
