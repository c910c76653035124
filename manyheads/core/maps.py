"""Attention maps held whole, for forms that change a map after its softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(q: Tensor, k: Tensor, scale: float, *, causal: bool = False) -> Tensor:
    """softmax(scale q k^T) [batch, heads, q_len, kv_len] in float32 or wider; kv_heads may be fewer than heads.

    Queries are the last q_len positions. A query that sees no key has a row of zeros.
    """
    s = score_map(q, k, scale)
    return softmax_of_past(s) if causal else s.softmax(-1)


def score_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T [batch, heads, q_len, kv_len] in float32 or wider; kv_heads may be fewer than heads."""
    batch, heads, q_len, _ = q.shape
    kv_heads, n = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(batch, kv_heads, -1, q.shape[-1])
    return (grouped @ k.to(wide).mT).view(batch, heads, q_len, n) * scale


def softmax_of_past(s: Tensor) -> Tensor:
    """Softmax over the keys up to each query's own, of scores [..., q_len, kv_len]; zeros where there is none."""
    q_len, n = s.shape[-2:]
    unseen = torch.ones(q_len, n, dtype=torch.bool, device=s.device).triu(n - q_len + 1)
    # The lowest number, not -inf: a query before the first key would be NaN.
    return s.masked_fill(unseen, torch.finfo(s.dtype).min).softmax(-1).masked_fill(unseen, 0.0)


def read(weights: Tensor, v: Tensor) -> Tensor:
    """weights [batch, heads, q_len, kv_len] times v [batch, kv_heads, kv_len, v_head_dim], in v's dtype."""
    batch, heads, q_len, n = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, n)
    return (grouped @ v.to(weights.dtype)).view(batch, heads, q_len, -1).to(v.dtype)
