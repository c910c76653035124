"""Sliding window with attention sinks: the most recent keys, and the first few, which softmax needs to lean on.

    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j,   S_i = {j <= i : i - j < window or j < sinks}

`window` counts keys, the query's own included. Tokens keep their positions here; the paper's cache counts positions
anew inside the cache, which a layer with rotary positions has to do before it calls this.

Xiao, Tian, Chen, Han, Lewis. "Efficient Streaming Language Models with Attention Sinks." 2023. arXiv:2309.17453.
"""

import math

import torch

from manyheads.core import Law, Scores, mechanism


def reference(q, k, v, *, window=1024, sinks=4):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        end = offset + i + 1
        start = max(0, end - window)
        seen = [*range(min(sinks, start)), *range(start, end)]
        w = torch.softmax(q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(w @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2309.17453",
    examples=({"window": 4, "sinks": 2}, {"window": 3, "sinks": 0}, {"window": 1, "sinks": 1}),
    laws=(Law({"window": 10**9}, "causal"), Law({"window": 1, "sinks": 10**9}, "causal")),
    at=lambda context: {"window": max(1, context // 4)},
    ranges={"sinks": (0, math.inf)},
)
def sliding_window(window: int = 1024, sinks: int = 4) -> Scores:
    """The last `window` keys and the first `sinks`."""
    return Scores(mask=lambda b, h, i, j: (j <= i) & ((i - j < window) | (j < sinks)))
