"""Concentric causal attention: an image's tokens are ordered by ring, from its border to its centre, not line by line.

    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j
    S_i = {j in the image: ring(j) <= ring(i)} and {j before the image} for i in the image, {j <= i} for i in the text
    ring(row r, column c) = min(r, c, G - 1 - r, G - 1 - c)

for an image of G x G tokens. Rotary positions follow the rings too (`rotary_positions`): a ring is one position, and
the text after the image starts at most G / 2 from it, instead of G^2. Models are trained with both.

Xing, Li, Laptev, Lu. "Mitigating Object Hallucination via Concentric Causal Attention." 2024. arXiv:2410.15926.
"""

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, grid=24, image_start=0):
    rings = torch.zeros(grid, grid, dtype=torch.long)
    for ring in range(1, (grid + 1) // 2):
        rings[ring : grid - ring, ring : grid - ring] += 1
    ring_of = dict(enumerate(rings.flatten().tolist(), image_start))
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(offset, k.shape[-2]):
        both = [i in ring_of and j in ring_of for j in range(k.shape[-2])]
        seen = [j for j in range(k.shape[-2]) if (ring_of[j] <= ring_of[i] if both[j] else j <= i)]
        w = torch.softmax(q[..., i - offset, None, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2410.15926",
    system="concentric-causal-attention",
    examples=({"grid": 3}, {"grid": 4, "image_start": 2}),
    laws=(Law({"grid": 1, "image_start": 3}, "causal"), Law({"grid": 4, "image_start": 100}, "causal")),
    causal=False,
    trained=True,
    ranges={"image_start": (0, float("inf"))},
)
def concentric_causal_attention(grid: int = 24, image_start: int = 0) -> Scores:
    """An image of `grid` x `grid` tokens from position `image_start` on, text around it."""

    def in_image(n):
        return (n >= image_start) & (n < image_start + grid * grid)

    def mask(b, h, i, j):
        both = in_image(i) & in_image(j)
        return (both & (ring(j - image_start, grid) <= ring(i - image_start, grid))) | (~both & (j <= i))

    return Scores(mask=mask)


def ring(n, grid):
    """How far from the border token n of an image is; any number outside the image."""
    row, column = n // grid, n % grid
    return torch.minimum(torch.minimum(row, grid - 1 - row), torch.minimum(column, grid - 1 - column))


def rotary_positions(n, grid=24, image_start=0):
    """Where positions n, int64 of any shape, stand for rotary embeddings."""
    rings, after = (grid + 1) // 2, n - grid * grid
    late = torch.where(after < image_start, image_start + ring(n - image_start, grid), after + rings)
    return torch.where(n < image_start, n, late)
