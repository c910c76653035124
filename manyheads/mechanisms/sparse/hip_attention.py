"""HiP attention: a tournament between ever shorter chunks of keys finds what a block of queries likes best.

    start:      C = the past key blocks of query block m, cut into top_k / b_k chunks of equal length
    each round: every chunk is halved, C = the top_k / b_k halves with the greatest
                s(half) = max of q_i . k_j over i in query block m and j in the middle block of the half
    end:        log2(length) rounds later, each chunk is one block of b_k keys

and o_i is softmax attention over the keys j <= i of those blocks and of the ones that query block m itself overlaps.
A block of queries looks at 2 top_k keys a round instead of at all T, so this is O(T log T), and finds the best keys as
far as neighbours are liked alike. The paper keeps the first three layers of a model dense and, in decoding, lets a
choice serve several steps. Its kernels score a sample of each pair of blocks: every `query_stride`-th query, the first
one first, and the last of every `key_stride` keys; their defaults are 2 and 1.

Lee, Park, Lee, Suh, Kim, et al. "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with
Hierarchically Pruned Attention." 2024. arXiv:2406.09827.
"""

from itertools import pairwise

import torch

from manyheads.core import Law, Scores, Selection, mechanism
from manyheads.core.choosing import tournament


def reference(q, k, v, *, top_k=512, query_block=32, key_block=2, query_stride=1, key_stride=1):
    out = []
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        offset, winners = len(k_h) - len(q_h), {}
        for i, q_i in enumerate(q_h, offset):
            m = i // query_block
            own = m * query_block // key_block
            if m not in winners:
                rows = q_h[max(0, m * query_block - offset) : (m + 1) * query_block - offset]
                winners[m] = _tournament(
                    rows[::query_stride], k_h, own, max(1, top_k // key_block), key_block, key_stride
                )
            seen = [j for j in range(i + 1) if j // key_block >= own or j // key_block in winners[m]]
            out.append((k_h[seen] @ q_i / q.shape[-1] ** 0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _tournament(rows, k, blocks, count, size, stride):
    """Which of the first key blocks stay."""
    cuts = [n * blocks // count for n in range(count + 1)]
    chunks = [(low, high) for low, high in pairwise(cuts) if low < high]
    while any(high - low > 1 for low, high in chunks):
        halves = []
        for low, high in chunks:
            middle = (low + high) // 2
            halves += [half for half in ((low, middle), (middle, high)) if half[0] < half[1]]

        def score(half):
            centre = sum(half) // 2
            return (rows @ k[centre * size : (centre + 1) * size][stride - 1 :: stride].T).max().item()

        chunks = sorted(sorted(halves, key=score, reverse=True)[:count])
    return {low for low, _ in chunks}


@mechanism(
    reference=reference,
    arxiv="2406.09827",
    system="hip-attention",
    examples=(
        {"top_k": 4, "query_block": 4, "key_block": 2},
        {"top_k": 3, "query_block": 1, "key_block": 1},
        {"top_k": 4, "query_block": 3, "key_block": 2},
        {"top_k": 4, "query_block": 4, "key_block": 2, "query_stride": 2, "key_stride": 2},
    ),
    laws=(
        Law({"top_k": 10**6, "query_block": 4, "key_block": 2}, "causal"),
        Law({"top_k": 1, "query_block": 10**6, "key_block": 1}, "causal"),
    ),
    sees_future="the queries of a block choose together, for the first of them as well; query_block=1 is causal",
    at=lambda context: {"top_k": max(2, context // 4)},
)
def hip_attention(
    top_k: int = 512, query_block: int = 32, key_block: int = 2, query_stride: int = 1, key_stride: int = 1
) -> Selection:
    """`top_k` past keys for each block of queries, in blocks of `key_block`, beside those of the block itself. Scores
    are those of every so many queries and keys of a pair of blocks."""
    if key_stride > key_block:
        raise ValueError(f"no key of a block of {key_block} would be scored with key_stride {key_stride}")

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        return tournament(
            q, k, max(1, top_k // key_block), query_block=query_block, key_block=key_block, offset=offset,
            query_stride=query_stride, key_stride=key_stride,
        )  # fmt: skip

    return Selection(
        select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=query_block, key_block=key_block
    )
