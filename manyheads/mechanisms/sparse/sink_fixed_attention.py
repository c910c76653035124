"""Sink fixed attention (SF-Attn): groups of tokens attend within themselves and to the first few tokens, sinks for all.

    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j
    S_i = {j <= i : group(j) = group(i), or j < sinks},   group(i) = (i + shift_h) // group_size

with shift_h = group_size / 2 in one head of `shifted`, 0 in the others. LongLoRA's S2-Attn is `shifted` = 2 without
sinks: half of the heads are rolled by half a group, so that neighbouring groups exchange something. SF-Attn lets half
of those stay in place, and adds the sinks. Heads have no order, so the last of each `shifted` is taken, whatever their
number. A group is a quarter of a context of 8192 tokens. Models are fine-tuned with it, and answer with full attention.

Two things differ, both for causality. LongLoRA's roll wraps around: the tokens of the first half group see the end of
the text; here they see their own past alone. The paper gives sinks whole rows of the map; here they do not look ahead.
That what is split again and stays in place are heads was read from text and figures' captions: the algorithm's listing
was not at hand, and the released code has S2-Attn only.

Zhang. "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models." 2024.
arXiv:2406.05678.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, group_size=2048, shifted=4, sinks=4):
    n, out = k.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for h in range(q.shape[1]):
        moves = (h + 1) % shifted == 0
        starts = {0, *range(group_size - group_size // 2 if moves else 0, n, group_size)}
        for row, i in enumerate(range(n - q.shape[-2], n)):
            start = max(s for s in starts if s <= i)
            seen = [*range(min(sinks, start)), *range(start, i + 1)]
            w = torch.softmax(q[:, h, row, None] @ k[:, h, seen].mT / q.shape[-1] ** 0.5, -1)
            out[:, h, row] = (w @ v[:, h, seen])[:, 0]
    return out


@mechanism(
    reference=reference,
    arxiv="2406.05678",
    system="sinklora",
    examples=({"group_size": 4, "sinks": 1}, {"group_size": 5, "shifted": 2, "sinks": 0}),
    laws=(
        Law({"group_size": 2 * 10**6}, "causal"),
        Law({"group_size": 2, "sinks": 10**6}, "causal"),
        Law({"group_size": 1, "sinks": 3}, "sliding_window", {"window": 1, "sinks": 3}),
    ),
    at=lambda context: {"group_size": max(1, context // 4)},
    ranges={"sinks": (0, math.inf)},
)
def sink_fixed_attention(group_size: int = 2048, shifted: int = 4, sinks: int = 4) -> Scores:
    """Groups of `group_size` tokens, moved by half of one in every head of `shifted`, and the first `sinks` tokens."""

    def mask(b, h, i, j):
        shift = torch.where(h % shifted == shifted - 1, group_size // 2, 0)
        return (j <= i) & (((i + shift) // group_size == (j + shift) // group_size) | (j < sinks))

    return Scores(mask=mask)
