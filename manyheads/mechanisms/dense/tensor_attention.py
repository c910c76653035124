"""Tensor attention: a query scores pairs of keys, and reads the product of the pair's values.

    o_i = sum_{j, m} softmax_{j, m}(sum_c q_ic k_jc k2_mc / d) (v_j * v2_m)

over all pairs, with * channel by channel: third-order attention, whose keys are a column-wise Kronecker product.

Exact, it is ordinary attention with keys k_j * k2 and values v_j * v2 for one j after the other, merged: n^3 time, but
no memory for pairs. With exp's Taylor polynomial of a degree in its place it takes time linear in n: a polynomial of a
sum over channels is a sum over products of channels, and each of these sums over j and m apart. The paper proves that
this is near enough for small entries, and that for large ones nothing is faster than n^3. Even degrees keep every
weight above 0.

Alman, Song. "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation."
2023. arXiv:2310.04064. The paper has one head.
"""

import math
from collections import Counter
from functools import partial, reduce
from itertools import combinations_with_replacement

import torch
from torch.utils.checkpoint import checkpoint

from manyheads.core import Function, Operand, mechanism, merge
from manyheads.core.maps import read, score_map


def reference(q, k, v, *, k2, v2, degree=0):
    n, d, out = k.shape[-2], q.shape[-1], []
    for i in range(q.shape[-2]):
        s, values = [], []
        for j in range(n):
            products = (q[..., i, c, None] * k[..., j, c, None] * k2[..., c] for c in range(k2.shape[-1]))
            s.append(sum(products) / d)
            values.append(v[..., j, None, :] * v2)
        s = torch.cat(s, -1)
        w = torch.softmax(s, -1)
        if degree:
            w = torch.stack([s**power / math.factorial(power) for power in range(degree + 1)]).sum(0)
            w = w / w.sum(-1, keepdim=True)
        out.append(w[..., None, :] @ torch.cat(values, -2))
    return torch.cat(out, -2)


def inverse(head_dim):
    return 1 / head_dim


def one_more(x):
    return 1 + x


@mechanism(
    reference=reference,
    arxiv="2310.04064",
    system="tensor-attention-kronecker",
    examples=({}, {"degree": 2}),
    causal=False,
    trained=True,
    ranges={"degree": (0, math.inf)},
    tolerance=2.0,
    tolerance_reason="the polynomial sums over keys before it multiplies by queries: larger numbers, that cancel",
)
def tensor_attention(degree: int = 0) -> Function:
    """`degree` of the polynomial, or 0 for exp itself."""

    def forward(q, k, v, *, scale, k2, v2):
        wide = torch.promote_types(q.dtype, torch.float32)
        compute = partial(by_monomials, degree=degree) if degree else by_pairs
        return compute(*(t.to(wide) for t in (q, k, v, k2, v2)), scale=scale).to(q.dtype)

    dims = "batch kv_heads len"
    # A layer's projections start at 0: with one more than them, pairs start as the first of their two.
    operands = {"k2": Operand(f"{dims} head_dim", one_more), "v2": Operand(f"{dims} v_head_dim", one_more)}
    return Function(forward=forward, operands=operands, default_scale=inverse)


def by_pairs(q, k, v, k2, v2, scale):
    run = partial(checkpoint, of_one, use_reentrant=False) if torch.is_grad_enabled() else of_one
    return reduce(merge, (run(q, k[:, :, j, None], v[:, :, j, None], k2, v2, scale) for j in range(k.shape[2])))[0]


def of_one(q, k, v, k2, v2, scale):
    """(o, lse) over the pairs of one first key."""
    s = score_map(q, k * k2, scale)
    lse = s.logsumexp(-1)
    return read((s - lse[..., None]).exp(), v * v2), lse


def by_monomials(q, k, v, k2, v2, scale, degree):
    """x^p / p! is a sum over the products of p channels, each over the factorials of how often it has a channel."""
    channels = [list(combinations_with_replacement(range(q.shape[-1]), power)) for power in range(degree + 1)]
    indices = [torch.tensor(c, dtype=torch.long, device=q.device) for c in channels]
    asked, first, second = (torch.cat([t[..., c].prod(-1) for c in indices], -1) for t in (scale * q, k, k2))
    orders = [math.prod(math.factorial(n) for n in Counter(c).values()) for power in channels for c in power]
    asked = asked / torch.tensor(orders, dtype=q.dtype, device=q.device)
    sums, total = (first.mT @ v) * (second.mT @ v2), first.sum(2) * second.sum(2)
    return read(asked, sums) / read(asked, total[..., None])
