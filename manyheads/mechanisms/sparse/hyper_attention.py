"""HyperAttention: queries and keys of like hash meet exactly, a few sampled keys stand for all the others.

    rank(x) = place of the signs of x . g_1 ... x . g_r in Gray's order, in which neighbours differ in one sign
    B_i = keys of the block that query i falls into, both sorted by rank;   J = m keys drawn uniformly, with replacement
    o_i = (sum_{j in B_i} e^{s_ij} v_j + n/m sum_{j in J, not in B_i} e^{s_ij} v_j) / (the same without v_j)

s = q_i . k_j / sqrt(d), over n keys; fewer than `min_len` queries, as in a step of decoding, see all of them instead.
Causal attention over more than `min_len` keys halves them: each half is causal attention again, and the second half's
queries see the first half's keys as above. The sums are unbiased, not their quotient.

The theory draws keys by the length of their values; the authors' code draws uniformly, as here. It also applies Gray's
code where it takes the inverse to put buckets beside each other that differ in one sign. `draw` says which of all draws
it is.

Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh. "HyperAttention: Long-context Attention in Near-Linear Time." 2023.
arXiv:2310.05869.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from manyheads.core import Function, Law, mechanism, merge

RUN = 256  # queries that are computed together where all keys are seen


def reference(q, k, v, *, block_size=256, samples=256, min_len=4096, projections=7, causal=True, draw=0):
    queries, n = list(range(k.shape[-2] - q.shape[-2], k.shape[-2])), k.shape[-2]
    g, out = directions(q.shape[-1], projections, draw), []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            rank_q, rank_k = ([_rank(x.double() @ g) for x in t[b, h].detach()] for t in (q, k))
            times = torch.zeros(len(queries), n, dtype=q.dtype)  # how often each key counts
            every = list(range(n))
            for asking, keys, masked in _parts(queries, every, min_len) if causal else [(queries, every, False)]:
                if masked or len(asking) < min_len:
                    for i in asking:
                        times[i - queries[0], [j for j in keys if j <= i or not masked]] = 1
                    continue
                asking = sorted(asking, key=lambda i: rank_q[i - queries[0]])
                first, keys = min(keys), sorted(keys, key=lambda j: rank_k[j])
                size = math.ceil(len(asking) / math.ceil(len(keys) / block_size))
                for place, i in enumerate(asking):
                    own = place // size
                    times[i - queries[0], keys[own * block_size : (own + 1) * block_size]] = 1
                    for drawn in sampled(q.shape[1], first, len(keys), samples, draw)[h].tolist():
                        times[i - queries[0], keys[drawn]] += (drawn // block_size != own) * len(keys) / samples
            s = q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5
            e = times * (s - s.amax(-1, keepdim=True)).exp()
            out.append(e / e.sum(-1, keepdim=True) @ v[b, h])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _rank(along):
    """Where the signs of these products stand in Gray's order: they are the bits of a number's Gray code."""
    signs = sum(2**bit for bit, x in enumerate(along.tolist()) if x > 0)
    return next(number for number in range(2 ** len(along)) if number ^ (number >> 1) == signs)


def _parts(queries, keys, min_len):
    """(queries, keys, whether later keys are masked), which together are causal attention."""
    if len(keys) <= min_len:
        return [(queries, keys, True)]
    middle = keys[len(keys) // 2]
    early, late = [i for i in queries if i < middle], [i for i in queries if i >= middle]
    first, second = [j for j in keys if j < middle], [j for j in keys if j >= middle]
    return [*_parts(early, first, min_len), *_parts(late, second, min_len), (late, first, False)]


# The draws are part of what is computed: reference and form share them.


def directions(head_dim: int, projections: int, draw: int) -> torch.Tensor:
    """Normal numbers [head_dim, projections] in float64; more channels have the same first rows."""
    generator = torch.Generator().manual_seed(draw)
    return torch.special.ndtri(torch.rand(head_dim, projections, generator=generator, dtype=torch.float64))


def sampled(heads: int, first: int, n: int, samples: int, draw: int) -> torch.Tensor:
    """Places [heads, samples] among n sorted keys, for keys that begin at position `first`."""
    generator = torch.Generator().manual_seed(hash((draw, first, n)))
    return torch.randint(n, (heads, samples), generator=generator)


@mechanism(
    reference=reference,
    arxiv="2310.05869",
    system="hyper-attention",
    examples=(
        {"block_size": 2, "samples": 3, "min_len": 2, "projections": 3},
        {"block_size": 3, "samples": 4, "min_len": 4, "projections": 2, "causal": False, "draw": 1},
    ),
    laws=(
        Law({"min_len": 10**6}, "causal"),
        Law({"block_size": 10**6, "min_len": 1}, "causal"),
        Law({"block_size": 10**6, "min_len": 1, "causal": False}, "full"),
    ),
    sees_future="queries are sorted together, so later ones move the blocks that earlier ones fall into",
    ranges={"draw": (0, 2**62)},
    at=lambda context: {"block_size": context // 16 or 1, "samples": context // 16 or 1, "min_len": context // 4 or 1},
)
def hyper_attention(
    block_size: int = 256, samples: int = 256, min_len: int = 4096, projections: int = 7, causal: bool = True,
    draw: int = 0,
) -> Function:  # fmt: skip
    """Sorted blocks of `block_size` keys and `samples` of the others; exact up to `min_len` tokens."""

    def past(q, k, v, scale, g, first):
        n, q_len = k.shape[3], q.shape[3]
        if n <= min_len:
            return exact(q, k, v, scale, masked=True)
        half, early = n // 2, max(0, q_len - (n - n // 2))
        (q_old, q_new), (k_old, k_new), (v_old, v_new) = (
            (t[..., :at, :], t[..., at:, :]) for t, at in ((q, early), (k, half), (v, half))
        )
        before = past(q_old, k_old, v_old, scale, g, first)
        late = merge(past(q_new, k_new, v_new, scale, g, first + half), all_pairs(q_new, k_old, v_old, scale, g, first))
        return tuple(torch.cat(pair, 3) for pair in zip(before, late, strict=True))

    def all_pairs(q, k, v, scale, g, first):
        """(o, lse) without a mask, for keys that begin at position `first`."""
        q_len, n = q.shape[3], k.shape[3]
        if q_len < min_len:
            return exact(q, k, v, scale, masked=False)
        order, k_order = (gray_rank(t, g).argsort(dim=-1, stable=True) for t in (q, k))
        q, k, v = (t.take_along_dim(o[..., None], 3) for t, o in ((q, order), (k, k_order), (v, k_order)))
        width = min(block_size, n)
        blocks = -(-n // width)
        size = -(-q_len // blocks)
        there = torch.arange(blocks * width, device=q.device).view(blocks, 1, width) < n
        o, lse = softmax(cut(q, blocks, size), cut(k, blocks, width), cut(v, blocks, width), scale, there)
        near = o.flatten(3, 4)[..., :q_len, :], lse.flatten(3, 4)[..., :q_len]

        drawn = sampled(q.shape[1] * q.shape[2], first, n, samples, draw).to(q.device).view(*q.shape[1:3], samples)
        elsewhere = torch.arange(q_len, device=q.device)[:, None] // size != drawn[..., None, :] // width
        k, v = (t.expand(*q.shape[:3], n, -1).take_along_dim(drawn[None, ..., None], 3) for t in (k, v))
        o, lse = softmax(q, k, v, scale, elsewhere)
        o, lse = merge(near, (o, lse + math.log(n / samples)))
        back = order.argsort(-1)
        return o.take_along_dim(back[..., None], 3), lse.take_along_dim(back, 3)

    def forward(q, k, v, *, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(wide).unflatten(1, (k.shape[1], -1))
        g = directions(q.shape[-1], projections, draw).to(q.device, wide)
        o, _ = (past if causal else all_pairs)(grouped, k[:, :, None].to(wide), v[:, :, None].to(wide), scale, g, 0)
        return o.flatten(1, 2).to(q.dtype)

    return Function(forward=forward)


def gray_rank(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Where the signs of x . g stand in Gray's order, int64 [...] of x [..., head_dim]; the last sign weighs most."""
    bits = (x.detach() @ g > 0).long().flip(-1).cumsum(-1) % 2
    return (bits << torch.arange(g.shape[1] - 1, -1, -1, device=x.device)).sum(-1)


def cut(x: torch.Tensor, blocks: int, size: int) -> torch.Tensor:
    """[..., len, dim] as [..., blocks, size, dim], with zeros at the end."""
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[-2])).unflatten(-2, (blocks, size))


def exact(q, k, v, scale, masked):
    """(o, lse) of all queries and keys, later ones masked or not, a run of queries at a time: `min_len` is large."""
    j, q_len = torch.arange(k.shape[-2], device=q.device), q.shape[-2]
    i = torch.arange(len(j) - q_len, len(j), device=q.device)[:, None]
    again = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    parts = []
    for rows, i_rows in zip(q.split(RUN, -2), i.split(RUN), strict=True):
        args = rows, k, v, scale, (j <= i_rows) | (not masked)
        parts.append(checkpoint(softmax, *args, use_reentrant=False) if again else softmax(*args))
    return torch.cat([o for o, _ in parts], 3), torch.cat([lse for _, lse in parts], 3)


def softmax(q, k, v, scale, seen):
    """(o, lse) of all queries and keys, where seen; what sees nothing gives 0 and -inf."""
    s = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    return (s - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp() @ v, lse
