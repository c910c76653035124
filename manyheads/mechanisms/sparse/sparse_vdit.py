"""Sparse-vDiT: each head of a video model is full, diagonal, multi-diagonal, striped or skipped, once and for all.

    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j,   0 where S_i is empty; of a video of F frames of s tokens
    full: all j                              skip: none
    diagonal: |i - j| <= reach               multi_diagonal: |p(i) - p(j)| <= reach,   p(i) = (i mod s) F + i div s
    vertical_stripe: j in one of the blocks `stripes`

p stands tokens of one place in all frames side by side. Text, before and behind the video, sees and is seen by all in
every mode but skip. A head's mode depends on its layer and hardly on the input, so a few prompts tell it (`search`):

    L_m = mean (O_m - O_full)^2 + penalty (share of tiles that m computes);   argmin_m L_m, full where that L_m > limit

The paper leaves open how wide its diagonals are, which columns its stripes have and what text sees. It fuses the heads
of a mode into one call; here all heads are one call, and each skips its own tiles.

Chen, Zeng, Zhao, et al. "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
Transformers." 2025. arXiv:2506.03065.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism
from manyheads.core.expressions import EMPTY
from manyheads.core.names import unknown

MODES = ("full", "skip", "diagonal", "multi_diagonal", "vertical_stripe")
FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, _ = range(5)
TILE = 128


def reference(
    q, k, v, *, modes=(), frame=3600, frames=21, video_start=0, reach=3600, stripes=(0,), stripe_size=128
):  # fmt: skip
    n, video = k.shape[-2], range(video_start, video_start + frame * frames)
    side_by_side = {}
    for place in range(frame):
        for number in range(frames):
            side_by_side[video_start + number * frame + place] = len(side_by_side)

    def sees(mode, i, j):
        if mode == "full" or (mode != "skip" and (i not in video or j not in video)):
            return True
        if mode == "diagonal":
            return abs(i - j) <= reach
        if mode == "multi_diagonal":
            return abs(side_by_side[i] - side_by_side[j]) <= reach
        return mode == "vertical_stripe" and (j - video_start) // stripe_size in stripes

    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype) + 0 * (q.sum() + k.sum() + v.sum())
    for h in range(q.shape[1]):
        mode = modes[h] if h < len(modes) else "full"
        for row, i in enumerate(range(n - q.shape[-2], n)):
            seen = [j for j in range(n) if sees(mode, i, j)]
            if seen:
                w = torch.softmax(q[:, h, row, None] @ k[:, h, seen].mT / q.shape[-1] ** 0.5, -1)
                out[:, h, row] = (w @ v[:, h, seen])[:, 0]
    return out


@mechanism(
    reference=reference,
    arxiv="2506.03065",
    system="sparse-vdit",
    examples=(
        {"modes": ("multi_diagonal", "vertical_stripe", "skip"), "frame": 3, "frames": 4, "video_start": 1, "reach": 2,
         "stripes": (0, 3), "stripe_size": 2},
        {"modes": ("full", "diagonal"), "frame": 4, "frames": 50, "reach": 1},
    ),
    laws=(
        Law({}, "full"),
        Law({"modes": ("diagonal",) * 4}, "full"),
        Law({"modes": ("multi_diagonal",) * 4, "frame": 3, "frames": 6, "reach": 17}, "full"),
        Law({"modes": ("vertical_stripe",) * 4, "frame": 3, "frames": 6, "stripes": (0, 1), "stripe_size": 9}, "full"),
        Law({"modes": ("diagonal",) * 4, "frames": 1, "frame": 1}, "full"),
    ),
    causal=False,
    ranges={"video_start": (0, math.inf), "reach": (0, math.inf)},
)  # fmt: skip
def sparse_vdit(
    modes: tuple = (), frame: int = 3600, frames: int = 21, video_start: int = 0, reach: int = 3600,
    stripes: tuple = (0,), stripe_size: int = 128,
) -> Scores:  # fmt: skip
    """The mode of each head, full for those beyond; a video of `frames` times `frame` tokens from `video_start` on."""
    for mode in modes:
        if mode not in MODES:
            raise ValueError(unknown("mode of sparse_vdit", mode, MODES))
    # A read beyond the end gives the last entry.
    numbers = torch.tensor([*(MODES.index(mode) for mode in modes), FULL])
    striped = torch.tensor([n in stripes for n in range(max(stripes, default=0) + 2)])

    def side_by_side(n):
        return n % frame * frames + n // frame

    def mask(b, h, i, j):
        mode, row, column = numbers[h], i - video_start, j - video_start
        text = (row < 0) | (row >= frame * frames) | (column < 0) | (column >= frame * frames)
        diagonal = (row - column).abs() <= reach
        multi_diagonal = (side_by_side(row) - side_by_side(column)).abs() <= reach
        sparse = torch.where(mode == MULTI_DIAGONAL, multi_diagonal, striped[column // stripe_size])
        sparse = torch.where(mode == DIAGONAL, diagonal, sparse)
        return (mode == FULL) | ((mode != SKIP) & (text | sparse))

    return Scores(mask=mask)


@torch.no_grad()
def search(q, k, v, attend, *, penalty=0.5, limit=1.0, **settings):
    """The mode of each head of q, k, v [prompts, heads, len, head_dim], one layer's at one denoising step.

    attend(q, k, v, form) -> o is `manyheads.attention`; settings are those of `sparse_vdit` but `modes`.
    """
    heads, at = q.shape[1], range(q.shape[2])
    full, losses = attend(q, k, v, sparse_vdit(**settings)), []
    for mode in MODES[1:]:
        form = sparse_vdit(modes=(mode,) * heads, **settings)
        assert isinstance(form, Scores)
        computed = (form.program.tiles(at, at, (TILE, TILE)) != EMPTY).float().mean()
        error = (attend(q, k, v, form) - full).float().square().mean((0, 2, 3))
        losses.append(error + penalty * computed.to(error))
    least, number = torch.stack(losses).min(0)
    return tuple(MODES[1 + n] if loss <= limit else "full" for loss, n in zip(least, number.tolist(), strict=True))
