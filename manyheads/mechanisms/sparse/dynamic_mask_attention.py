"""Dynamic mask attention: each key says how much it matters, and a query sees the keys so far that matter the most.

    delta_j = a softplus(t_j),   t_j = W [v_j of all key heads], a number for each key head, as is a
    K_i = the `window` keys j <= i with the greatest delta_j, the later one of two equal ones
    o_i = sum_{j in K_i} softmax_j(q_i . k_j / sqrt(d) + delta_j) v_j

No gradient flows through the choice; W and a learn from delta_j as a bias. They start at a = 0, where the choice is a
sliding window. Here t_j is an operand, which a layer projects from x_j: v_j is a projection of x_j, and so is W v_j.
The paper has exp(a softplus(t_j)); its code leaves the exponential out, for stability, and so does this.

Shi, Wu, Peng, Wu, Wang, Liu, Luo. "Trainable Dynamic Mask Sparse Attention." 2025. arXiv:2508.02124.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from manyheads.core import Function, Law, Operand, mechanism
from manyheads.core.maps import read, score_map

RUN = 128  # queries whose scores are held at a time


def reference(q, k, v, *, window=2048, t, a):
    offset, out = k.shape[-2] - q.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            delta = a[h] * t[b, h]
            for row in range(q.shape[2]):
                past = sorted(range(offset + row + 1), key=lambda j: (-delta[j].item(), -j))
                seen = sorted(past[:window])
                s = k[b, h, seen] @ q[b, h, row] / q.shape[-1] ** 0.5 + delta[seen]
                out[b, h, row] = s.softmax(-1) @ v[b, h, seen]
    return out


@mechanism(
    reference=reference,
    arxiv="2508.02124",
    system="dynamic-mask-attention",
    examples=({"window": 4}, {"window": 1}),
    laws=(Law({"window": 10**6}, "causal"), Law({"window": 3}, "sliding_window", {"window": 3, "sinks": 0})),
    trained=True,
    at=lambda context: {"window": max(1, context // 4)},
)
def dynamic_mask_attention(window: int = 2048) -> Function:
    """The `window` keys that matter the most of those so far; heads that share a key head see the same ones."""

    def forward(q, k, v, *, scale, t, a):
        wide = torch.promote_types(q.dtype, torch.float32)
        delta = (a.to(wide)[:, None] * t.to(wide)).expand(k.shape[:3])
        runs = zip(q.split(RUN, 2), range(k.shape[2] - q.shape[2], k.shape[2], RUN), strict=True)
        parts = [checkpoint(_attend, run, k, v, delta, scale, i, window, use_reentrant=False) for run, i in runs]
        return torch.cat(parts, 2)

    operands = {"t": Operand("batch kv_heads len", F.softplus), "a": Operand("kv_heads")}
    return Function(forward=forward, operands=operands)


def _attend(q, k, v, delta, scale, first, window):
    """o for the queries q at positions first, first + 1, ...; delta [batch, kv_heads, kv_len]."""
    i = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    future = torch.arange(k.shape[2], device=q.device) > i
    rank = delta.detach()[:, :, None].masked_fill(future, -torch.inf).flip(-1)  # the later one of equals comes first
    order = rank.argsort(dim=-1, descending=True, stable=True)[..., :window]
    keep = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, order, True).flip(-1) & ~future
    group = q.shape[1] // k.shape[1]
    s = score_map(q, k, scale) + delta.repeat_interleave(group, 1)[:, :, None]
    return read(s.masked_fill(~keep.repeat_interleave(group, 1), -torch.inf).softmax(-1), v)
