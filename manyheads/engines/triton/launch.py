"""From a form and its inputs to launches: forward, backward and the autograd function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, Positions
from manyheads.core.rows import unseen
from manyheads.core.tiling import position_operands
from manyheads.engines.triton import backward, forward, gradients, hopper, quick
from manyheads.engines.triton.blocks import Block, cdiv, padded
from manyheads.engines.triton.call import Call, kernel_of

INTERPRETED = bool(knobs.runtime.interpret)


Two = tuple[Tensor, Tensor]
Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def attend(form: Scores, x: Inputs, chosen: hopper.Chosen | None = None) -> Two:
    """(o, lse). chosen: blocks that the mask is about, which hopper.why_no_lists let pass."""
    if not (x.q.numel() and x.k.numel() and x.v.numel()):
        return x.nothing(), unseen(form, x)
    if x.q.device.type == "cuda" and x.q.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.q.device):
            return attend(form, x, chosen)
    own = hopper.why_not(form, x) is None
    assert own or x.dropout is None, "why_not said so"
    if x.wants_grad or (torch.is_grad_enabled() and any(t.requires_grad for t in form.program.tensors)):
        return _attend(form, x, own, chosen)
    return hopper.run(form, x, chosen) if own else plain_forward(*_q_k_v(x), call_of(form, x))


def again(form: Scores, x: Inputs) -> Callable[[Sequence[Tensor]], Two | None] | None:
    """What `attend` did for x, for other q, k, v and operands like those of x, of which the same ones want gradients;
    None if that is not known to be the same launches."""
    known, captured = hopper.again(form, x), form.program.tensors
    if known is None:
        return None
    wants_grad, learned = x.wants_grad, any(t.requires_grad for t in x.operands.values())
    about = About(form, _emptied(x).with_(operands={}), own=True, known=known)  # keeps no tensor
    shapes = {name: t.shape for name, t in x.operands.items()}

    def run_again(tensors: Sequence[Tensor]) -> Two | None:
        if captured and torch.is_grad_enabled() and any(t.requires_grad for t in captured):
            return None
        if not wants_grad:
            return known(tensors)  # type: ignore[return-value]  two
        q, k, v, *rest = tensors
        if not rest:
            return _Attend.apply(about, q, k, v, None)  # type: ignore[return-value]  torch calls it Any or None
        pairs = zip(shapes.items(), rest, strict=True)
        operands = {name: t if t.shape == shape else t.expand(shape) for (name, shape), t in pairs}
        if learned:
            return _attend(form, about.rest.with_(q=q, k=k, v=v, operands=operands), own=True, known=known)
        return _Attend.apply(about._replace(rest=about.rest.with_(operands=operands)), q, k, v, None)  # type: ignore[return-value]  as above

    return run_again


def of_heads(form: Scores) -> str | None:
    """The operand of a number for each head that kernels take beside those of the score: the sink, or alpha."""
    return form.alpha if isinstance(form.alpha, str) else form.sink


def call_of(form: Scores, x: Inputs) -> Call:
    """A call of the kernels for any GPU."""
    sink = None if form.sink is None else x.operands[form.sink].float().contiguous()
    return Call(
        form.program, position_operands(form, x), form.normaliser, sink, x.scale, _flat(x.q_positions),
        _flat(x.kv_positions), x.batch, x.heads, x.kv_heads, x.q_len, x.kv_len, x.q.shape[3], x.v_head_dim, x.q.device,
        x.q.element_size(),
    )  # fmt: skip


NOTHING = torch.empty(0)


class About(NamedTuple):
    """All of a call that wants gradients but q, k and v, which `rest` lacks. own: the chip has kernels of its own.
    sources: where the program has what the score reads and a gradient is wanted for. known: the forward pass, if it is
    known what it launches."""

    form: Scores
    rest: Inputs
    own: bool
    chosen: hopper.Chosen | None = None
    call: Call | None = None
    sources: tuple[int | str, ...] = ()
    known: Callable[[Sequence[Tensor]], Any] | None = None


def _attend(
    form: Scores, x: Inputs, own: bool, chosen: hopper.Chosen | None = None,
    known: Callable[[Sequence[Tensor]], Any] | None = None,
) -> Two:  # fmt: skip
    read = (*form.program.tensors, *x.operands.values())
    call = None if own and not any(t.requires_grad for t in read) else call_of(form, x)
    learned = {} if call is None else call.learned()
    name = of_heads(form)
    heads = None if name is None else x.operands[name].float()
    about = About(form, _emptied(x), own, chosen, call, tuple(learned), known)
    return _Attend.apply(about, *_q_k_v(x), heads, *learned.values())  # type: ignore[return-value]  torch calls it Any


class _Attend(torch.autograd.Function):
    """heads: of `of_heads`. read: what stands at about.sources."""

    @staticmethod
    def forward(
        ctx: Any, about: About, q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, *read: Tensor
    ) -> tuple[Tensor, Tensor]:
        made: Any = None if about.known is None else about.known((q, k, v, *about.rest.operands.values()))
        if made is None and about.own:
            made = hopper.run(about.form, _filled(about.rest, q, k, v), about.chosen)
        elif made is None:
            made = plain_forward(q, k, v, about.call)  # type: ignore[arg-type]  not None
        # What masks and scores read too, so that torch sees whether it was changed in place.
        ctx.save_for_backward(q, k, v, *made, *read, *about.form.program.tensors, *about.rest.operands.values())
        ctx.about = about
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate_once(ctx, do, dlse) if torch.is_grad_enabled() else _differentiate(ctx, do, dlse)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, *_ = ctx.saved_tensors
    about, (_, *needed) = ctx.about, ctx.needs_input_grad
    if do is None and dlse is None:
        return (None,) * (1 + len(needed))
    do = torch.zeros_like(o) if do is None else do
    products, dheads, found = run_backward(
        about.form, _filled(about.rest, q, k, v), o, lse, do, dlse, about.own, tuple(needed[:3]), needed[3],
        about.sources, about.chosen, about.call,
    )  # fmt: skip
    return None, *products, dheads, *(found[source] for source in about.sources)


_differentiate_once = torch.autograd.function.once_differentiable(_differentiate)


def _emptied(x: Inputs) -> Inputs:
    return x.with_(q=NOTHING, k=NOTHING, v=NOTHING)


def _filled(rest: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """`with_` takes twice as long."""
    return Inputs(q, k, v, rest.scale, rest.q_positions, rest.kv_positions, rest.operands, rest.state, rest.dropout)


def run_backward(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, own: bool,
    needed: tuple[bool, bool, bool], heads_needed: bool, sources: Iterable[int | str],
    chosen: hopper.Chosen | None = None, call: Call | None = None,
) -> tuple[Three, Tensor | None, dict[int | str, Tensor]]:  # fmt: skip
    """The gradients of (q, k, v), of of_heads, and of what the score reads, as far as they are needed."""
    do, sources = _rows(do), tuple(sources)
    products: Three = (None, None, None)
    if own and any(needed):
        products = hopper.gradients(form, x, o, lse, do, dlse, needed, chosen)
    if form.normaliser == "entmax":
        return products, hopper.alpha_gradient(form, x, lse, do) if heads_needed else None, {}
    if own and not heads_needed and not sources:
        return products, None, {}
    call = call_of(form, x) if call is None else call
    delta = row_delta(o, do, dlse, call)
    if not own:
        products = plain_backward(x.q, x.k, x.v, do, lse, delta, call, needed)
    dsink = sink_gradient(lse, delta, call) if heads_needed else None
    return products, dsink, run_gradients(x.q, x.k, x.v, do, lse, delta, call, sources)


# ---- the kernels for any GPU ----


def plain_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    block = call.block("forward")
    o = _like(q, call.v_head_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kernel, arguments = kernel_of(forward.forward, ("mask", "score"), call)
    counts, tiles, batch_step, head_step = call.lists(block)
    sink = None if call.sink is None else call.sink.detach()
    unit, steps = _steps(q, k, v, o)
    kernel[(cdiv(call.q_len, block.queries) * call.batch * call.heads,)](
        q, k, v, o, lse, sink, *_at(call, lse), counts, tiles, *steps, *_at_steps(call), batch_step, head_step,
        *_rest(call), *_constants(call, block), unit, *arguments, **_options(block),
    )  # fmt: skip
    return o, lse


def row_delta(o: Tensor, do: Tensor, dlse: Tensor | None, call: Call) -> Tensor:
    """rowsum(dO O) - dlse, float32 [batch, heads, q_len]: what the gradients of a row's scores have in common. It is 0
    without a normaliser."""
    delta = torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)
    if call.normaliser == "none":
        return delta.zero_()
    tiles_of_rows = 64
    dlse_steps = (0, 0, 0) if dlse is None else dlse.stride()
    unit, steps = _steps(o, do)
    sums: Any = backward.delta
    sums[(cdiv(call.q_len, tiles_of_rows) * call.batch * call.heads,)](
        o, do, delta if dlse is None else dlse, delta, *steps, *dlse_steps, call.q_len, call.heads,
        HAS_DLSE=dlse is not None, DV=call.v_head_dim, PV=padded(call.v_head_dim), BM=tiles_of_rows, UNIT=unit,
    )  # fmt: skip
    return delta


def plain_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, call: Call,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> Three:  # fmt: skip
    """dq, dk and dv. do has its rows' numbers side by side."""
    functions = ("mask", "score", "dscore")
    dq = dk = dv = None
    if needed[1] or needed[2]:
        block = call.block("keys")
        kernel, arguments = kernel_of(backward.keys, functions, call)
        dk, dv = _rows(torch.empty_like(k)), _rows(torch.empty_like(v))
        unit, steps = _steps(q, k, v, do, dk, dv)
        counts, tiles, batch_step, head_step = call.lists(block, transposed=True)
        kernel[(cdiv(call.kv_len, block.keys) * call.batch * call.kv_heads,)](
            q, k, v, do, lse, delta, dk, dv, *_at(call, lse), counts, tiles, *steps, *_at_steps(call), batch_step,
            head_step, *_rest(call), *_constants(call, block), unit, *arguments, **_options(block),
        )  # fmt: skip
    if needed[0]:
        block = call.block("queries")
        kernel, arguments = kernel_of(backward.queries, functions, call)
        dq = _rows(torch.empty_like(q))
        unit, steps = _steps(q, k, v, do, dq)
        counts, tiles, batch_step, head_step = call.lists(block)
        kernel[(cdiv(call.q_len, block.queries) * call.batch * call.heads,)](
            q, k, v, do, lse, delta, dq, *_at(call, lse), counts, tiles, *steps, *_at_steps(call), batch_step,
            head_step, *_rest(call), *_constants(call, block), unit, *arguments, **_options(block),
        )  # fmt: skip
    return dq, dk, dv


def run_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, call: Call, sources: Iterable[int | str]
) -> dict[int | str, Tensor]:
    """Of what the score reads: a captured tensor's place in the program, or an operand's name, and its gradient in its
    own shape, dtype and device. gradients.py says what it is rounded to."""
    read = {source: call.program.table(source, call.operands) for source in sources}
    if not read:
        return {}
    places = call.program.derivative().gradients
    tables = tuple(
        torch.zeros(read[place.source].shape, dtype=torch.int64, device=q.device) if place.source in read else None
        for place in places
    )
    block = call.block("queries")
    kernel, arguments = kernel_of(gradients.gradients, ("mask", "score", "gradients", "places"), call)
    counts, tiles, batch_step, head_step = call.lists(block)
    unit, steps = _steps(q, k, v, do)

    def launch(largest: Tensor | None, scales: Tensor | None, tables: tuple[Tensor | None, ...] | None) -> None:
        kernel[(cdiv(call.q_len, block.queries) * call.batch * call.heads,)](
            q, k, v, do, lse, delta, largest, scales, tables, *_at(call, lse), counts, tiles, *steps, *_at_steps(call),
            batch_step, head_step, *_rest(call), *_constants(call, block), unit, *arguments, **_options(block),
        )  # fmt: skip

    largest = torch.zeros(len(places), dtype=torch.float32, device=q.device)
    launch(largest, None, None)
    common = None if call.normaliser == "none" else delta
    scales = gradients.scales(largest, do, v, common, call.q_positions, call.kv_positions)
    launch(None, scales, tables)
    totals = {source: torch.zeros(table.shape, device=q.device) for source, table in read.items()}
    for place, table, scale in zip(places, tables, scales, strict=True):
        if table is not None:
            totals[place.source] += table / scale
    return {source: totals[source].to(table.device, table.dtype) for source, table in read.items()}


def sink_gradient(lse: Tensor, delta: Tensor, call: Call) -> Tensor:
    """Of the sinks, float32 [heads]: each is one more score, of weight exp(sink - lse) and with a value of zero."""
    assert call.sink is not None
    sink = call.sink.detach()[None, :, None]
    return -torch.where(sink.isneginf(), 0.0, (sink - lse).exp() * delta).sum((0, 2))


def _rest(call: Call) -> tuple[Any, ...]:
    """From q_start to FOLDED, in the kernels' order."""
    return (
        _start(call.q_positions), _start(call.kv_positions), call.q_len, call.kv_len, call.heads,
        call.heads // call.kv_heads, call.scale, call.normaliser, call.folded,
    )  # fmt: skip


def _constants(call: Call, block: Block) -> tuple[Any, ...]:
    """From Q_GIVEN to SIMULATED, in the kernels' order."""
    return (
        isinstance(call.q_positions, Tensor), isinstance(call.kv_positions, Tensor), call.head_dim,
        call.v_head_dim, padded(call.head_dim), padded(call.v_head_dim), block.queries, block.keys, INTERPRETED,
    )  # fmt: skip


def _options(block: Block) -> dict[str, Any]:
    return {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}


def _at(call: Call, placeholder: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that are tensors."""
    q, kv = call.q_positions, call.kv_positions
    return q if isinstance(q, Tensor) else placeholder, kv if isinstance(kv, Tensor) else placeholder


def _at_steps(call: Call) -> tuple[int, int]:
    q, kv = call.q_positions, call.kv_positions
    return q.stride(0) if isinstance(q, Tensor) else 0, kv.stride(0) if isinstance(kv, Tensor) else 0


def _start(positions: Positions) -> int:
    return 0 if isinstance(positions, Tensor) else positions.start


def _steps(*tensors: Tensor) -> tuple[int, list[int]]:
    """The strides of batch, head and row of each, and the unit they are in. Triton sees by itself that a stride is a
    multiple of 16; where one is not, but every row begins at a multiple of 16 bytes, that is the unit."""
    steps = [step for t in tensors for step in t.stride()[:3]]
    unit = 16 // tensors[0].element_size()
    fits = not any(step % unit for step in steps) and not any(t.data_ptr() % 16 for t in tensors)
    if fits and any(step % 16 for step in steps):
        return unit, [step // unit for step in steps]
    return 1, steps


def _q_k_v(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(x.q), _rows(x.k), _rows(x.v)


def _rows(t: Tensor) -> Tensor:
    """Rows of numbers that lie side by side and, in 16 bits, begin at multiples of 16 bytes: see docs/log.md."""
    even = t.element_size() != 2 or not (t.data_ptr() % 16 or any(s % 8 for s in t.stride()[:3]))
    return t if t.stride(3) == 1 and (even or t.shape[3] % 8) else t.clone(memory_format=torch.contiguous_format)


def _flat(positions: Positions) -> Positions:
    return positions.contiguous() if isinstance(positions, Tensor) and positions.stride(1) != 1 else positions


def _like(q: Tensor, v_head_dim: int) -> Tensor:
    """An output, laid out as the queries are."""
    if q.shape[3] == v_head_dim:
        return _rows(quick.empty_like(q))
    return quick.empty((*q.shape[:3], v_head_dim), q.dtype, q.device)
