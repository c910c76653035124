"""InfLLM-V2: dense attention up to a length, and beyond it blocks that the overlapping means of their keys recommend.

    K_j = mean(k_{16 j}, ..., k_{16 j + 31}),   p_h = softmax_j(q_ih . K_j / sqrt(d)) over the means that end by i
    s_n = max over the means that overlap block n of sum_h p_h,   h in the heads that share a key head
    o_i = sum_{j <= i, block(j) in I_i} softmax_j(q_i . k_j / sqrt(d)) v_j
    I_i = the blocks of the window and the first ones, and of the other past blocks those with greatest s_n

The weights are those of dense attention, and the choice adds none; no gradient flows through it. A query is dense while
it has no more than `dense_len` keys, so that a prompt read at once and token by token give the same; the authors' code
asks for the length of the whole prompt. Their kernel takes the divisor of the softmax from longer means, as an
approximation; here it is exact.

Zhao, Zhou, Su, Xiao, Li, et al. "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation."
2025. arXiv:2509.24663.
"""

import math

import torch

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import Past, best_windows, window_means


def reference(
    q, k, v, *, block_size=64, top_k=64, window=2048, init_blocks=1, kernel=32, stride=16, dense_len=8192, group=None
):
    group, offset = group or 1, k.shape[-2] - q.shape[-2]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for b, h, row in ((b, h, row) for b in range(q.shape[0]) for h in range(q.shape[1]) for row in range(q.shape[2])):
        i = offset + row
        own, together = i // block_size, range(h // group * group, h // group * group + group)
        ends = range(kernel - 1, i + 1, stride)
        chosen = set(range(own + 1))
        if i >= dense_len:
            mass = [0.0] * len(ends)
            for g in together if ends else ():
                means = torch.stack([k[b, g, end - kernel + 1 : end + 1].mean(0) for end in ends])
                shares = (means @ q[b, g, row] / q.shape[-1] ** 0.5).softmax(-1).tolist()
                mass = [m + share for m, share in zip(mass, shares, strict=True)]
            score = dict.fromkeys(chosen, 0.0)
            for m, end in zip(mass, ends, strict=True):
                for n in range((end - kernel + 1) // block_size, end // block_size + 1):
                    score[n] = max(score[n], m)
            local = -(-window // block_size)
            forced = {n for n in chosen if n < init_blocks or n > own - local}
            ranked = sorted(chosen, key=lambda n: (n not in forced, -score[n], n))
            chosen = set(ranked[: max(top_k, init_blocks) + local])
        seen = [j for j in range(i + 1) if j // block_size in chosen]
        out[b, h, row] = (k[b, h, seen] @ q[b, h, row] / q.shape[-1] ** 0.5).softmax(-1) @ v[b, h, seen]
    return out


def at(context):
    stride = max(4, context // 128)
    sizes = {"block_size": 4 * stride, "kernel": 2 * stride, "stride": stride}
    return {**sizes, "top_k": 6, "window": context // 16, "dense_len": context // 4}


SMALL = {"block_size": 4, "window": 4, "kernel": 4, "stride": 2}


@mechanism(
    reference=reference,
    arxiv="2509.24663",
    system="infllm-v2",
    examples=(
        {**SMALL, "top_k": 2, "dense_len": 0, "group": 1},
        {**SMALL, "top_k": 1, "window": 6, "init_blocks": 0, "dense_len": 9, "group": 2},
        {**SMALL, "top_k": 1, "kernel": 2, "dense_len": 0, "group": 2},
    ),
    laws=(
        Law({**SMALL, "top_k": 10**6, "dense_len": 0}, "causal"),
        Law({**SMALL, "window": 10**6, "dense_len": 0}, "causal"),
        Law({**SMALL, "top_k": 1, "dense_len": 17}, "causal"),
    ),
    ranges={"init_blocks": (0, math.inf), "dense_len": (0, math.inf)},
    at=at,
)
def infllm_v2(
    block_size: int = 64, top_k: int = 64, window: int = 2048, init_blocks: int = 1, kernel: int = 32,
    stride: int = 16, dense_len: int = 8192, group: int | None = None,
) -> Selection:  # fmt: skip
    """`top_k` blocks for each query beside those of its `window`, `init_blocks` of them the first ones. Every `group`
    heads choose together; None for those that share a key head."""
    if kernel % stride or block_size % stride:
        raise ValueError(f"stride {stride} must divide kernel {kernel} and block_size {block_size}")
    local = -(-window // block_size)

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        together = group or q.shape[1] // k.shape[1]
        if q.shape[1] % together:
            raise ValueError(f"group {together} must divide the {q.shape[1]} heads")
        past = Past(query_block=1, key_block=block_size, offset=offset, first=init_blocks, local=local - 1)
        # Neighbours that share their best mean are equally good: the first one comes first.
        blocks = best_windows(
            q, window_means(k, kernel, stride), max(top_k, init_blocks) + local, past, kernel=kernel, stride=stride,
            scale=scale, together=together, dense=dense_len,
        )  # fmt: skip
        return Blocks(*(t.repeat_interleave(together, 1) for t in (blocks.indices, blocks.counts)))

    return Selection(
        select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=1, key_block=block_size,
        together=group is None,
    )  # fmt: skip
