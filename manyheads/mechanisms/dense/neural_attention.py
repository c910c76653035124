"""Neural attention: a small network scores each pair of a query and a key, in place of their inner product.

    q' = w_q q + b_q,   k' = w_k k + b_k
    s_ij = w_3 . relu(w_2 relu(w_1 [q'_i; k'_j] + b_1) + b_2),   o_i = sum_{j <= i} softmax_j(s_ij) v_j

with q' and k' of p channels, hidden layers of p and p / 2, and one network for all heads of a layer. Nothing divides by
sqrt(d). The last layer's bias is left out, as softmax does not see it. w_1 [q'; k'] is a sum of a query's part and a
key's; only what follows is computed for pairs, for a few queries at a time.

DiGiugno, Mahmood. "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models." 2025.
arXiv:2502.17206.
"""

import torch
from torch.utils.checkpoint import checkpoint

from manyheads.core import Function, Operand, as_linear, mechanism, one
from manyheads.core.maps import read, softmax_of_past

PAIRS = 2**20  # pairs of query and key at a time, each with p numbers


def reference(q, k, v, *, w_q, b_q, w_k, b_k, w_1, b_1, w_2, b_2, w_3, width=2):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        s = []
        for j in range(offset + i + 1):
            a, b = q[..., i, :] @ w_q.T + b_q, k[..., j, :] @ w_k.T + b_k
            hidden = torch.relu(torch.cat([a, b], -1) @ w_1.T + b_1)
            s.append(torch.relu(hidden @ w_2.T + b_2) @ w_3)
        out.append(torch.softmax(torch.stack(s, -1), -1)[..., None, :] @ v[..., : offset + i + 1, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2502.17206",
    system="neural-attention",
    examples=({}, {"width": 5}),
    trained=True,
    ranges={"width": (2, float("inf"))},
    tolerance=4.0,
    tolerance_reason="the network's gradients are sums over all pairs that nearly cancel; their rounding does not",
)
def neural_attention(width: int = 2) -> Function:
    """`width` is p; the authors' code has head_dim // 32 channels."""
    half = width // 2

    def forward(q, k, v, *, scale, w_q, b_q, w_k, b_k, w_1, b_1, w_2, b_2, w_3):
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = [w.to(wide) for w in (w_2, b_2, w_3)]
        of_query, of_key = w_1.to(wide).split(width, -1)
        asked = (q.to(wide) @ w_q.to(wide).mT + b_q.to(wide)) @ of_query.mT + b_1.to(wide)
        offered = (k.to(wide) @ w_k.to(wide).mT + b_k.to(wide)) @ of_key.mT
        offered = offered.repeat_interleave(q.shape[1] // k.shape[1], 1)
        size = max(1, PAIRS // max(1, offered[..., 0].numel()))
        s = [checkpoint(pairs, rows, offered, *weights, use_reentrant=False) for rows in asked.split(size, 2)]
        return read(softmax_of_past(scale * torch.cat(s, 2)), v)

    return Function(
        forward=forward,
        operands={
            "w_q": Operand(f"{width} head_dim", init=as_linear), "b_q": Operand(f"{width}", init=as_linear),
            "w_k": Operand(f"{width} head_dim", init=as_linear), "b_k": Operand(f"{width}", init=as_linear),
            "w_1": Operand(f"{width} {2 * width}", init=as_linear), "b_1": Operand(f"{width}", init=as_linear),
            "w_2": Operand(f"{half} {width}", init=as_linear), "b_2": Operand(f"{half}", init=as_linear),
            "w_3": Operand(f"{half}", init=as_linear),
        },
        default_scale=one,
    )  # fmt: skip


def pairs(asked, offered, w_2, b_2, w_3):
    """Scores [batch, heads, rows, kv_len] of asked [batch, heads, rows, p] and offered [batch, heads, kv_len, p]."""
    hidden = torch.relu(asked[:, :, :, None] + offered[:, :, None])
    return torch.relu(hidden @ w_2.mT + b_2) @ w_3
