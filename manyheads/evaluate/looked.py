"""What a mechanism looked at: the share of pairs it computes, where they lie, and what dense attention has on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.core.forms import Form, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.maps import attention_map
from manyheads.core.tiling import chunks


@dataclass(frozen=True)
class Looked:
    """density: pairs of query and key computed, over those that causal attention computes, averaged over heads.
    mass: what the weights of dense causal attention on these pairs sum to, averaged over queries and heads.
    cells: [n][n], rows = queries, columns = keys; each the share of its causal pairs that are computed."""

    density: float
    mass: float
    cells: list[list[float]]


@torch.no_grad()
def looked(form: Form, q: Tensor, k: Tensor, cells: int = 32) -> Looked | None:
    """Where a form looks for q [1, heads, len, head_dim], k [1, kv_heads, len, head_dim]; None if it has no keys."""
    if not isinstance(form, Scores | Selection):
        return None
    n = k.shape[2]
    cells = min(cells, n)
    scale = form.default_scale(q.shape[3])
    x = Inputs(q, k, k, scale, *default_positions(q.shape[2], n))
    cell = torch.arange(n) * cells // n
    seen, possible = torch.zeros(cells, cells, dtype=torch.float64), torch.zeros(cells, cells, dtype=torch.float64)
    mass = 0.0
    for chunk in chunks(form, x):
        columns = torch.arange(n)[chunk.columns.cpu() if isinstance(chunk.columns, Tensor) else chunk.columns]
        allowed = chunk.allowed
        mass += _held(q[:, :, chunk.rows], k[:, :, : n - q.shape[2] + chunk.rows.stop], columns, allowed)
        if allowed is None:
            share = torch.ones(chunk.rows.stop - chunk.rows.start, len(columns), dtype=torch.float64)
        else:
            share = allowed.double().mean((0, 1)).expand(chunk.rows.stop - chunk.rows.start, -1).cpu()
        _add(seen, share, cell[chunk.rows], cell[columns])
    for start in range(0, n, 1024):
        rows = torch.arange(start, min(start + 1024, n))
        _add(possible, (torch.arange(n) <= rows[:, None]).double(), cell[rows], cell)
    mass /= q.shape[1] * q.shape[2]
    return Looked(float(seen.sum() / possible.sum()), mass, (seen / possible.clamp(min=1)).tolist())


def _held(q: Tensor, k: Tensor, columns: Tensor, allowed: Tensor | None) -> float:
    """What the weights of queries, the last of which stands where the last key does, sum to on keys `columns`."""
    past = columns < k.shape[2]
    weights = attention_map(q, k, q.shape[3] ** -0.5, causal=True)[..., columns[past].to(q.device)]
    if allowed is not None:
        weights = weights * allowed[..., past.to(q.device)]
    return weights.sum(dtype=torch.float64).item()


def _add(total: Tensor, share: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add share [rows, columns] into the cells that rows and columns belong to."""
    wide = torch.zeros(share.shape[0], total.shape[1], dtype=total.dtype).index_add_(1, columns, share)
    total.index_add_(0, rows, wide)
