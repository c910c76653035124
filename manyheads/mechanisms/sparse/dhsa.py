"""DHSA: keys are cut into chunks where they change, and a block of queries sees the tokens of the chunks it likes best.

    b_i = -cos(mean(k_{i-3}, ..., k_i), mean(k_{i+1}, ..., k_{i+4})),   over the channels of all heads
    a chunk ends at i if no b within 8 of it is greater, and b_i is among the n / chunk_size greatest that are left
    K_c = (sum of k_j in chunk c) / sqrt(|c|),   s_mj = mean(Q_m) . K_{chunk(j)}, both means over the heads as well

Query block m sees so many `keys`: the last `local` up to its end, the `first` ones, then those with the greatest s_mj,
the earlier of two in one chunk; never fewer than its own. All heads see the same. Blocks that hold one of the last
`instruction` queries of a prompt are dense. o_i is softmax attention over the keys j <= i of these.

A `grain` of more than 1 is not in the paper: chunks begin at multiples of it, each at the one nearest to where it
would begin, and keys are counted in so many. Lists are as much shorter, and with 16 there are kernels that read them.

Where a chunk ends is said in the paper by a small trained network that reads the same two windows, and its similarity
among other features; here that feature alone says it, so that no weights are needed.

Xiong, Zou, Fekri, Cho. "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs." 2025.
arXiv:2510.24606.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import best, best_blocks, block_means

SCORES = 2**24  # of query blocks and keys that are held at a time
SIDE, APART = 4, 8  # keys on either side of a boundary, and between two boundaries


def reference(
    q, k, v, *, keys=2048, query_block=64, chunk_size=64, local=128, first=128, instruction=64, grain=1
):  # fmt: skip
    n, out = k.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    offset = n - q.shape[-2]
    for b in range(q.shape[0]):
        chunks, chosen = _chunks(k[b], chunk_size, grain), {}
        for row in range(q.shape[2]):
            i, m = offset + row, (offset + row) // query_block
            end = min((m + 1) * query_block, n)
            if m not in chosen:
                mean = q[b, :, max(0, m * query_block - offset) : end - offset].mean((0, 1))
                s = {j: (mean @ k[b, :, c].mean(0).sum(0)).item() / len(c) ** 0.5 for c in chunks for j in c}
                grains, recent = range(-(-end // grain)), -(-max(local, query_block) // grain)
                forced = {g for g in grains if g * grain < first or g >= len(grains) - recent}
                ranked = sorted(grains, key=lambda g: (g not in forced, -s[g * grain], g))
                dense = end > n - instruction and q.shape[2] > instruction
                count = max(-(-keys // grain), -(-first // grain) + recent)
                chosen[m] = set(grains if dense else ranked[:count])
            seen = [j for j in range(i + 1) if j // grain in chosen[m]]
            for h in range(q.shape[1]):
                out[b, h, row] = (k[b, h, seen] @ q[b, h, row] / q.shape[-1] ** 0.5).softmax(-1) @ v[b, h, seen]
    return out


def _chunks(k, size, grain):
    """The chunks of keys [heads, n, dim], as lists of positions."""
    n, scores = k.shape[1], {}
    for i in range(SIDE - 1, n - SIDE):
        left, right = k[:, i - SIDE + 1 : i + 1].mean(1), k[:, i + 1 : i + 1 + SIDE].mean(1)
        scores[i] = -F.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()
    peaks = [i for i in scores if all(scores.get(i + d, -2) <= scores[i] for d in range(-APART, APART + 1))]
    ends = sorted(peaks, key=lambda i: -scores[i])[: n // size]
    cuts = sorted({0, *((i + 1 + grain // 2) // grain * grain for i in ends)} - set(range(n, n + grain)))
    return [list(range(start, end)) for start, end in pairwise([*cuts, n])]


def at(context):
    part = context // 32
    return {"keys": context // 4, "query_block": 2 * part, "local": 2 * part, "first": part, "instruction": 0}


@mechanism(
    reference=reference,
    arxiv="2510.24606",
    system="dhsa",
    examples=(
        {"keys": 6, "query_block": 4, "chunk_size": 4, "local": 3, "first": 1, "instruction": 0},
        {"keys": 5, "query_block": 1, "chunk_size": 6, "local": 1, "first": 0, "instruction": 3},
        {"keys": 7, "query_block": 4, "chunk_size": 5, "local": 2, "first": 1, "instruction": 4, "grain": 2},
    ),
    laws=(
        Law({"keys": 10**6, "query_block": 2, "chunk_size": 4}, "causal"),
        Law({"keys": 3, "query_block": 4, "chunk_size": 4, "local": 10**6, "grain": 2}, "causal"),
    ),
    sees_future="where a chunk ends depends on later keys, and a block of queries chooses by its mean",
    at=at,
    ranges={"first": (0, math.inf), "instruction": (0, math.inf)},
)
def dhsa(
    keys: int = 2048, query_block: int = 64, chunk_size: int = 64, local: int = 128, first: int = 128,
    instruction: int = 64, grain: int = 1,
) -> Selection:  # fmt: skip
    """So many `keys` for each block of queries, `local` and `first` ones among them; chunks of `chunk_size` on average,
    or longer."""
    if query_block % grain:
        raise ValueError(f"grain {grain} must divide query_block {query_block}")
    recent, count = -(-max(local, query_block) // grain), -(-keys // grain)
    count = max(count, recent + -(-first // grain))

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        (batch, heads, q_len, dim), n = q.shape, k.shape[-2]
        wide = torch.promote_types(q.dtype, torch.float32)
        chunk = _chunk_numbers(k, chunk_size, grain)
        k_mean, at = k.mean(1, dtype=wide), chunk.repeat_interleave(grain, -1)[:, :n]
        # Sums as differences of running ones: adding up by chunk numbers takes another order each time on a GPU.
        numbers = torch.arange(n // chunk_size + 1, device=q.device).repeat(batch, 1)
        ends = F.pad(torch.searchsorted(at.contiguous(), numbers, right=True), (1, 0))
        running = F.pad(k_mean.double().mT.contiguous().cumsum(-1), (1, 0))  # along memory, which is faster
        sums = running.gather(-1, ends[:, None].expand(-1, dim, -1)).diff(dim=-1).mT.to(wide)
        k_chunks = sums / ends.diff(dim=-1).clamp(min=1).sqrt()[..., None]
        q_means = block_means(q.mean(1, dtype=wide), query_block, offset % query_block)
        g = torch.arange(chunk.shape[-1], device=q.device)

        def choose(q_means, block):
            ends = (torch.arange(block, block + q_means.shape[1], device=q.device)[:, None] + 1) * query_block
            ends = ends.clamp(max=n)
            last = (ends + grain - 1) // grain
            s = (q_means @ k_chunks.mT).gather(-1, chunk[:, None].expand(-1, q_means.shape[1], -1))
            s = s.masked_fill((g * grain < first) | (g >= last - recent), torch.inf).masked_fill(g >= last, -torch.inf)
            chosen = best_blocks(s, count)  # the keys of one chunk are equally good
            if q_len <= instruction or not instruction:
                return chosen
            dense, more = ends > n - instruction, len(g) - chosen.indices.shape[-1]
            indices = torch.where(dense, g.int(), F.pad(chosen.indices, (0, more)))
            return Blocks(indices, torch.where(dense[:, 0], last[:, 0].int(), chosen.counts))

        size = max(1, SCORES // max(1, len(g)))
        runs = [choose(run, offset // query_block + size * t) for t, run in enumerate(q_means.split(size, 1))]
        indices, counts = torch.cat([run.indices for run in runs], 1), torch.cat([run.counts for run in runs], 1)
        return Blocks(indices[:, None].expand(-1, heads, -1, -1), counts[:, None].expand(-1, heads, -1))

    return Selection(
        select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=query_block, key_block=grain
    )


def _chunk_numbers(k, size, grain=1):
    """Which chunk each `grain` keys are in, [batch, grains], counted from 0: of keys [batch, kv_heads, n, dim]."""
    n, x = k.shape[-2], k.transpose(1, 2).flatten(2)
    if n < 2 * SIDE:
        return torch.zeros(k.shape[0], -(-n // grain), dtype=torch.long, device=k.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sides = x.unfold(1, SIDE, 1).mean(-1)
    score = -F.cosine_similarity(sides[:, :-SIDE], sides[:, SIDE:], dim=-1)
    peak = score >= F.max_pool1d(score[:, None], 2 * APART + 1, 1, APART)[:, 0]
    starts = F.pad(best(score.masked_fill(~peak, -torch.inf), n // size), (SIDE + grain // 2, SIDE - 1))
    starts = F.pad(starts, (0, -starts.shape[-1] % grain)).unflatten(-1, (-1, grain)).any(-1)[:, : -(-n // grain)]
    return starts.cumsum(-1)
