"""SSA: a model that learns full and sparse attention with the same weights, each pulled towards the other.

    full_i = g_i softmax_{j <= i}(q_i . k_j / sqrt(d)) v_j,   g = sigmoid(W_g x), one number for each head
    sparse_i: the same over the keys of block(i) and of the blocks n before it with the greatest
              s_n = sum of softmax_n(q_i . mean(K_n) / sqrt(d)) over the heads that share a key head
    loss: alignment = smooth_l1(full, sg(sparse)) + smooth_l1(sg(full), sparse),   sg: no gradient

Each training step draws one of the two for the whole model (`draw_mode`), and adds 10 times the mean of the layers'
losses: sparse attention passes no gradient to keys that it drops, and full attention drops none. The first term makes
full attention look where sparse attention can follow, the second keeps sparse attention close to it. A trained model
runs in either mode, with any `top_k`. The choice is that of InfLLM-V2 where means do not overlap.

Shen, Lu, Li, Lu, Gui, He, Yin, Sun. "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in
Feature Space." 2025. arXiv:2511.20102.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Scores
from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.core.plain import cut, softmax_heads, turned
from manyheads.nn import Attention

Mode = Literal["sparse", "full"]
FULL = Scores(mask=lambda b, h, i, j: j <= i)


def reference(module, x):
    rows = [_heads(module, row, module.mode).transpose(0, 1).flatten(1) for row in x]
    return torch.stack([row @ module.attention.o.weight.T for row in rows])


def reference_losses(module, x):
    pairs = [[_heads(module, row, mode) for mode in get_args(Mode)] for row in x]
    total, numbers = x.new_zeros(()), 0
    for sparse, full in pairs:
        for one, other in ((sparse, full.detach()), (full, sparse.detach())):
            gap = (one - other).abs()
            total = total + torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum()
        numbers += sparse.numel()
    return {"alignment": total / numbers}


def _heads(module, row, mode):
    """What the gated heads give for a row [len, dim]: [heads, len, head_dim]."""
    a = module.attention
    q, k, v = (cut(row @ p.weight.T, n) for p, n in ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads)))
    q, k = turned(q, a.rope_theta), turned(k, a.rope_theta)
    o = softmax_heads(q, k, v) if mode == "full" else _sparse(module, q, k, v)
    return o * torch.sigmoid(row @ module.gate.weight.T).T[..., None]


def _sparse(module, q, k, v):
    size, group, scale = module.block_size, len(q) // len(k), q.shape[-1] ** -0.5
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=v.dtype)
    for kv_head in range(len(k)):
        heads = range(kv_head * group, kv_head * group + group)
        for i in range(q.shape[1]):
            own, mass = i // size, [0.0] * (i // size)
            whole = [k[kv_head, n * size : (n + 1) * size].mean(0) for n in range((i + 1) // size)]
            for h in heads if own else ():
                shares = (torch.stack(whole) @ q[h, i] * scale).softmax(0).tolist()
                mass = [m + share for m, share in zip(mass, shares, strict=False)]  # a block that ends here is its own
            chosen = {own, *sorted(range(own), key=lambda n: (-mass[n], n))[: module.top_k - 1]}
            seen = [j for j in range(i + 1) if j // size in chosen]
            for h in heads:
                out[h, i] = (k[kv_head, seen] @ q[h, i] * scale).softmax(0) @ v[kv_head, seen]
    return out


def everything_kept():
    """Sparse attention that keeps every block is full attention."""
    sparse = SSA(12, 4, kv_heads=2, head_dim=4, block_size=3, top_k=10**6)
    full = SSA(12, 4, kv_heads=2, head_dim=4, block_size=3, top_k=10**6, mode="full")
    full.load_state_dict(sparse.state_dict())
    return sparse, full


@layer(
    reference=reference,
    losses=reference_losses,
    arxiv="2511.20102",
    system="ssa-sparse-sparse-attention",
    examples=(
        {"dim": 12, "heads": 4, "kv_heads": 2, "head_dim": 4, "block_size": 3, "top_k": 2},
        {"dim": 12, "heads": 2, "block_size": 2, "top_k": 3},
        {"dim": 12, "heads": 4, "kv_heads": 1, "head_dim": 4, "block_size": 3, "top_k": 2, "mode": "full"},
    ),
    laws=(everything_kept,),
    weights=lambda dim, heads, kv_heads=None, head_dim=None, **_: (
        dim * heads + 2 * dim * (heads + (kv_heads or heads)) * (head_dim or dim // heads)
    ),
    ranges={"top_k": (2, math.inf)},
)
class SSA(nn.Module):
    """`top_k` blocks of `block_size` keys for each query, its own included, or with mode="full" all keys; `mode` may be
    set anew at any time. Further settings are those of Attention."""

    def __init__(
        self, dim: int, heads: int, *, block_size: int = 16, top_k: int = 16, mode: str = "sparse", **settings: Any
    ):
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(unknown("mode", mode, get_args(Mode)))
        if top_k < 2:
            raise ValueError(f"top_k counts a query's own block and must be at least 2, not {top_k}")
        apart = {"block_size": block_size, "kernel": block_size, "stride": block_size, "window": block_size}
        self.attention = Attention(
            dim, heads, "infllm_v2", top_k=top_k - 1, init_blocks=0, dense_len=0, **apart, **settings
        )
        self.gate = nn.Linear(dim, self.attention.heads, bias=False)
        self.block_size, self.top_k, self.mode = block_size, top_k, mode

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        return self.attention.o(self.heads(x, self.mode, present).flatten(2))

    def heads(self, x: Tensor, mode: str, present: Tensor | None) -> Tensor:
        """What the gated heads give in that mode, [batch, len, heads, head_dim]."""
        form = FULL if mode == "full" else None
        return self.attention.attend(x, present=present, form=form).transpose(1, 2) * self.gate(x).sigmoid()[..., None]

    def losses(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        sparse, full = (self.heads(x, mode, present) for mode in get_args(Mode))
        if present is not None:
            sparse, full = sparse[present], full[present]
        return {"alignment": F.smooth_l1_loss(full, sparse.detach()) + F.smooth_l1_loss(sparse, full.detach())}


def draw_mode(model: nn.Module) -> None:
    """Give all SSA layers of a model one mode, either as likely: what a step of training begins with. The draw is from
    torch's generator on the CPU: give every process of a training the same seed."""
    mode = get_args(Mode)[int(torch.rand(()) < 0.5)]
    for module in model.modules():
        if isinstance(module, SSA):
            module.mode = mode
