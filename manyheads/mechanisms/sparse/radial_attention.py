"""Radial attention: the farther two frames of a video are apart, the nearer in place their tokens have to be.

    D = |frame(i) - frame(j)|,   p = 2^floor(log2 D),   k, l = the places of i and j within their frames of s tokens
    j in S_i if D < 2, or |k - l| + 1 <= max(block, decay s / p) and D mod ceil(block p / s) = 0
    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j

Each doubling of the distance in time halves the diagonal that is left of a pair of frames; once it is `block` wide,
some pairs are left out instead. Neighbouring frames see each other whole, the first frame (`sinks`) is seen by all, and
text, which stands behind the video, sees and is seen by all. A token's keys grow with the logarithm of the length.

The paper's equation has block = 1 and decay = 1. Its code computes tiles of 128 tokens, which is block = 128, for s
rounded down to a power of two and one key more on either side, and of the tiles that this touches it keeps the fuller
ones. The first 12 denoising steps and the first layer stay dense.

Li, Li, Cai, et al. "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation." 2025.
arXiv:2506.19852, equation 4.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, frame=3600, frames=21, sinks=1, decay=1.0, block=1):
    def sees(i, j):
        distance = abs(i // frame - j // frame)
        if max(i, j) >= frame * frames or j < sinks * frame or distance < 2:
            return True
        p = 2 ** math.floor(math.log2(distance))
        near = abs(i % frame - j % frame) + 1 <= max(block, decay * frame / p)
        return near and distance % math.ceil(block * p / frame) == 0

    n, out = k.shape[-2], []
    for i in range(n - q.shape[-2], n):
        seen = [j for j in range(n) if sees(i, j)]
        w = torch.softmax(q[..., i - n, None, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2506.19852",
    system="radial-attention",
    examples=(
        {"frame": 4, "frames": 50, "block": 2},
        {"frame": 4, "frames": 4, "sinks": 0, "decay": 1.6},
    ),
    laws=(
        Law({"frame": 10**6}, "full"),
        Law({"frame": 3, "frames": 2, "sinks": 0}, "full"),
        Law({"frame": 2, "frames": 20, "sinks": 20}, "full"),
    ),
    causal=False,
    ranges={"sinks": (0, math.inf)},
)
def radial_attention(frame: int = 3600, frames: int = 21, sinks: int = 1, decay: float = 1.0, block: int = 1) -> Scores:
    """A video of `frames` times `frame` tokens: neighbouring frames, the first `sinks`, diagonals of the others."""
    powers = [2**r for r in range(1, (frames - 1).bit_length())]
    bands = [(p, max(block, int(decay * frame / p)), math.ceil(block * p / frame)) for p in powers]

    def mask(b, h, i, j):
        distance = (i // frame - j // frame).abs()
        apart = (i % frame - j % frame).abs()
        kept = distance < 2
        for p, width, every in bands:
            kept = torch.where(distance >= p, (apart < width) & (distance % every == 0), kept)
        text = (i >= frame * frames) | (j >= frame * frames)
        return kept | (j < sinks * frame) | text

    return Scores(mask=mask)
