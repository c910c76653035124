"""TCA-Attention: a block of keys keeps few where one or two stand out, more where many matter, and each head its share.

    s = softmax_j(q_last . k_j / sqrt(d)),   h_n = sum_{j in block n} (s_j / sum of s in block n)^2
    p_k = Phi(log2 k) / sum_k Phi(log2 k),   Phi(x) = exp(-(x - mu)^2 / 2 sigma^2),   k in {1, 2, 4, ..., block_size}

The blocks are sorted by h_n, the most concentrated first. The first p_1 of them keep 1 key each, the next p_2 keep 2,
and so on: those with the greatest s. All queries see, up to themselves, the keys that stay and a local window: here the
stretch of `window` keys that they stand in and the one before. Of mu = 0, 1, ..., log2(block_size) a head takes the
least with which the keys that stay hold `tau` of s, and keeps all keys if none does. The paper makes that choice once
for each head, on a text for calibration; here it is made on the input. The defaults are not the paper's, which were not
at hand.

You, Chen, Zhang, Qiu, Wu, Li, Wang, Tan. "Training-free Context-adaptive Attention for Efficient Long Context
Modeling." 2025. arXiv:2512.09238.
"""

import math

import torch
import torch.nn.functional as F

from manyheads.core import Blocks, Law, Scores, Selection, mechanism
from manyheads.core.choosing import products


def reference(q, k, v, *, tau=0.9, block_size=64, window=512, sigma=1.0):
    out, n = [], k.shape[-2]
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        s = (k_h @ q_h[-1] / q.shape[-1] ** 0.5).softmax(-1).tolist()
        kept, mu = set(), 0
        while tau < 1 and mu <= math.log2(block_size):
            kept = _kept(s, mu, sigma, block_size)
            if sum(s[j] for j in kept) >= tau:
                break
            mu += 1
        else:
            kept = set(range(n))
        for i, q_i in enumerate(q_h, n - len(q_h)):
            seen = [j for j in range(i + 1) if j in kept or j // window >= i // window - 1]
            out.append((k_h[seen] @ q_i / q.shape[-1] ** 0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _kept(s, mu, sigma, size):
    """The keys that stay in their blocks."""
    sizes = [2**e for e in range(int(math.log2(size)) + 1)]
    phi = [math.exp(-((math.log2(k) - mu) ** 2) / (2 * sigma**2)) for k in sizes]
    blocks = [range(start, min(start + size, len(s))) for start in range(0, len(s), size)]
    spread = [sum(s[j] ** 2 for j in block) / sum(s[j] for j in block) ** 2 for block in blocks]
    kept = set()
    for rank, block in enumerate(sorted(range(len(blocks)), key=lambda n: -spread[n])):
        ends = [round(len(blocks) * sum(phi[: e + 1]) / sum(phi)) for e in range(len(sizes))]
        count = next(k for k, end in zip(sizes, ends, strict=True) if rank < end)
        kept |= set(sorted(blocks[block], key=lambda j: -s[j])[:count])
    return kept


@mechanism(
    reference=reference,
    arxiv="2512.09238",
    system="tca-attention",
    examples=(
        {"tau": 0.5, "block_size": 4, "window": 2},
        {"tau": 0.8, "block_size": 4, "window": 6, "sigma": 0.5},
        {"tau": 0.3, "block_size": 2, "window": 1, "sigma": 2.0},
    ),
    laws=(
        Law({"tau": 1.0, "block_size": 4}, "causal"),
        Law({"tau": 0.1, "block_size": 1, "window": 1}, "causal"),
        Law({"tau": 0.1, "block_size": 4, "window": 10**6}, "causal"),
    ),
    sees_future="the last query says which keys stay for all queries",
    at=lambda context: {
        "tau": 0.8,
        "block_size": 2 ** max(2, (context // 32).bit_length() - 1),
        "window": context // 16,
    },
    ranges={"tau": (0, 1), "sigma": (1e-3, math.inf)},
)
def tca_attention(tau: float = 0.9, block_size: int = 64, window: int = 512, sigma: float = 1.0) -> Selection:
    """Keys that hold `tau` of the last query's attention, some of each block of `block_size` (a power of 2), and at
    least the last `window`."""
    if block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of 2, not {block_size}")

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        n, wide = k.shape[-2], torch.promote_types(q.dtype, torch.float32)
        likes = (products(q[..., -1:, :].to(wide), k.to(wide)) * scale).sum(-2)
        kept = _stay(likes, tau, block_size, sigma)
        j = torch.arange(n, device=q.device)
        m = torch.arange(offset // window, -(-n // window), device=q.device)[:, None]
        return Blocks.from_map((j // window <= m) & (kept[..., None, :] | (j // window >= m - 1)))

    return Selection(select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=window, key_block=1)


def _stay(likes, tau, size, sigma):
    """bool [..., n]: the keys that stay, of the last query's scores [..., n]."""
    blocks = F.pad(likes, (0, -likes.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size))
    s = blocks.flatten(-2).softmax(-1).view_as(blocks)
    order = blocks.softmax(-1).square().sum(-1).argsort(dim=-1, descending=True, stable=True)
    place, rank = order.argsort(-1), blocks.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    kept, done = torch.ones_like(s, dtype=torch.bool), torch.full_like(s[..., :1, :1], tau >= 1, dtype=torch.bool)
    for mu in range(size.bit_length()):
        ends = _ends(blocks.shape[-2], mu, sigma, size)
        count = 2 ** torch.stack([place >= end for end in ends]).sum(0)
        stay = rank < count[..., None]
        enough = (s * stay).sum((-2, -1), keepdim=True) >= tau
        kept, done = torch.where(enough & ~done, stay, kept), done | enough
    return kept.flatten(-2)[..., : likes.shape[-1]]


def _ends(blocks, mu, sigma, size):
    """How many blocks, the most concentrated ones first, keep 1 key, 2 at most, 4 at most, ..., `size` at most."""
    phi = [math.exp(-((e - mu) ** 2) / (2 * sigma**2)) for e in range(size.bit_length())]
    return [round(blocks * sum(phi[: e + 1]) / sum(phi)) for e in range(len(phi))]
