"""What a call was given, checked: one clear sentence for each thing that does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.dropout import dropout_of
from manyheads.core.forms import Form, Recurrence, Scores, Selection
from manyheads.core.inputs import Inputs, as_rows, default_positions
from manyheads.core.recurrence import state_shape


def build_inputs(
    form: Form, q: Tensor, k: Tensor, v: Tensor, scale: float | None, q_positions: Tensor | None,
    kv_positions: Tensor | None, state: Tensor | None, operands: dict[str, Tensor],
    dropout: float = 0.0, seed: int | Tensor | None = None,
) -> Inputs:  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor [batch, heads, len, head_dim], not {got}")
        if not t.is_floating_point():
            raise ValueError(f"{name} is {t.dtype}; attention needs a floating dtype")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device} but {name} is {t.dtype} on {t.device}; they must agree")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in batch, kv_heads and kv_len")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[3]} but k has {k.shape[3]}; they must agree")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} but k and v have {k.shape[0]}; they must agree")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which {k.shape[1]} kv_heads do not divide")
    if scale is not None and not (isinstance(scale, int | float) and abs(scale) < float("inf")):
        raise ValueError(f"scale must be a finite number, not {scale!r}")
    if state is not None and not isinstance(form, Recurrence):
        raise ValueError(f"state is for recurrent mechanisms; this one is a {type(form).__name__}")
    if state is not None and isinstance(form, Recurrence) and not form.causal:
        raise ValueError("state is for causal recurrences; this one reads all tokens at once")
    default_q, default_kv = default_positions(q.shape[2], k.shape[2])
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("q_positions and kv_positions go together: give both or neither")
    if isinstance(form, Recurrence) and form.causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"a recurrence reads after it writes: q_len {q.shape[2]} exceeds kv_len {k.shape[2]}")
    check_dropout(form, dropout)
    x = Inputs(
        q, k, v, form.default_scale(q.shape[3]) if scale is None else float(scale),
        _positions("q_positions", q_positions, q) if q_positions is not None else default_q,
        _positions("kv_positions", kv_positions, k) if kv_positions is not None else default_kv,
        operands, state, dropout_of(dropout, seed, q.device),
    )  # fmt: skip
    if isinstance(form, Selection) and x.q_len > x.kv_len:
        raise ValueError(f"a selection takes queries that have a key: q_len {x.q_len} exceeds kv_len {x.kv_len}")
    if isinstance(form, Recurrence) and form.causal and x.ragged:
        _check_order(x)
    if state is not None and isinstance(form, Recurrence):
        expected = state_shape(form, x)
        if not isinstance(state, Tensor) or tuple(state.shape) != expected:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state must be a tensor {expected}, as an earlier call returned it, not {got}")
        if state.device != q.device:
            raise ValueError(f"state is on {state.device} but q is on {q.device}; they must agree")
    if not operands:
        return x
    return x.with_(operands={name: _operand(form, name, value, x) for name, value in operands.items()})


def check_dropout(form: Form, rate: float) -> None:
    """Raises ValueError for a rate that is not in [0, 1), and for forms without weights to drop."""
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"dropout must be a number from 0 to below 1, not {rate!r}")
    if rate and not isinstance(form, Scores | Selection):
        raise ValueError(f"dropout is for mechanisms with weights for pairs of tokens, not for a {type(form).__name__}")


def _check_order(x: Inputs) -> None:
    """A recurrence writes in the order in which tokens are stored, and a query reads what was written just then."""
    q, kv = as_rows(x.q_positions, x.q.device), as_rows(x.kv_positions, x.q.device)
    latest = kv.cummax(1).values
    if not bool(((kv < 0) | (kv == latest)).all()):
        raise ValueError("a recurrence needs kv_positions in ascending order, with -1 for absent tokens")
    if not bool(((q < 0) | (q == latest[:, x.kv_len - x.q_len :])).all()):
        raise ValueError("a recurrence needs a row's queries to be its last tokens, stored as its keys are")


def _positions(name: str, given: Tensor, tokens: Tensor) -> Tensor:
    shape = (tokens.shape[0], tokens.shape[2])
    if not isinstance(given, Tensor) or given.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 tensor {shape}, not {getattr(given, 'dtype', type(given).__name__)}")
    if tuple(given.shape) not in (shape, shape[1:]):
        raise ValueError(f"{name} is {tuple(given.shape)}; it must be {shape} or {shape[1:]}")
    if given.device != tokens.device:
        raise ValueError(f"{name} is on {given.device} but the tensors are on {tokens.device}; they must agree")
    return as_rows(given, tokens.device).expand(shape)


def _operand(form: Form, name: str, value: Tensor, x: Inputs) -> Tensor:
    """The operand, expanded to its full shape."""
    expected = form.operands[name].shape(x.sizes)
    if not isinstance(value, Tensor) or value.ndim != len(expected):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor [{form.operands[name].dims}] = {expected}, not {got}")
    if any(have not in (1, want) for have, want in zip(value.shape, expected, strict=True)):
        raise ValueError(f"{name} is {tuple(value.shape)}; it must be [{form.operands[name].dims}] = {expected}")
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}; operands need a floating dtype")
    if value.device != x.q.device:
        raise ValueError(f"{name} is on {value.device} but q is on {x.q.device}; they must agree")
    return value.expand(expected)
