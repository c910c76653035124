"""Rows of a ragged batch, one by one: for forms that count blocks, neighbours or pools in a row's own tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.core.forms import Form, Function, Scores, Selection, Sum
from manyheads.core.inputs import Inputs, as_rows, default_positions

Run = Callable[[Form, Inputs], tuple[Tensor, Tensor | None]]


def whole_rows_only(form: Form) -> bool:
    """Whether padding has to go before the form is run."""
    return isinstance(form, Selection | Function | Sum)


def run_rows(run: Run, form: Form, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """Each row alone, without its absent tokens; (o, lse) put back where its tokens were."""
    q_rows, kv_rows = as_rows(x.q_positions, x.q.device), as_rows(x.kv_positions, x.q.device)
    o_rows, lse_rows = [], []
    for b in range(x.batch):
        q_at, kv_at = (q_rows[b] >= 0).nonzero().flatten(), (kv_rows[b] >= 0).nonzero().flatten()
        empty = x.q.new_zeros(x.heads, x.q_len, x.v_head_dim)
        _check_whole(form, q_rows[b, q_at], kv_rows[b, kv_at])
        o, lse = run(form, _alone(form, x, b, q_at, kv_at))
        o_rows.append(empty.index_copy(1, q_at, o[0]))
        if lse is not None:
            lse_rows.append(unseen(form, x)[b].index_copy(1, q_at, lse[0]))
    return torch.stack(o_rows), torch.stack(lse_rows) if lse_rows else None


def unseen(form: Form, x: Inputs) -> Tensor:
    """The lse [batch, heads, q_len] of queries that see no key, in float32 or wider: of an empty sum, but for a sink;
    0 where there is no lse."""
    inner = form.scores if isinstance(form, Selection) else form
    wide = torch.promote_types(x.q.dtype, torch.float32)
    if isinstance(inner, Scores) and inner.sink is not None:
        return x.operands[inner.sink].to(wide)[None, :, None].expand(x.batch, -1, x.q_len)
    value = 0.0 if isinstance(inner, Scores) and not inner.has_lse else -torch.inf
    return torch.full(x.q.shape[:3], value, dtype=wide, device=x.q.device)


def _alone(form: Form, x: Inputs, b: int, q_at: Tensor, kv_at: Tensor) -> Inputs:
    row = slice(b, b + 1)
    q_positions, kv_positions = default_positions(len(q_at), len(kv_at))
    return x.with_(
        q=x.q[row].index_select(2, q_at),
        k=x.k[row].index_select(2, kv_at),
        v=x.v[row].index_select(2, kv_at),
        q_positions=q_positions,
        kv_positions=kv_positions,
        operands={name: _own(form.operands[name].names, value, b, kv_at) for name, value in x.operands.items()},
        dropout=None if x.dropout is None else x.dropout.of_row(b),
    )


def _own(names: tuple[str, ...], value: Tensor, b: int, at: Tensor) -> Tensor:
    """A row's part of an operand."""
    if names and names[0] == "batch" and value.shape[0] > 1:
        value = value[b : b + 1]
    dim = names.index("len") if "len" in names else -1
    return value.index_select(dim, at) if dim >= 0 and value.shape[dim] > 1 else value


def _check_whole(form: Form, q: Tensor, kv: Tensor) -> None:
    """A row's keys stand at 0, 1, ... n - 1 and its queries at the end of them."""
    n = len(kv)
    device = kv.device
    if not torch.equal(kv, torch.arange(n, device=device)):
        raise ValueError(
            f"a {type(form).__name__} needs every key of a row, at positions 0, 1, 2, ... in order; "
            f"some are missing here, as after a cache policy evicted them"
        )
    if not torch.equal(q, torch.arange(n - len(q), n, device=device)):
        raise ValueError(f"a {type(form).__name__} needs a row's queries to be its last tokens, in order")
