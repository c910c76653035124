"""The recurrence as a function that torch differentiates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.engines.triton.chunked.backward import backward
from manyheads.engines.triton.chunked.call import Call, prepare
from manyheads.engines.triton.chunked.forward import forward, step
from manyheads.engines.triton.launch import _rows


def recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o and the state behind the last token. See Call; `state` is what was there before the first."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, g, beta, state)):
        return _Recur.apply(q, k, v, g, beta, state, scale)  # type: ignore[return-value]  torch calls it Any or None
    call = Call.of(q, k, v, g, beta, scale)
    return step(call, state) if call.kv_len == 1 else forward(call, state, prepare(call, keep=False))[:2]


class _Recur(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        call = Call.of(q, k, v, g, beta, scale)
        made = prepare(call, keep=False)
        o, end, starts = forward(call, state, made)
        ctx.save_for_backward(q, k, v, g, beta, starts, *made.solved)
        ctx.scale, ctx.state = scale, None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return o, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, starts, *made = ctx.saved_tensors
        if do is None and d_end is None:
            return (None,) * 7
        rows = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else _rows(do)
        call = Call.of(q, k, v, g, beta, ctx.scale)
        found = backward(call, prepare(call, True, tuple(made)), starts, rows, d_end, ctx.needs_input_grad[3])
        dg = None if found.g is None or g is None else found.g.to(g.dtype)
        dbeta = None if found.beta is None or beta is None else found.beta.to(beta.dtype)
        return *found[:3], dg, dbeta, None if ctx.state is None else found.state.to(ctx.state), None
