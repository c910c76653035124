"""Combiner: full attention whose weights are products, of a span of keys and of a key within its span.

    p(j|i) = w_i(j) for j in D_i, the keys that i sees directly,   p(j|i) = sum_{spans S of i, j in S} w_i(S) r_S(j)
    w_i = softmax over D_i and the spans of q_i . k_j / sqrt(d) and q_i . k_S / sqrt(d)
    r_S = softmax_{j in S}(q_S . k_j / sqrt(d)),   q_S = max_{i in S} q_i,   k_S = max_{j in S} k_j, channel by channel
    o_i = sum_j p(j|i) v_j

so each earlier key has some weight. Patterns, with blocks, or rows of an image, of `block_size` tokens:
"fixed": D_i is i's block, up to i; spans are the earlier blocks.
"log": D_i = {i}; spans are the blocks of 1, 2, 4, 8, ... keys that the binary digits of i cut [0, i) into.
"axial": D_i is i's row up to i, and its column above; spans are the other columns above i's row, and what is left and
right of i's column in each row above: every other key is in two spans.

Queries before the first given one count as zeros, so a decoding step passes all of them. The axial pattern is the
paper's mixture; its third, axial-rowmajor, has projections of its own. Not causal forms are left out.

Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai. "Combiner: Full Attention Transformer with Sparse Computation Cost."
2021. arXiv:2107.05768.
"""

from functools import reduce

import torch
import torch.nn.functional as F

from manyheads.core import Function, Law, mechanism
from manyheads.core.names import unknown


def reference(q, k, v, *, pattern="fixed", block_size=64):
    n, out = k.shape[-2], []
    full_q = F.pad(q, (0, 0, n - q.shape[-2], 0))
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (full_q, k, v)), strict=True):
        for i in range(n - q.shape[-2], n):
            direct, spans = _cover(pattern, i, block_size)
            keys = [*k_h[direct], *(k_h[span].amax(0) for span in spans)]
            inside = [torch.softmax(k_h[span] @ q_h[span].amax(0) / q.shape[-1] ** 0.5, 0) for span in spans]
            values = [*v_h[direct], *(r @ v_h[span] for r, span in zip(inside, spans, strict=True))]
            out.append(torch.softmax(torch.stack(keys) @ q_h[i] / q.shape[-1] ** 0.5, 0) @ torch.stack(values))
    return torch.stack(out).view(*q.shape[:-1], -1)


def _cover(pattern, i, size):
    """The keys that i sees directly, and its spans."""
    row, column = divmod(i, size)
    if pattern == "fixed":
        return [*range(row * size, i + 1)], [[*range(m * size, m * size + size)] for m in range(row)]
    if pattern == "log":
        starts = {2**bit: i >> bit + 1 << bit + 1 for bit in range(20) if i >> bit & 1}
        return [i], [[*range(start, start + length)] for length, start in starts.items()]
    above = [[*range(r * size, r * size + size)] for r in range(row)]
    others = [list(span) for c, span in enumerate(zip(*above, strict=True)) if c != column]
    sides = [span for r in above for span in (r[:column], r[column + 1 :]) if span]
    return [*(r[column] for r in above), *range(row * size, i + 1)], others + sides


@mechanism(
    reference=reference,
    arxiv="2107.05768",
    system="combiner",
    examples=(
        {"pattern": "fixed", "block_size": 4},
        {"pattern": "log"},
        {"pattern": "axial", "block_size": 3},
        {"pattern": "axial", "block_size": 4},
    ),
    laws=tuple(
        Law({"pattern": pattern, "block_size": size}, "causal") for pattern in ("fixed", "axial") for size in (1, 10**6)
    ),
    trained=True,
)
def combiner(pattern: str = "fixed", block_size: int = 64) -> Function:
    """Blocks, or rows, of `block_size` tokens; the default is the root of a length of 4096."""
    if pattern not in PATTERNS:
        raise ValueError(unknown("pattern of combiner", pattern, PATTERNS))

    def forward(q, k, v, *, scale):
        n, q_len, wide = k.shape[2], q.shape[2], torch.promote_types(q.dtype, torch.float32)
        size = 1 << (n - 1).bit_length() if pattern == "log" else min(block_size, n)
        end = -n % size
        grouped = F.pad(q.to(wide).unflatten(1, (k.shape[1], -1)), (0, 0, n - q_len, end))
        k, v = (F.pad(t[:, :, None].to(wide), (0, 0, 0, end)) for t in (k, v))
        o = PATTERNS[pattern](grouped * scale, k, v, size)[..., :n, :]
        return F.pad(o, (0, 0, q_len - n, 0)).flatten(1, 2).to(q.dtype)

    return Function(forward=forward, query_context=10**9)


def joint(*parts):
    """Sum of read(weights) over parts (scores [..., len, m], read), the weights from one softmax over all scores."""
    scores = torch.cat([s for s, _ in parts], -1).softmax(-1)
    weights = scores.split([s.shape[-1] for s, _ in parts], -1)
    return reduce(torch.add, (read(w) for w, (_, read) in zip(weights, parts, strict=True)))


def below(n, x, diagonal=0):
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril(diagonal)


def summaries(q, k, v):
    """(k_S, sum_j r_S(j) v_j) of spans S: [..., dim] of [..., members, dim]."""
    inside = (k @ q.amax(-2)[..., None]).squeeze(-1).softmax(-1)
    return k.amax(-2), (inside[..., None, :] @ v).squeeze(-2)


def fixed(q, k, v, size):
    blocks = q.shape[-2] // size
    q_b, k_b, v_b = (t.unflatten(-2, (blocks, size)) for t in (q, k, v))
    own = (q_b @ k_b.mT).masked_fill(~below(size, q), -torch.inf).flatten(-3, -2)
    span_k, span_v = summaries(q_b, k_b, v_b)
    earlier = below(blocks, q, -1).repeat_interleave(size, 0)
    past = (q @ span_k.mT).masked_fill(~earlier, -torch.inf)
    return joint((own, lambda w: (w.unflatten(-2, (blocks, size)) @ v_b).flatten(-3, -2)), (past, lambda w: w @ span_v))


def log(q, k, v, size):
    i = torch.arange(size, device=q.device)
    parts = [((q * k).sum(-1, keepdim=True), lambda w: w * v)]
    for bit in range(size.bit_length() - 1):
        span_k, span_v = summaries(*(t.unflatten(-2, (-1, 1 << bit)) for t in (q, k, v)))
        before = ((i >> bit) - 1).clamp(min=0)
        s = (q * span_k[..., before, :]).sum(-1, keepdim=True)
        s = s.masked_fill((i >> bit & 1 == 0)[:, None], -torch.inf)
        parts.append((s, lambda w, span_v=span_v, before=before: w * span_v[..., before, :]))
    return joint(*parts)


def axial(q, k, v, size):
    q, k, v = (t.unflatten(-2, (-1, size)) for t in (q, k, v))  # [..., rows, columns, dim]
    rows = q.shape[-3]
    columns = [t.transpose(-3, -2) for t in (q, k, v)]

    def direct(q, kv, seen):
        k, v = kv
        return (q @ k.mT).masked_fill(~seen, -torch.inf), lambda w: w @ v

    def prefixes(q, k, v):
        """Summaries of all tokens before each one along the next to last dimension; the first has none."""
        n = q.shape[-2]
        r = (q.cummax(-2).values @ k.mT).masked_fill(~below(n, q), -torch.inf).softmax(-1) @ v
        return tuple(F.pad(t, (0, 0, 1, -1)) for t in (k.cummax(-2).values, r))

    def from_columns(part):
        s, read = part
        return s.transpose(-3, -2), lambda w: read(w.transpose(-3, -2)).transpose(-3, -2)

    above = below(rows, q, -1)
    first, last = (torch.arange(size, device=q.device)[:, None, None] == c for c in (0, size - 1))
    up = [t.transpose(-3, -2) for t in prefixes(*columns)]
    left = [t.transpose(-3, -2) for t in prefixes(q, k, v)]
    right = [t.flip(-2).transpose(-3, -2) for t in prefixes(*(t.flip(-2) for t in (q, k, v)))]
    below_first = torch.arange(rows, device=q.device)[:, None, None] > 0
    elsewhere = below_first & ~torch.eye(size, dtype=torch.bool, device=q.device)
    return joint(
        direct(q, (k, v), below(size, q)),
        direct(q, up, elsewhere),
        from_columns(direct(columns[0], columns[1:], above)),
        from_columns(direct(columns[0], left, above & ~first)),
        from_columns(direct(columns[0], right, above & ~last)),
    ).flatten(-3, -2)


PATTERNS = {"fixed": fixed, "log": log, "axial": axial}
