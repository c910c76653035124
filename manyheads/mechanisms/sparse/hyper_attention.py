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

from manyheads.core import Function, Law, mechanism
from manyheads.core.builders import attended, from_blocks, hashed, in_order, to_blocks
from manyheads.core.merge import merge_into


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

    def hashed_pairs(q, k, v, rank_q, rank_k, scale, firsts):
        """(o, lse) of the own blocks of all queries, and of drawn keys; those of batch row b begin at firsts[b]."""
        (_, heads, q_len, _), n, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
        of_q, of_k = (in_order(rank, 2**projections) for rank in (rank_q, rank_k))
        width = min(block_size, n)
        blocks = -(-n // width)
        size = -(-q_len // blocks)
        at, k_at = (*of_q, blocks, size, group), (*of_k, blocks, width, 1)
        o, lse = met(to_blocks(q, *at), to_blocks(k, *k_at), to_blocks(v, *k_at), blocks, blocks * width - n, scale)
        near = from_blocks(o, *at), from_blocks(lse[..., None], *at)[..., 0]

        drawn = torch.stack([sampled(heads, first, n, samples, draw) for first in firsts]).to(q.device)
        token = of_k[0].long().gather(2, drawn.view(len(k), k.shape[1], -1))[..., None]
        k, v = (t.take_along_dim(token, 2).view(len(k), heads, samples, -1) for t in (k, v))
        o, lse = attended(q, k, v, scale, False, of_q[1] // size, (drawn // width).int())
        return near, (o, lse + math.log(n / samples))

    def forward(q, k, v, *, scale):
        queries = range(k.shape[2] - q.shape[2], k.shape[2])
        found = attentions(q, k, v, queries, scale)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):  # which hold all of them until the end
            return weighed([[unstacked(x, at, queries, none) for x, none in both] for at, *both in found]).to(q.dtype)
        lse = torch.full(q.shape[:3], -math.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        total = lse.new_zeros(*lse.shape, v.shape[3])
        for ranges, *both in found:
            for at, *part in zip(ranges, *(x.chunk(len(ranges)) for x, _ in both), strict=True):
                rows = slice(at.start - queries.start, at.stop - queries.start)
                merge_into(total[:, :, rows], lse[:, :, rows], *part)
        return total.to(q.dtype)

    def attentions(q, k, v, queries, scale):
        """Ranges of queries, and o and lse of some keys for them, one range after the other in the batch, each with
        what stands for no keys."""
        keys = range(k.shape[2])
        g = directions(q.shape[-1], projections, draw).to(q.device, torch.promote_types(q.dtype, torch.float32))
        rank_q, rank_k = hashed(q, k, g)
        parts = list(halves(queries, keys, min_len)) if causal else [(queries, keys, False)]
        for group in alike(parts):
            i, j, _ = zip(*group, strict=True)
            of_q, of_k, (length, n, masked) = (i, queries), (j, keys), size_of(group[0])
            cut = stacked(q, *of_q), stacked(k, *of_k), stacked(v, *of_k)
            if n <= min_len if masked else length < min_len:
                made = [attended(*cut, scale, masked, None, None)]
            else:
                ranks = stacked(rank_q, *of_q), stacked(rank_k, *of_k)
                made = hashed_pairs(*cut, *ranks, scale, [part.start for part in j for _ in q])
            yield from ((i, (o, 0.0), (lse, -math.inf)) for o, lse in made)

    return Function(forward=forward)


def weighed(found):
    """o of all keys, of (o, lse) of disjoint sets of them."""
    weights = torch.stack([lse for _, lse in found]).softmax(0)[..., None]
    total = found[0][0] * weights[0]
    for (o, _), weight in zip(found[1:], weights[1:], strict=True):
        total = torch.addcmul(total, o, weight)
    return total


def halves(queries, keys, min_len):
    """(queries, keys, whether later keys are masked), ranges of positions, which together are causal attention."""
    if len(keys) <= min_len:
        yield queries, keys, True
        return
    middle = keys[len(keys) // 2]
    split = max(queries.start, min(middle, queries.stop))
    early, late = range(queries.start, split), range(split, queries.stop)
    if early:
        yield from halves(early, range(keys.start, middle), min_len)
    if late:
        yield from halves(late, range(middle, keys.stop), min_len)
        yield late, range(keys.start, middle), False


def alike(parts):
    """Parts of one size together, as far as they have queries of their own."""
    groups = []
    for part in parts:
        fitting = (g for g in groups if size_of(g[-1]) == size_of(part) and g[-1][0].stop <= part[0].start)
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(part)
    return groups


def size_of(part):
    queries, keys, masked = part
    return len(queries), len(keys), masked


def stacked(x, ranges, all):
    """These tokens of x [batch, heads, len, ...], as batch rows one after the other."""
    parts = [x[:, :, at.start - all.start : at.stop - all.start] for at in ranges]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unstacked(x, ranges, all, fill):
    """Back where they stand, with `fill` for the others."""
    parts, end = [], all.start
    for part, at in zip((*x.chunk(len(ranges)), None), (*ranges, range(all.stop, all.stop)), strict=True):
        if at.start > end:
            parts.append(x.new_full((len(x) // len(ranges), x.shape[1], at.start - end, *x.shape[3:]), fill))
        parts, end = [*parts, part], at.stop
    *parts, _ = parts
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def met(q, k, v, blocks, lacks, scale):
    """(o, lse) of queries and keys block by block, as `to_blocks` has them; the last block of keys lacks so many."""
    if not lacks:
        return attended(q, k, v, scale, False, None, None)
    group = q.shape[1] // k.shape[1]
    q, k, v = q.unflatten(1, (-1, blocks, group)), k.unflatten(1, (-1, blocks)), v.unflatten(1, (-1, blocks))
    whole = q[:, :, :-1].flatten(1, 3), k[:, :, :-1].flatten(1, 2), v[:, :, :-1].flatten(1, 2)
    last = q[:, :, -1].flatten(1, 2), k[:, :, -1, :-lacks], v[:, :, -1, :-lacks]
    whole, last = (attended(*part, scale, False, None, None) for part in (whole, last))
    both = ([t.unflatten(1, (k.shape[1], -1, group)) for t in pair] for pair in zip(whole, last, strict=True))
    return tuple(torch.cat(pair, 2).flatten(1, 3) for pair in both)
