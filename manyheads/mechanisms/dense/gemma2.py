"""Gemma 2's attention: layers see a sliding window and the whole past in turn, with scores capped smoothly.

    s_ij = cap tanh(q_i . k_j / (cap sqrt(d)))
    o_i = sum_{j in S_i} softmax_j(s_ij) v_j,   S_i = {i - window < j <= i} in even layers, {j <= i} in odd ones

The 2B and 9B models scale by 1 / sqrt(head_dim) as here; the 27B model by 1 / 12, which is the caller's `scale`.

Gemma Team. "Gemma 2: Improving Open Language Models at a Practical Size." 2024. arXiv:2408.00118. Which layers are
local, and that the window counts the query's own key, as in the released models' code.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, layer=0, window=4096, cap=50.0):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        end = offset + i + 1
        seen = slice(max(0, end - window) if layer % 2 == 0 else 0, end)
        s = q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5
        s = s if math.isinf(cap) else cap * torch.tanh(s / cap)
        out.append(torch.softmax(s, dim=-1) @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2408.00118",
    system="gemma2",
    examples=({"window": 5, "cap": 0.7}, {"layer": 1, "window": 5, "cap": 0.7}),
    laws=(
        Law({"layer": 0, "window": 5, "cap": math.inf}, "sliding_window", {"window": 5, "sinks": 0}),
        Law({"layer": 1, "cap": math.inf}, "causal"),
    ),
    at=lambda context: {"window": max(1, context // 4)},
    ranges={"layer": (0, math.inf), "cap": (1e-3, math.inf)},
)
def gemma2(layer: int = 0, window: int = 4096, cap: float = 50.0) -> Scores:
    """Even layers are local, odd ones global; `cap` bounds the scores, math.inf leaves them alone."""

    def local(b, h, i, j):
        return (j <= i) & (i - j < window)

    def everything(b, h, i, j):
        return j <= i

    def capped(s, b, h, i, j):
        return cap * torch.tanh(s / cap)

    return Scores(mask=local if layer % 2 == 0 else everything, score=None if math.isinf(cap) else capped)
