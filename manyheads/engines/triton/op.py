"""The kernels as operators of torch's, for torch.compile: attend, and its backward pass.

An operator takes tensors and numbers. The form goes as its number, under which it is found again when the operator
runs; what its functions captured and its operands go along as tensors, so that torch sees what is read. In a compiled
graph is nothing of the form but how many tensors it has: another mask is another number, and compiles nothing.

Without torch.compile the kernels are called directly, which takes less time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyheads.core.dropout import Dropout
from manyheads.core.forms import Scores, form_of
from manyheads.core.inputs import Inputs, as_rows

REST = """
    SymInt form, Tensor[] captured, Tensor[] operands, Tensor? q_positions, Tensor? kv_positions, Tensor? seed,
    SymInt q_start, SymInt kv_start, float scale, float dropout
"""  # a call without q, k and v: positions are tensors, or begin at a number; no seed is no dropout


def attend(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    """(o, lse), differentiable."""
    return _attend(*_given(form, x))


def _given(form: Scores, x: Inputs) -> tuple[Any, ...]:
    """What the operator takes."""
    q_at, kv_at = x.q_positions, x.kv_positions
    return (
        x.q, x.k, x.v, form.handle.shape[0], list(form.program.tensors), [x.operands[name] for name in form.operands],
        q_at if isinstance(q_at, Tensor) else None, kv_at if isinstance(kv_at, Tensor) else None,
        None if x.dropout is None else x.dropout.seed,
        0 if isinstance(q_at, Tensor) else q_at.start, 0 if isinstance(kv_at, Tensor) else kv_at.start, x.scale,
        0.0 if x.dropout is None else x.dropout.rate,
    )  # fmt: skip


@torch.library.custom_op(
    "manyheads::attend", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {REST}) -> (Tensor, Tensor)"
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from manyheads.engines.triton import launch

    o, lse = launch.attend(*_call(q, k, v, *rest))
    like, _ = _attended(q, k, v)
    return _laid_out(o, like), lse.contiguous()


@_attend.register_fake
def _attended(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "manyheads::attend_backward",
    mutates_args=(),
    schema=f"""(
        Tensor o, Tensor lse, Tensor do, Tensor? dlse, bool[] needed, Tensor q, Tensor k, Tensor v, {REST}
    ) -> Tensor[]""",
)
def _backward(
    o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: list[bool], q: Tensor, k: Tensor, v: Tensor,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, the captured tensors and the operands, in this order; empty where not needed."""
    form, x = _call(q, k, v, *rest)
    found = _gradients(form, x, o, lse, do, dlse, needed)
    empty = _differentiated(o, lse, do, dlse, needed, q, k, v, *rest)
    return [
        like if not wanted else like.zero_() if own is None else _laid_out(own, like)
        for own, like, wanted in zip(found, empty, needed, strict=True)
    ]


def _gradients(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: list[bool]
) -> list[Tensor | None]:
    """Of the same; None where it is not needed, or zero."""
    from manyheads.engines.triton import launch

    x = x.with_(q=launch._rows(x.q), k=launch._rows(x.k), v=launch._rows(x.v))
    call, own = launch.call_of(form, x), launch.hopper.why_not(form, x) is None
    names = [*range(len(form.program.tensors)), *form.operands]
    wanted = [name for name, need in zip(names, needed[3:], strict=True) if need]
    read = {gradient.source for gradient in form.program.derivative().gradients} if wanted else set()
    sources = [name for name in wanted if name in read]
    heads = launch.of_heads(form)
    products, dheads, found = launch.run_backward(
        form, x, o, lse, do, dlse, call, own, (needed[0], needed[1], needed[2]), heads in wanted, sources
    )
    found = {name: grad if isinstance(name, int) else _stored(grad, name, form, x) for name, grad in found.items()}
    if heads is not None and dheads is not None:
        found[heads] = dheads.to(x.operands[heads].dtype)
    return [*products, *map(found.get, names)]


def _stored(grad: Tensor, name: str, form: Scores, x: Inputs) -> Tensor:
    """From where tokens stand to where they are stored: what position_operands did, turned round."""
    value, names = x.operands[name], form.operands[name].names
    if "len" not in names or (not isinstance(x.kv_positions, Tensor) and x.kv_positions.start == 0):
        return grad
    shape = [1] * value.ndim
    at, dim = as_rows(x.kv_positions, value.device), names.index("len")
    shape[0], shape[dim] = at.shape
    at = at.view(shape).expand(value.shape)
    return torch.where(at < 0, 0.0, grad.gather(dim, at.clamp(min=0)))


@_backward.register_fake
def _differentiated(
    o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: list[bool], q: Tensor, k: Tensor, v: Tensor,
    form: int, captured: list[Tensor], operands: list[Tensor], *_: Any,
) -> list[Tensor]:  # fmt: skip
    leaves = q, k, v, *captured, *operands
    return [t.new_empty(t.shape if wanted else 0) for t, wanted in zip(leaves, needed, strict=True)]


# ---- autograd ----


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, form, captured, operands, q_positions, kv_positions, seed, *numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, q_positions, kv_positions, seed, *captured, *operands)
    ctx.form, ctx.numbers, ctx.captured = form, numbers, len(captured)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    o, lse, q, k, v, q_positions, kv_positions, seed, *rest = ctx.saved_tensors
    captured, operands = rest[: ctx.captured], rest[ctx.captured :]
    of_q, of_k, of_v, _, of_captured, of_operands, *_ = ctx.needs_input_grad
    needed = [of_q, of_k, of_v, *of_captured, *of_operands]
    found: list[Tensor | None] = [None] * len(needed)
    if do is not None or dlse is not None:
        do = torch.zeros_like(o) if do is None else do
        given = ctx.form, captured, operands, q_positions, kv_positions, seed, *ctx.numbers
        grads = _backward(o, lse, do, dlse, needed, q, k, v, *given)
        found = [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
    last = 3 + ctx.captured
    return *found[:3], None, found[3:last], found[last:], *[None] * 7


_attend.register_autograd(_differentiate, setup_context=_keep)


# ---- the call again ----


def _call(
    q: Tensor, k: Tensor, v: Tensor, number: int, captured: list[Tensor], operands: list[Tensor],
    q_positions: Tensor | None, kv_positions: Tensor | None, seed: Tensor | None, q_start: int, kv_start: int,
    scale: float, rate: float,
) -> tuple[Scores, Inputs]:  # fmt: skip
    form = form_of(number)
    assert isinstance(form, Scores), "why_not said so"
    x = Inputs(
        q, k, v, scale,
        range(q_start, q_start + q.shape[2]) if q_positions is None else q_positions,
        range(kv_start, kv_start + k.shape[2]) if kv_positions is None else kv_positions,
        dict(zip(form.operands, operands, strict=True)),
        dropout=None if seed is None else Dropout(rate, seed),
    )  # fmt: skip
    return _with(form, captured), x


def _with(form: Scores, captured: list[Tensor]) -> Scores:
    """The form with other captured tensors in place of its own; itself where they are its own, as for them lists of
    tiles may be at hand."""
    if all(map(_same, form.program.tensors, captured)):
        return form
    other = replace(form)
    other.__dict__["program"] = form.program.rebind(form.program.numbers, tuple(captured))
    return other


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """With the strides that were foretold."""
    return t if t.stride() == like.stride() else like.copy_(t)
