"""HiP attention: a tournament between ever shorter chunks of keys finds what a block of queries likes best.

    start:      C = the past key blocks of query block m, cut into top_k / b_k chunks of equal length
    each round: every chunk is halved, C = the top_k / b_k halves with the greatest
                s(half) = max of q_i . k_j over i in query block m and j in the middle block of the half
    end:        log2(length) rounds later, each chunk is one block of b_k keys

and o_i is softmax attention over the keys j <= i of those blocks and of the ones that query block m itself overlaps.
A block of queries looks at 2 top_k keys a round instead of at all T, so this is O(T log T), and finds the best keys as
far as neighbours are liked alike. The paper keeps the first three layers of a model dense and, in decoding, lets a
choice serve several steps; its kernels score a sample of each pair of blocks.

Lee, Park, Lee, Suh, Kim, et al. "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with
Hierarchically Pruned Attention." 2024. arXiv:2406.09827.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import by_runs

RUN = 8  # query blocks whose tournaments are held at a time


def reference(q, k, v, *, top_k=512, query_block=32, key_block=2):
    out = []
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        offset, winners = len(k_h) - len(q_h), {}
        for i, q_i in enumerate(q_h, offset):
            m = i // query_block
            own = m * query_block // key_block
            if m not in winners:
                rows = q_h[max(0, m * query_block - offset) : (m + 1) * query_block - offset]
                winners[m] = _tournament(rows, k_h, own, max(1, top_k // key_block), key_block)
            seen = [j for j in range(i + 1) if j // key_block >= own or j // key_block in winners[m]]
            out.append((k_h[seen] @ q_i / q.shape[-1] ** 0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _tournament(rows, k, blocks, count, size):
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
            return (rows @ k[centre * size : (centre + 1) * size].T).max().item()

        chunks = sorted(halves, key=score, reverse=True)[:count]
    return {low for low, _ in chunks}


@mechanism(
    reference=reference,
    arxiv="2406.09827",
    system="hip-attention",
    examples=(
        {"top_k": 4, "query_block": 4, "key_block": 2},
        {"top_k": 3, "query_block": 1, "key_block": 1},
        {"top_k": 4, "query_block": 3, "key_block": 2},
    ),
    laws=(
        Law({"top_k": 10**6, "query_block": 4, "key_block": 2}, "causal"),
        Law({"top_k": 1, "query_block": 10**6, "key_block": 1}, "causal"),
    ),
    sees_future="the queries of a block choose together, for the first of them as well; query_block=1 is causal",
    at=lambda context: {"top_k": max(2, context // 4)},
)
def hip_attention(top_k: int = 512, query_block: int = 32, key_block: int = 2) -> Selection:
    """`top_k` past keys for each block of queries, in blocks of `key_block`, beside those of the block itself."""
    count = max(1, top_k // key_block)

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        wide, n = torch.promote_types(q.dtype, torch.float32), k.shape[-2]
        tiles = F.pad(k.to(wide), (0, 0, 0, -n % key_block)).unflatten(-2, (-1, key_block))
        q = F.pad(q.to(wide), (0, 0, offset % query_block, -n % query_block))
        rounds = (max(1, -(-(n // key_block) // count)) - 1).bit_length()
        t = torch.arange(tiles.shape[2], device=q.device)

        def choose(q, first):
            rows = q.unflatten(-2, (-1, query_block))
            begin = torch.arange(first, first + q.shape[-2], query_block, device=q.device)[:, None]
            i = begin + torch.arange(query_block, device=q.device)
            low, high = _tournament_of(rows, (i >= offset) & (i < n), tiles, begin // key_block, count, rounds)
            # Chunks that are empty go to a block of their own, behind the last one, which is cut off again.
            at = torch.where(low < high, low, len(t))
            keep = torch.zeros(*low.shape[:-1], len(t) + 1, dtype=torch.bool, device=q.device).scatter(-1, at, True)
            return keep[..., :-1] | ((t >= begin // key_block) & (t * key_block < begin + query_block))

        first = offset - offset % query_block
        return Blocks.from_map(by_runs(choose, q, first, RUN * query_block))

    return Selection(
        select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=query_block, key_block=key_block
    )


def _tournament_of(rows, there, tiles, blocks, count, rounds):
    """Where the chunks that stay begin and end, [batch, heads, m, count] each: of the first `blocks` [m, 1] tiles of
    keys [batch, kv_heads, t, size, dim], for rows [batch, heads, m, query_block, dim] that are `there`."""
    batch, heads, m = rows.shape[:3]
    kv_heads = tiles.shape[1]
    grouped = rows.unflatten(1, (kv_heads, -1))
    cuts = torch.arange(count + 1, device=rows.device) * blocks // count
    low, high = (x.expand(batch, heads, m, count) for x in (cuts[:, :-1], cuts[:, 1:]))
    for _ in range(rounds):
        middle = (low + high) // 2
        low, high = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
        centre = ((low + high) // 2).view(batch, kv_heads, -1)
        picked = tiles.gather(2, centre[..., None, None].expand(-1, -1, -1, *tiles.shape[3:]))
        picked = picked.view(batch, kv_heads, -1, m, 2 * count, *tiles.shape[3:])
        s = torch.einsum("bkgmid,bkgmcjd->bkgmcij", grouped, picked).flatten(1, 2)
        s = s.masked_fill(~there[:, None, :, None], -torch.inf).amax((-2, -1)).masked_fill(low >= high, -torch.inf)
        best = s.topk(count, dim=-1).indices
        low, high = low.gather(-1, best), high.gather(-1, best)
    return low, high
