"""FlexPrefill: the last block of queries shows, head by head, which blocks of the prompt are worth computing.

    A^ = softmax(Q^ K^T / sqrt(d)), Q^ the last block of queries;  a^_n = its mass in key block n, averaged over Q^
    a-_n = softmax_n(mean(Q^) . mean(K_n) / sqrt(d));  D = sqrt(JSD(a-, a^))

    D >= tau: key blocks and block diagonals, each the fewest that hold gamma of A^
    D < tau:  cells (m, n) of softmax_n(mean(Q_m) . mean(K_n) / sqrt(d)), the fewest that hold gamma of the whole map

and o_i = softmax attention over the keys j <= i of the blocks chosen for i. Every head keeps at least `min_budget` keys'
worth of blocks and of diagonals, with the first block and the main diagonal among them. Short prompts and decoding steps
are dense. The paper ranks single columns and diagonals and its code takes as many blocks as these would fill; blocks are
ranked here, so that what is kept does hold gamma.

Lai, Lu, Luo, Ma, Zhou. "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference."
2025. arXiv:2502.20766.
"""

import math

import torch
import torch.nn.functional as F

from manyheads.core import Blocks, Law, Scores, Selection, mechanism


def reference(q, k, v, *, gamma=0.95, tau=0.1, block_size=128, min_budget=1024):
    (batch, heads, q_len, d), n = q.shape, k.shape[-2]
    offset, size, out = n - q_len, block_size, []
    key_blocks = [range(s, min(s + size, n)) for s in range(0, n, size)]
    query_blocks = {m: [i for i in range(q_len) if (offset + i) // size == m] for m in range(offset // size, -(-n // size))}
    for b in range(batch):
        for h in range(heads):
            q_h, k_h, v_h = q[b, h], k[b, h], v[b, h]
            cells = {(m, t) for m in query_blocks for t in range(m + 1)}
            if q_len > max(2 * size, min_budget):
                least = max(1, -(-min_budget // size))
                shown = range(q_len - size, q_len)
                a = {i: (q_h[i] @ k_h[: offset + i + 1].T / d**0.5).softmax(-1).tolist() for i in shown}
                columns, diagonals = [0.0] * len(key_blocks), [0.0] * len(key_blocks)
                for i in shown:
                    for j, w in enumerate(a[i]):
                        columns[j // size] += w / size
                        diagonals[(offset + i - j) // size] += w / size
                k_means = torch.stack([k_h[list(block)].mean(0) for block in key_blocks])
                estimate = (k_means @ q_h[q_len - size :].mean(0) / d**0.5).softmax(-1).tolist()
                aware = math.sqrt(max(0.0, _divergence(estimate, columns))) < tau
                share = 0.0 if aware else gamma
                kept_columns = _fewest(dict(enumerate(columns)), share, least, first=0)
                kept_diagonals = _fewest(dict(enumerate(diagonals)), share, least, first=0)
                striped = {(m, t) for m, t in cells if t in kept_columns or m - t in kept_diagonals}
                if aware:
                    rows = {m: (k_means[: m + 1] @ q_h[of].mean(0) / d**0.5).softmax(-1) for m, of in query_blocks.items()}
                    pooled = {(m, t): float(rows[m][t]) / len(rows) for m, t in cells}
                    striped |= _fewest(pooled, gamma, 0)
                cells = striped
            for i in range(q_len):
                seen = [j for j in range(offset + i + 1) if ((offset + i) // size, j // size) in cells]
                out.append((q_h[i] @ k_h[seen].T / d**0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(batch, heads, q_len, -1)


def _divergence(p, q):
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return sum(x * math.log(x / z) / 2 for side in (p, q) for x, z in zip(side, m, strict=True) if x > 0)


def _fewest(mass, share, least, first=None):
    """The heaviest entries that hold the share, at least so many, `first` before all."""
    kept, total = set(), 0.0
    for entry in sorted(mass, key=lambda e: (e != first, -mass[e])):
        if share < 1 and total >= share and len(kept) >= least:
            break
        kept.add(entry)
        total += mass[entry]
    return kept


@mechanism(
    reference=reference,
    arxiv="2502.20766",
    system="flexprefill",
    examples=(
        {"gamma": 0.6, "tau": 0.0, "block_size": 3, "min_budget": 3},
        {"gamma": 0.5, "tau": 1.0, "block_size": 2, "min_budget": 2},
        {"gamma": 0.7, "tau": 0.2, "block_size": 2, "min_budget": 4},
    ),
    laws=(
        Law({"gamma": 1.0, "tau": 0.0, "block_size": 2, "min_budget": 2}, "causal"),
        Law({"gamma": 1.0, "tau": 1.0, "block_size": 2, "min_budget": 2}, "causal"),
        Law({"min_budget": 10**6}, "causal"),
    ),
    sees_future="the last block of queries chooses the key blocks of all queries",
    at=lambda context: {"gamma": 0.9, "block_size": max(1, context // 32), "min_budget": context // 16},
)
def flexprefill(gamma: float = 0.95, tau: float = 0.1, block_size: int = 128, min_budget: int = 1024) -> Selection:
    """Blocks that hold `gamma` of the mass; heads whose estimate is off by `tau` or more keep stripes instead."""
    least = max(1, -(-min_budget // block_size))

    def scores(q, k):
        return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)

    def pool(x, start):
        """Means over the blocks of x [..., len, dim], whose first token stands at `start` in its block."""
        blocks = -(-(start + x.shape[-2]) // block_size)
        tail = blocks * block_size - start - x.shape[-2]
        total = F.pad(x, (0, 0, start, tail)).unflatten(-2, (blocks, block_size)).sum(-2)
        there = F.pad(x.new_ones(x.shape[-2], 1), (0, 0, start, tail)).unflatten(-2, (blocks, block_size)).sum(-2)
        return total / there

    def fewest(mass, share, least=0, first=None):
        """The entries of the last dimension that hold the share, at least so many, `first` before all: a map."""
        rank = mass.clone()
        if first is not None:
            rank[..., first] = torch.inf
        order = rank.argsort(-1, descending=True, stable=True)
        sorted_mass = mass.gather(-1, order)
        before = sorted_mass.cumsum(-1) - sorted_mass
        number = torch.arange(mass.shape[-1], device=mass.device)
        kept = (before < share) | (number < least) | (share >= 1)
        return torch.zeros_like(kept).scatter(-1, order, kept)

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        q_len, n = q.shape[-2], k.shape[-2]
        m = torch.arange(offset // block_size, -(-n // block_size), device=q.device)[:, None]
        t = torch.arange(-(-n // block_size), device=q.device)
        keep = (t <= m).expand(*q.shape[:2], -1, -1)
        if q_len <= max(2 * block_size, min_budget):
            return Blocks.from_map(keep)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide) * scale, k.to(wide)

        shown = q[..., -block_size:, :]
        distance = torch.arange(n - block_size, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        a = scores(shown, k).masked_fill(distance < 0, -torch.inf).softmax(-1) / block_size
        empty = a.new_zeros(*q.shape[:2], len(t))
        column = (torch.arange(n, device=q.device) // block_size).expand(*a.shape[:2], -1)
        diagonal = (distance.clamp(min=0) // block_size).flatten().expand(*a.shape[:2], -1)
        columns = empty.scatter_add(-1, column, a.sum(-2))
        diagonals = empty.scatter_add(-1, diagonal, a.flatten(-2))

        k_means = pool(k, 0)
        estimate = scores(shown.mean(-2, keepdim=True), k_means).softmax(-1).squeeze(-2)
        middle = (estimate + columns) / 2
        divergence = sum((torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1) for p in (estimate, columns)) / 2
        aware = (divergence.clamp(min=0).sqrt() < tau)[..., None]

        share = torch.where(aware, 0.0, gamma)
        vertical, slash = fewest(columns, share, least, first=0), fewest(diagonals, share, least, first=0)
        stripes = vertical[..., None, :] | slash[..., (m - t).clamp(min=0)]
        pooled = scores(pool(q, offset % block_size), k_means).masked_fill(t > m, -torch.inf).softmax(-1) / len(m)
        cells = fewest(pooled.flatten(-2), torch.full_like(share, gamma)).view_as(pooled)
        return Blocks.from_map(keep & (stripes | cells & aware[..., None]))

    return Selection(
        select=select,
        scores=Scores(mask=lambda b, h, i, j: j <= i),
        query_block=block_size,
        key_block=block_size,
    )
