"""The recurrence as operators of torch's, for torch.compile: `recur`, and its backward pass.

Of a form is nothing in them: features, products and normalisers are traced into the graph around them. Where segments
begin depends on the chip, and torch wants to be told of shapes before: the backward pass finds those states again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CALL = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? state, float scale"


@torch.library.custom_op("manyheads::recur", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)")
def recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As core/recurrence.py wants it of an engine."""
    from manyheads.engines.triton.chunked.autograd import outputs

    o, end = outputs((q, k, v, g, beta, state), scale, kept=False)
    assert o is not None and end is not None, "they are not gradients"
    return _as_foretold(o, _recurred(q, k, v, g, beta, state, scale)[0]), end


@recur.register_fake
def _recurred(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    same = q.shape[2] > 1 and q.shape[3] == v.shape[3]
    o = torch.empty_like(q) if same else q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)


@torch.library.custom_op(
    "manyheads::recur_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? d_end, bool decays, {CALL}) -> Tensor[]",
)
def differentiate(
    do: Tensor, d_end: Tensor | None, decays: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    beta: Tensor | None, state: Tensor | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, g, beta and the state, in this order; empty where there are none. `decays`: whether g
    needs its own."""
    from manyheads.engines.triton import quick
    from manyheads.engines.triton.chunked.backward import Gradients, backward, shared
    from manyheads.engines.triton.chunked.call import Call, prepare
    from manyheads.engines.triton.chunked.forward import starts_of, walk
    from manyheads.engines.triton.launch import _rows

    call = Call.of(q, k, v, g, beta, scale)

    def compute() -> Gradients:
        made = prepare(call)
        starts = starts_of(call, state, lambda *local: walk(call, made, None, local=local))
        return backward(call, made, starts, _rows(do), d_end, decays)

    with torch.cuda.device_of(q):
        found = quick.together(compute)
        found = found._replace(k=shared(found.k, k), v=shared(found.v, v))
    likes = _differentiated(do, d_end, decays, q, k, v, g, beta, state)
    return [
        like if own is None or not like.numel() else _as_foretold(own, like)
        for own, like in zip(found, likes, strict=True)
    ]


@differentiate.register_fake
def _differentiated(do: Tensor, d_end: Tensor | None, decays: bool, q: Tensor, *rest: Any) -> list[Tensor]:
    k, v, g, beta, state, *_ = rest
    leaves = q, k, v, g if decays else None, beta, state
    return [q.new_empty(0) if t is None else t.new_empty(t.shape) for t in leaves]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    if do is None and d_end is None:
        return (None,) * 7
    do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do
    needed = ctx.needs_input_grad
    found = differentiate(do, d_end, needed[3], q, k, v, *rest, ctx.scale)
    return *[grad if wanted else None for grad, wanted in zip(found, needed[:6], strict=True)], None


recur.register_autograd(_differentiate, setup_context=_keep)


def _as_foretold(t: Tensor, like: Tensor) -> Tensor:
    return t if t.stride() == like.stride() and t.dtype == like.dtype else like.copy_(t)
