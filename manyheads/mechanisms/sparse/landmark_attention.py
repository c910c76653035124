"""Landmark attention: the last token of each block is a landmark, whose weight is shared out among the block's tokens.

    p_i = softmax over the landmarks of earlier blocks and the tokens j <= i of the own block, without its landmark
    r_ib = softmax over the tokens of block b without its landmark, of q_i . k_j / sqrt(d)
    o_i = sum_{j in own block} p_ij v_j + sum_{earlier b} p_i,landmark(b) sum_{j in b} r_ib,j v_j

Landmarks have no weight of their own, and rows sum to 1. A model is trained on texts with landmarks put in, as by
`with_landmarks`. With `top_k` each query reads only the blocks, head by head, whose landmarks it likes best: retrieval.
The paper then counts positions anew, so that no retrieved block is farther away than in training, which a layer with
rotary positions has to do before it calls this.

Mohtashami, Jaggi. "Landmark Attention: Random-Access Infinite Context Length for Transformers." 2023. arXiv:2305.16300.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from manyheads.core import Function, Law, mechanism
from manyheads.core.choosing import best


def reference(q, k, v, *, block_size=64, top_k=None):
    offset, out = k.shape[-2] - q.shape[-2], []
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        for i, q_i in enumerate(q_h, offset):
            s = k_h @ q_i / len(q_i) ** 0.5
            first = i // block_size * block_size
            own = [j for j in range(first, i + 1) if j + 1 < first + block_size]
            landmarks = sorted(range(block_size - 1, first, block_size), key=lambda j, s=s: -s[j].item())[:top_k]
            p = torch.softmax(s[own + landmarks], 0)
            o = p[: len(own)] @ v_h[own]
            for landmark, weight in zip(landmarks, p[len(own) :], strict=True):
                block = range(landmark - block_size + 1, landmark)
                o = o + weight * (torch.softmax(s[block], 0) @ v_h[block])
            out.append(o)
    return torch.stack(out).view(*q.shape[:-1], -1)


@mechanism(
    reference=reference,
    arxiv="2305.16300",
    system="landmark-attention",
    examples=({"block_size": 4}, {"block_size": 2}, {"block_size": 3, "top_k": 2}),
    laws=(
        Law({"block_size": 10**6}, "causal"),
        Law({"block_size": 4, "top_k": 10**6}, "landmark_attention", {"block_size": 4}),
    ),
    trained=True,
    ranges={"block_size": (2, float("inf"))},
)
def landmark_attention(block_size: int = 64, top_k: int | None = None) -> Function:
    """Blocks of `block_size` tokens, the landmark included; of earlier ones all are read, or the best `top_k`."""

    def read(q, k, v, scale, first):
        """For queries from position `first` on, of one block, and keys up to the last of them."""
        s = q @ k.mT * scale
        start = first // block_size * block_size
        j = torch.arange(start, k.shape[-2], device=q.device)
        i = torch.arange(first, first + q.shape[-2], device=q.device)[:, None]
        past, own = s[..., :start].unflatten(-1, (-1, block_size)), s[..., start:]
        own = own.masked_fill((j > i) | (j == start + block_size - 1), -torch.inf)
        landmarks = past[..., -1]
        if top_k is not None:
            landmarks = landmarks.masked_fill(~best(landmarks.detach(), top_k), -torch.inf)
        of_landmarks, of_own = torch.cat([landmarks, own], -1).softmax(-1).split([past.shape[-2], len(j)], -1)
        shared_out = of_landmarks[..., None] * past[..., :-1].softmax(-1)
        return torch.cat([F.pad(shared_out, (0, 1)).flatten(-2), of_own], -1) @ v

    def forward(q, k, v, *, scale):
        n, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
        unseeing = max(0, q.shape[2] - n)  # queries before the first key
        grouped = q[:, :, unseeing:].to(wide).unflatten(1, (k.shape[1], -1))
        k, v = k[:, :, None].to(wide), v[:, :, None].to(wide)
        again = torch.is_grad_enabled() and any(t.requires_grad for t in (grouped, k, v))
        parts, end = [], n - grouped.shape[3]
        while end < n:
            first, end = end, min(n, end // block_size * block_size + block_size)
            rows = grouped[..., first - n + grouped.shape[3] : end - n + grouped.shape[3], :]
            args = rows, k[..., :end, :], v[..., :end, :], scale, first
            # A block of queries at a time, computed again in the backward pass: memory stays linear.
            parts.append(checkpoint(read, *args, use_reentrant=False) if again else read(*args))
        return F.pad(torch.cat(parts, 3).flatten(1, 2).to(q.dtype), (0, 0, unseeing, 0))

    return Function(forward=forward)


def with_landmarks(ids: torch.Tensor, landmark: int, block_size: int = 64) -> torch.Tensor:
    """Token ids [..., len] with the id `landmark` after every block_size - 1 of them."""
    full = ids.shape[-1] // (block_size - 1) * (block_size - 1)
    blocks = F.pad(ids[..., :full].unflatten(-1, (-1, block_size - 1)), (0, 1), value=landmark)
    return torch.cat([blocks.flatten(-2), ids[..., full:]], -1)
