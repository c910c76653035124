"""The recurrence as a function that torch differentiates, whose launches are known after two calls of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.core.alike import alike
from manyheads.engines.triton import quick, replay
from manyheads.engines.triton.chunked.backward import Gradients, backward, shared
from manyheads.engines.triton.chunked.call import Call, prepare
from manyheads.engines.triton.chunked.forward import forward, step
from manyheads.engines.triton.launch import _rows

Given = tuple[Tensor | None, ...]


def recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float,
    known: replay.Call | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the state behind the last token. See Call; `state` is what was there before the first. known: what is
    launched for it, if that was looked up."""
    given = q, k, v, g, beta, state
    if _learn(given):
        return _Recur.apply(*given, scale, known)  # type: ignore[return-value]  torch calls it Any or None
    return outputs(given, scale, False, known)  # type: ignore[return-value]  two


def known(given: Given, scale: float) -> replay.Call | None:
    """What `recur` launches for tensors like these, of which the same ones want gradients, if that is known."""
    return replay.known(_key(("forward", scale, _learn(given)), given))


def _learn(given: Given) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


class _Recur(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None,
        scale: float, known: replay.Call | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        o, end, *kept = outputs((q, k, v, g, beta, state), scale, True, known)
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.scale, ctx.state = scale, None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return o, end  # type: ignore[return-value]  neither is None

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate_once(ctx, do, d_end) if torch.is_grad_enabled() else _differentiate(ctx, do, d_end)


def _differentiate(ctx: Any, do: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    kept = q, k, v, g, beta, *_ = ctx.saved_tensors
    if do is None and d_end is None:
        return (None,) * 8
    rows = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else _rows(do)
    found = _backward((*kept, rows, d_end), ctx.scale, ctx.needs_input_grad[3])
    dg = None if found.g is None or g is None else found.g.to(g.dtype)
    dbeta = None if found.beta is None or beta is None else found.beta.to(beta.dtype)
    d_state = None if ctx.state is None else found.state.to(ctx.state)
    return found.q, shared(found.k, k), shared(found.v, v), dg, dbeta, d_state, None, None


_differentiate_once = torch.autograd.function.once_differentiable(_differentiate)


def outputs(given: Given, scale: float, kept: bool, known: replay.Call | None = None) -> replay.Made:
    """o and the state behind the last token; if `kept`, and what a backward pass is given."""

    def compute() -> replay.Made:
        *tensors, state = given
        with torch.cuda.device_of(given[0]):
            call = Call.of(*tensors, scale)  # type: ignore[arg-type]  q, k and v are there
            if call.kv_len == 1 and not kept:
                return step(call, state)
            made = prepare(call, keep=False, returns=kept)
            o, end, starts = forward(call, state, made)
        return (o, end, starts, *made.solved) if kept else (o, end)

    if known is not None and (found := known(given)) is not None:
        return found
    return _replayed(("forward", scale, kept), given, compute)


def _backward(given: Given, scale: float, decays: bool) -> Gradients:
    """given: q, k, v, g, beta, the states at which segments begin, what was prepared, do and the gradient of the last
    state."""

    def compute() -> replay.Made:
        *tensors, starts, sums, fades, strengths, solved, do, d_end = given
        call = Call.of(*tensors, scale)  # type: ignore[arg-type]  q, k and v are there
        made = prepare(call, True, (sums, fades, strengths, solved))
        return backward(call, made, starts, do, d_end, decays)  # type: ignore[arg-type]  do is there

    return Gradients(*_replayed(("backward", scale, decays), given, compute))  # type: ignore[arg-type]  as compute does


def _replayed(about: tuple[Any, ...], given: Given, compute: Callable[[], replay.Made]) -> replay.Made:
    return replay.replayed(_key(about, given), given, (), tuple, lambda: quick.together(compute))


def _key(about: tuple[Any, ...], given: Given) -> replay.Key | None:
    facts = alike(given)
    return None if facts is None else (*about, *facts)
