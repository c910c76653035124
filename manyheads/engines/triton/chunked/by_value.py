"""The recurrence whose values decay channel by channel, by the kernels of the one whose keys do.

    S_t = S_{t-1} diag(exp(g_t)) + k_t v_t^T,   o_t = S_t^T (scale q_t)

Turned round, T_t = S_t^T = diag(exp(g_t)) T_{t-1} + v_t k_t^T has v for keys and k for values, but is read from the
other side. That is what a gradient of queries does: with L = sum_t q_t.(T_t^T (scale p_t)) it is dL / dp_t = scale T_t
q_t = o_t, whatever p is. So o comes from a backward pass whose other results nobody reads, and the gradients from a
forward and a backward pass, as L is what they are of, too, with p in place of do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.engines.triton.chunked import op


def by_value(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As core/recurrence.py wants it of an engine, with heads that share no keys."""
    assert beta is None, "only keys are corrected"
    o, end = _ByValue.apply(q, k, v, g, None if state is None else state.mT, scale)  # type: ignore[misc]  torch says Any
    return o, end.mT


class _ByValue(torch.autograd.Function):
    """The states are turned round."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, state)
        ctx.scale = scale
        p = v.new_zeros(*q.shape[:3], v.shape[3])
        _, end = op.recur(p, v, k, g, None, state, scale)
        return op.differentiate(q, None, False, p, v, k, g, None, state, scale)[0], end

    @staticmethod
    def backward(ctx: Any, do: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, state = ctx.saved_tensors
        dq, _ = op.recur(do, v, k, g, None, state, ctx.scale)
        _, dv, dk, dg, _, d_state = op.differentiate(q, d_end, True, do, v, k, g, None, state, ctx.scale)
        return dq, dk, dv, dg, None if state is None else d_state, None
