"""SALE: products of 4-bit queries and keys say which blocks hold a weight that counts beside the sink and the window.

    k'_j = k_j - mean(k),   s'_ij = (4bit(q_i - mean(q)) . 4bit(k'_j) + mean(q) . k'_j) / sqrt(d)
    4bit(x) = round(x / c) c,   c = max |x| / 7 for each token
    A_i = {j <= i: among the first `sink` keys, or the last `local` keys of i's block of queries}
    key block n stays for query block m if, for an i in m and a j in n,
        exp(s'_ij) > tau sum_{a in A_i} exp(q_i . k'_a / sqrt(d))

and o_i is softmax attention over the keys j <= i of the blocks that stay or hold a key of A. Prompts of up to
`dense_len` queries are dense, and so are decoding steps. The authors calibrate tau for each head: from 0.008 on they
halve it until the outputs for a text change by less than 1 a query, and take 0, dense, below 0.0001. Here all heads
have one.

Ji, Zhang, Fu, Cui. "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling." 2025.
arXiv:2505.24179.
"""

import math

import torch

from manyheads.core import Law, Scores, Selection, mechanism
from manyheads.core.choosing import by_four_bits


def reference(q, k, v, *, tau=0.004, query_block=64, key_block=32, sink=32, local=128, dense_len=1024):
    out, d = [], q.shape[-1]
    for q_h, k_h, v_h in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        offset, smooth = len(k_h) - len(q_h), k_h - k_h.mean(0)
        middle, rough = q_h.mean(0), torch.stack([_rounded(x) for x in smooth])
        kept = {}
        for i, q_i in enumerate(q_h, offset):
            m, near = i // query_block, i // query_block * query_block + query_block - max(local, query_block)
            own = kept.setdefault(m, set())
            beside = [
                j for j in range(i + 1) if j // key_block * key_block < sink or j // key_block >= near // key_block
            ]
            own |= {j // key_block for j in beside}
            total = (smooth[beside] @ q_i / d**0.5).exp().sum()
            estimate = ((rough @ _rounded(q_i - middle) + smooth @ middle) / d**0.5)[: i + 1].exp()
            own |= {j // key_block for j in (estimate > tau * total).nonzero().flatten().tolist()}
            if len(q_h) <= dense_len:
                own |= set(range(i // key_block + 1))
        for i, q_i in enumerate(q_h, offset):
            seen = [j for j in range(i + 1) if j // key_block in kept[i // query_block]]
            out.append((k_h[seen] @ q_i / d**0.5).softmax(-1) @ v_h[seen])
    return torch.stack(out).view(*q.shape[:-1], -1)


def _rounded(x):
    step = x.abs().max() / 7
    return torch.round(x / step) * step if step > 0 else x


def at(context):
    sizes = {"query_block": max(1, context // 64), "key_block": max(1, context // 128), "sink": context // 128}
    return {**sizes, "tau": 0.06, "local": context // 8, "dense_len": 1}


SMALL = {"query_block": 4, "key_block": 2, "sink": 2, "local": 4, "dense_len": 0}


@mechanism(
    reference=reference,
    arxiv="2505.24179",
    system="sale",
    examples=(
        {**SMALL, "tau": 0.5},
        {**SMALL, "tau": 0.3, "query_block": 3, "key_block": 4, "sink": 0, "local": 5},
        {**SMALL, "tau": 0.9, "key_block": 1, "local": 6, "dense_len": 1},
    ),
    laws=(
        Law({**SMALL, "tau": 0.0}, "causal"),
        Law({**SMALL, "tau": 9.0, "local": 10**6}, "causal"),
        Law({"tau": 9.0}, "causal"),
    ),
    sees_future="a block of queries chooses together, and all queries and keys enter the means",
    at=at,
    ranges={"sink": (0, math.inf), "dense_len": (0, math.inf)},
)
def sale(
    tau: float = 0.004, query_block: int = 64, key_block: int = 32, sink: int = 32, local: int = 128,
    dense_len: int = 1024,
) -> Selection:  # fmt: skip
    """Key blocks with a weight of `tau` or more, relative to the first `sink` keys and the last `local` ones."""
    near = max(local, query_block)

    @torch.no_grad()
    def select(q, k, *, scale, offset):
        least = math.log(tau) if tau and q.shape[-2] > dense_len else -math.inf
        return by_four_bits(
            q, k, least, scale=scale, sink=sink, near=near, query_block=query_block, key_block=key_block, offset=offset
        )

    return Selection(
        select=select, scores=Scores(mask=lambda b, h, i, j: j <= i), query_block=query_block, key_block=key_block
    )
