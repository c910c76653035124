"""Softmax attention inside of mechanisms that are Functions, by torch operations on any device, some queries at a time:
memory is linear in length. Scores are float32 or wider."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.core.picking import products, wide

RUN, HELD = 256, 2**28  # queries, and their scores, that are held at a time, if one query has no more


def attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, of_q: Tensor | None, of_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o, lse) of q [batch, heads, q_len, dim], k [batch, kv_heads, len, dim] and v; o in q's dtype. causal: queries
    are the last ones of the keys, and see none that comes later. of_q, of_k: int32 [batch, heads, q_len] and [batch,
    heads, len]; queries do not see keys with their own number."""
    found = [_attended(run, k, v, scale, hidden) for run, hidden in _runs(q, k, causal, of_q, of_k)]
    return torch.cat([o for o, _ in found], 2).to(q.dtype), torch.cat([lse for _, lse in found], 2)


def attended_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, scale: float, causal: bool,
    of_q: Tensor | None, of_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of what `attended` gave."""
    delta = (wide(do) * o).sum(-1) - dlse
    dq, dk, dv = [], wide(k).new_zeros(k.shape), wide(v).new_zeros(v.shape)
    size = _size(q, k)
    for n, (run, hidden) in enumerate(_runs(q, k, causal, of_q, of_k)):
        rows = slice(n * size, n * size + run.shape[2])
        p = _weights(_scores(run, k, scale, hidden), lse[:, :, rows])
        ds = p * (products(wide(do[:, :, rows]), wide(v)) - delta[:, :, rows, None]) * scale
        dq.append(_weighed(ds, wide(k)))
        dk += _turned(ds, wide(run), k.shape[1])
        dv += _turned(p, wide(do[:, :, rows]), k.shape[1])
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _runs(
    q: Tensor, k: Tensor, causal: bool, of_q: Tensor | None, of_k: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some queries, and which keys [.., .., queries, len] are hidden from them, None for none."""
    j, start, size = torch.arange(k.shape[2], device=q.device), k.shape[2] - q.shape[2], _size(q, k)
    for first, run in zip(range(0, q.shape[2], size), q.split(size, 2), strict=True):
        i = torch.arange(start + first, start + first + run.shape[2], device=q.device)
        hidden = j > i[:, None] if causal else None
        if of_q is not None and of_k is not None:
            own = of_q[:, :, first : first + size, None] == of_k[:, :, None]
            hidden = own if hidden is None else own | hidden
        yield run, hidden


def _size(q: Tensor, k: Tensor) -> int:
    """Queries of a run."""
    return max(1, min(RUN, HELD // max(1, q.shape[0] * q.shape[1] * k.shape[2])))


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, scale, hidden)
    lse = s.logsumexp(-1)
    return _weighed(_weights(s, lse), wide(v)), lse


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    """0 where no key is seen."""
    return (s - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    s = products(wide(q), wide(k)) * scale
    return s if hidden is None else s.masked_fill(hidden, -torch.inf)


def _weighed(p: Tensor, v: Tensor) -> Tensor:
    """Sums over keys, of p [batch, heads, queries, len] and v [batch, kv_heads, len, dim]."""
    return (p.unflatten(1, (v.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)


def _turned(p: Tensor, x: Tensor, kv_heads: int) -> Tensor:
    """Sums over queries and the heads of a group, [batch, kv_heads, len, dim] of x [batch, heads, queries, dim]."""
    p, x = (t.unflatten(1, (kv_heads, -1)).flatten(2, 3) for t in (p, x))
    return p.mT @ x
