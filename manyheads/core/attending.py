"""What an engine computes as operators of torch's, for torch.compile: attend, and its backward pass.

    ATTEND = operators("attend", forward, backward)
    o, lse = ATTEND(form, x)

An operator takes tensors and numbers. The form goes as its number, under which it is found again when the operator
runs; what its functions captured, its operands and the blocks that were chosen go along as tensors, so that torch sees
what is read. In a compiled graph is nothing of the form but how many tensors it has: another mask is another number,
and compiles nothing. A choice of blocks is traced into the graph, before the operator.

Without torch.compile engines are called directly, which takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.dropout import Dropout
from manyheads.core.forms import Blocks, Scores, Selection, form_of
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import choose

REST = """
    SymInt form, Tensor[] captured, Tensor[] operands, Tensor? indices, Tensor? counts, Tensor? q_positions,
    Tensor? kv_positions, Tensor? seed, SymInt q_start, SymInt kv_start, float scale, float dropout
"""  # a call without q, k and v: positions are tensors, or begin at a number; no seed is no dropout

Scored = Scores | Selection  # a selection comes with the blocks that it chose
Forward = Callable[[Scored, Inputs, Blocks | None], tuple[Tensor, Tensor | None]]
# Of o, lse, do and dlse, and which gradients are needed: of q, k, v, the captured tensors and the operands.
Backward = Callable[
    [Scored, Inputs, Blocks | None, Tensor, Tensor, Tensor, Tensor | None, list[bool]], list[Tensor | None]
]


class Operators(NamedTuple):
    """forward: to (o, lse), lse empty if the engine has none. backward: the gradients in Backward's order, empty where
    not needed."""

    forward: Any
    backward: Any

    def __call__(self, form: Scored, x: Inputs, blocks: Blocks | None = None) -> tuple[Tensor, Tensor]:
        """(o, lse), differentiable. blocks: what a selection chose, if it did already."""
        chosen = choose(form, x) if blocks is None and isinstance(form, Selection) else blocks
        return self.forward(*given(form, x, chosen))


def given(form: Scored, x: Inputs, blocks: Blocks | None) -> tuple[Any, ...]:
    """What the operator takes."""
    q_at, kv_at = x.q_positions, x.kv_positions
    return (
        x.q, x.k, x.v, form.handle.shape[0], list(scores_of(form).program.tensors),
        [x.operands[name] for name in form.operands],
        None if blocks is None else blocks.indices, None if blocks is None else blocks.counts,
        q_at if isinstance(q_at, Tensor) else None, kv_at if isinstance(kv_at, Tensor) else None,
        None if x.dropout is None else x.dropout.seed,
        0 if isinstance(q_at, Tensor) else q_at.start, 0 if isinstance(kv_at, Tensor) else kv_at.start, x.scale,
        0.0 if x.dropout is None else x.dropout.rate,
    )  # fmt: skip


def scores_of(form: Scored) -> Scores:
    return form.scores if isinstance(form, Selection) else form


def operators(name: str, forward: Forward, backward: Backward, has_lse: bool = True) -> Operators:
    """The operators manyheads::<name> and manyheads::<name>_backward, made once for an engine."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        o, lse = forward(*_call(q, k, v, *rest))
        like, none = attended(q, k, v)
        return _laid_out(o, like), none if lse is None else lse.contiguous()

    def attended(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3] if has_lse else 0, dtype=wide)

    def differentiate(
        o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: list[bool], q: Tensor, k: Tensor, v: Tensor,
        *rest: Any,
    ) -> list[Tensor]:  # fmt: skip
        found = backward(*_call(q, k, v, *rest), o, lse, do, dlse, needed)
        empty = differentiated(o, lse, do, dlse, needed, q, k, v, *rest)
        return [
            like if not wanted else like.zero_() if own is None else _laid_out(own, like)
            for own, like, wanted in zip(found, empty, needed, strict=True)
        ]

    def differentiated(
        o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: list[bool], q: Tensor, k: Tensor, v: Tensor,
        form: int, captured: list[Tensor], operands: list[Tensor], *_: Any,
    ) -> list[Tensor]:  # fmt: skip
        leaves = q, k, v, *captured, *operands
        return [t.new_empty(t.shape if wanted else 0) for t, wanted in zip(leaves, needed, strict=True)]

    def on_backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        (o, lse, q, k, v, *optional), rest = ctx.saved_tensors[:KEPT], ctx.saved_tensors[KEPT:]
        captured, operands = rest[: ctx.captured], rest[ctx.captured :]
        of_q, of_k, of_v, _, of_captured, of_operands, *_ = ctx.needs_input_grad
        needed = [of_q, of_k, of_v, *of_captured, *of_operands]
        found: list[Tensor | None] = [None] * len(needed)
        if do is not None or dlse is not None:
            do = torch.zeros_like(o) if do is None else do
            call = q, k, v, ctx.form, captured, operands, *optional, *ctx.numbers
            grads = made.backward(o, lse, do, dlse, needed, *call)
            found = [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
        last = 3 + ctx.captured
        return *found[:3], None, found[3:last], found[last:], *[None] * 9

    operator: Any = torch.library.custom_op
    made = Operators(
        operator(
            f"manyheads::{name}", attend, mutates_args=(),
            schema=f"(Tensor q, Tensor k, Tensor v, {REST}) -> (Tensor, Tensor)",
        ),
        operator(
            f"manyheads::{name}_backward", differentiate, mutates_args=(),
            schema=f"""(
                Tensor o, Tensor lse, Tensor do, Tensor? dlse, bool[] needed, Tensor q, Tensor k, Tensor v, {REST}
            ) -> Tensor[]""",
        ),
    )  # fmt: skip
    made.forward.register_fake(attended)
    made.backward.register_fake(differentiated)
    made.forward.register_autograd(on_backward, setup_context=_keep)
    return made


KEPT = 10  # tensors that are kept before the captured ones: o to v, and what may be None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, form, captured, operands, *optional = inputs[:11]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, *optional, *captured, *operands)
    ctx.form, ctx.numbers, ctx.captured = form, inputs[11:], len(captured)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """With the strides that were foretold."""
    return t if t.stride() == like.stride() else like.copy_(t)


# ---- the call again ----


def _call(
    q: Tensor, k: Tensor, v: Tensor, number: int, captured: list[Tensor], operands: list[Tensor],
    indices: Tensor | None, counts: Tensor | None, q_positions: Tensor | None, kv_positions: Tensor | None,
    seed: Tensor | None, q_start: int, kv_start: int, scale: float, rate: float,
) -> tuple[Scored, Inputs, Blocks | None]:  # fmt: skip
    form = form_of(number)
    assert isinstance(form, Scores | Selection), "engines ask for no other"
    x = Inputs(
        q, k, v, scale,
        range(q_start, q_start + q.shape[2]) if q_positions is None else q_positions,
        range(kv_start, kv_start + k.shape[2]) if kv_positions is None else kv_positions,
        dict(zip(form.operands, operands, strict=True)),
        dropout=None if seed is None else Dropout(rate, seed),
    )  # fmt: skip
    blocks = None if indices is None or counts is None else Blocks(indices, counts)
    return with_captured(form, captured), x, blocks


def with_captured(form: Scored, captured: list[Tensor]) -> Scored:
    """The form with other captured tensors in place of its own; itself where they are its own, as for them lists of
    tiles may be at hand."""
    return form if all(map(_same, scores_of(form).program.tensors, captured)) else rebound(form, captured)


def rebound(form: Scored, captured: list[Tensor]) -> Scored:
    if isinstance(form, Selection):
        return replace(form, scores=rebound(form.scores, captured))
    other = replace(form)
    other.__dict__["program"] = form.program.rebind(form.program.numbers, tuple(captured))
    return other


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
