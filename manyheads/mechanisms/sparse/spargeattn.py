"""SpargeAttn: blocks of similar tokens are judged by their means, and blocks of dissimilar ones are never left out.

    q_m, k_n: means of query block m and key block n;   s(X) = mean of cos(x, y) over the pairs x, y in a block X
    p_mn = softmax_n(q_m . k_n / sqrt(d)) over the past key blocks with s(K_n) >= theta
    M_mn = 1 for the fewest n whose p_mn reach tau, for all n if s(Q_m) < theta, for all m if s(K_n) < theta

and o_i is softmax attention over the keys j <= i of the blocks with M_mn = 1. Blocks that query block m itself overlaps
are kept as well, so that no query is without a key. The paper's code leaves out the block with which p_mn reaches tau.
Its second stage, which skips values whose weights are below exp(lambda) of the greatest, and its int8 products are left
to engines: with the code's lambda of -50 float32 knows no such weights. tau and theta are tuned for each head there.

Zhang, Xiang, Huang, Wei, Xi, Zhu, Chen. "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference." 2025.
arXiv:2502.18137.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import block_means, fewest, products


def reference(q, k, v, *, tau=0.9, theta=0.1, query_block=128, key_block=64, causal=True):
    out = []
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        offset, cells = len(k_h) - len(q_h), {}
        for i, q_i in enumerate(q_h, offset):
            m, seen = i // query_block, range(i + 1 if causal else len(k_h))
            if m not in cells:
                rows = q_h[max(0, m * query_block - offset) : (m + 1) * query_block - offset]
                end = min(m * query_block + query_block, len(k_h)) if causal else len(k_h)
                blocks = [k_h[n : n + key_block] for n in range(0, end, key_block)]
                cells[m] = _kept(rows, blocks, tau, theta)
                cells[m] |= set(range(m * query_block // key_block, ((m + 1) * query_block - 1) // key_block + 1))
            seen = [j for j in seen if j // key_block in cells[m]]
            out.append((k_h[seen] @ q_i / q.shape[-1] ** 0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _kept(rows, blocks, tau, theta):
    """The numbers of the key blocks that a block of queries computes."""
    alike = [n for n, block in enumerate(blocks) if _similarity(block) >= theta]
    if tau >= 1 or _similarity(rows) < theta:
        return set(range(len(blocks)))
    kept, total = set(range(len(blocks))) - set(alike), 0.0
    if alike:
        means = torch.stack([blocks[n].mean(0) for n in alike])
        mass = (means @ rows.mean(0) / rows.shape[-1] ** 0.5).softmax(-1).tolist()
        for p, n in sorted(zip(mass, alike, strict=True), key=lambda pair: -pair[0]):
            if total < tau:
                kept.add(n)
            total += p
    return kept


def _similarity(block):
    return sum(F.cosine_similarity(x, y, dim=0).item() for x in block for y in block) / len(block) ** 2


@mechanism(
    reference=reference,
    arxiv="2502.18137",
    system="spargeattn",
    examples=(
        {"tau": 0.5, "theta": 0.0, "query_block": 4, "key_block": 2},
        {"tau": 0.4, "theta": 0.3, "query_block": 2, "key_block": 2},
        {"tau": 0.6, "theta": 0.1, "query_block": 3, "key_block": 4, "causal": False},
    ),
    laws=(
        Law({"tau": 1.0, "query_block": 4, "key_block": 2}, "causal"),
        Law({"tau": 0.1, "theta": 1.1, "query_block": 4, "key_block": 2}, "causal"),
        Law({"tau": 1.0, "query_block": 4, "key_block": 2, "causal": False}, "full"),
    ),
    sees_future="the mean of a block of queries chooses for its first ones, from means of blocks that they see in part",
    at=lambda context: {"tau": 0.5, "theta": 0.0, "query_block": context // 16, "key_block": context // 32},
    ranges={"tau": (0, 1)},
)
def spargeattn(
    tau: float = 0.9, theta: float = 0.1, query_block: int = 128, key_block: int = 64, causal: bool = True
) -> Selection:
    """Key blocks that hold `tau` of the estimated mass; blocks whose mean similarity is below `theta` are all kept."""

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        wide = torch.promote_types(q.dtype, torch.float32)
        start = offset % query_block
        q_means, k_means = block_means(q.to(wide), query_block, start), block_means(k.to(wide), key_block)
        q_alike, k_alike = _alike(q.to(wide), query_block, theta, start), _alike(k.to(wide), key_block, theta)
        k_alike = k_alike.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]

        m = torch.arange(q_means.shape[-2], device=q.device)[:, None] + offset // query_block
        n = torch.arange(k_means.shape[-2], device=q.device)
        past = n * key_block < (m + 1) * query_block
        own = past & ((n + 1) * key_block > m * query_block)
        judged = k_alike & past if causal else k_alike
        s = (products(q_means, k_means) * scale).masked_fill(~judged, torch.finfo(wide).min)
        keep = fewest(s.softmax(-1).masked_fill(~judged, 0.0), tau) | ~q_alike[..., None] | ~k_alike | own
        return Blocks.from_map(keep & past if causal else keep)

    mask = (lambda b, h, i, j: j <= i) if causal else None
    return Selection(select=select, scores=Scores(mask=mask), query_block=query_block, key_block=key_block)


def _alike(x, size, theta, start=0):
    """bool [..., blocks]: whether the tokens of a block have a mean cosine of theta: the squared mean of directions."""
    return block_means(F.normalize(x, dim=-1), size, start).square().sum(-1) >= theta
