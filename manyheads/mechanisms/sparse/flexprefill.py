"""FlexPrefill: the last block of queries shows, head by head, which blocks of the prompt are worth computing.

    A^ = softmax(Q^ K^T / sqrt(d)), Q^ the last block of queries;  a^_n = its mass in key block n, averaged over Q^
    a-_n = softmax_n(mean(Q^) . mean(K_n) / sqrt(d));  D = sqrt(JSD(a-, a^))

    D >= tau: key blocks and block diagonals, each the fewest that hold gamma of A^
    D < tau:  cells (m, n) of softmax_n(mean(Q_m) . mean(K_n) / sqrt(d)), the fewest that hold gamma of the whole map

and o_i is softmax attention over the keys j <= i of the blocks chosen for i. Each head keeps blocks and diagonals worth
`min_budget` keys at the least, the first block and the main diagonal among them. Short prompts and decoding steps are
dense. The paper ranks single columns and diagonals, and its code takes as many blocks as these would fill; blocks are
ranked here, so that what is kept does hold gamma.

Lai, Lu, Luo, Ma, Zhou. "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference."
2025. arXiv:2502.20766.
"""

import math

import torch

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.builders import crossed, heaviest_cells, heaviest_stripes
from manyheads.core.choosing import block_means, past_blocks, stripes


def reference(q, k, v, *, gamma=0.95, tau=0.1, block_size=128, min_budget=1024):
    out = []
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        cells = _cells(q_h, k_h, gamma, tau, block_size, min_budget)
        for i, q_i in enumerate(q_h, len(k_h) - len(q_h)):
            seen = [j for j in range(i + 1) if (i // block_size, j // block_size) in cells]
            out.append((k_h[seen] @ q_i / q.shape[-1] ** 0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _cells(q, k, gamma, tau, size, min_budget):
    """The pairs of a query block and a key block that one head computes."""
    n, offset, scale = len(k), len(k) - len(q), q.shape[-1] ** -0.5
    ends = {t: min((t + 1) * size, n) for t in range(-(-n // size))}
    all_cells = {(m, t) for m in range(offset // size, len(ends)) for t in range(m + 1)}
    if len(q) <= max(2 * size, min_budget):
        return all_cells
    columns, diagonals = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 0.0)
    for i in range(n - size, n):
        for j, weight in enumerate((k[: i + 1] @ q[i - offset] * scale).softmax(-1).tolist()):
            columns[j // size] += weight / size
            diagonals[(i - j) // size] += weight / size
    k_means = torch.stack([k[t * size : end].mean(0) for t, end in ends.items()])
    estimate = (k_means @ q[-size:].mean(0) * scale).softmax(-1).tolist()
    aware = _divergence(estimate, list(columns.values())) < tau
    least = max(1, -(-min_budget // size))
    kept_columns = _fewest(columns, 0.0 if aware else gamma, least, first=0)
    kept_diagonals = _fewest(diagonals, 0.0 if aware else gamma, least, first=0)
    cells = {(m, t) for m, t in all_cells if t in kept_columns or m - t in kept_diagonals}
    if aware:
        rows = sorted({m for m, _ in all_cells})
        pooled = {}
        for m in rows:
            q_mean = q[max(0, m * size - offset) : ends[m] - offset].mean(0)
            weights = (k_means[: m + 1] @ q_mean * scale).softmax(-1).tolist()
            pooled |= {(m, t): weight / len(rows) for t, weight in enumerate(weights)}
        cells |= _fewest(pooled, gamma)
    return cells


def _divergence(p, q):
    """The root of the Jensen-Shannon divergence."""
    pairs = [(x, (x + y) / 2) for x, y in [*zip(p, q, strict=True), *zip(q, p, strict=True)]]
    return math.sqrt(max(0.0, sum(x * math.log(x / middle) for x, middle in pairs if x > 0) / 2))


def _fewest(mass, share, least=0, first=None):
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
    ranges={"gamma": (0, 1), "min_budget": (0, math.inf)},
)
def flexprefill(gamma: float = 0.95, tau: float = 0.1, block_size: int = 128, min_budget: int = 1024) -> Selection:
    """Blocks that hold `gamma` of the mass; heads whose estimate is off by `tau` or more keep stripes instead."""
    least = max(1, -(-min_budget // block_size))

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        q_len, n = q.shape[-2], k.shape[-2]
        if q_len <= max(2 * block_size, min_budget):
            first, blocks = offset // block_size, -(-n // block_size)
            past = past_blocks(blocks - first, blocks, first=first, device=q.device)
            return Blocks.from_map(past.expand(*q.shape[:2], -1, -1))
        shown = q[..., -block_size:, :]
        k_means, mass = block_means(k, block_size), stripes(shown, k, block_size, scale=scale)
        (columns, diagonals), share = heaviest_stripes(shown, k_means, mass, scale, gamma, tau, least)
        cells = heaviest_cells(q, k_means, scale, share, block_size, offset)
        return Blocks(*crossed(columns, diagonals, cells, share, offset // block_size))

    return Selection(
        select=select,
        scores=Scores(mask=lambda b, h, i, j: j <= i),
        query_block=block_size,
        key_block=block_size,
    )
