"""Gradients: what is launched. The states before each chunk are computed again, in the inputs' dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.chunked import hopper
from manyheads.engines.triton.chunked.call import Call, Prepared
from manyheads.engines.triton.chunked.forward import constants, starts_of, tiles_of, walk
from manyheads.engines.triton.chunked.hopper import gradients as on_hopper
from manyheads.engines.triton.chunked.kernels import back as backs
from manyheads.engines.triton.chunked.kernels import gradients as gradient_kernels
from manyheads.engines.triton.chunked.kernels import inner as inners
from manyheads.engines.triton.launch import INTERPRETED, _steps
from manyheads.engines.triton.quick import empty_like, launch


class Gradients(NamedTuple):
    """Those of k and v are one for each head, for `shared`. Those of log decays, strengths and states are float32, and
    None where there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    state: Tensor


def backward(
    call: Call, made: Prepared, starts: Tensor | None, do: Tensor, d_end: Tensor | None, decays: bool
) -> Gradients:
    """starts: as `forward` returned them. do has its rows' numbers side by side. decays: whether g needs its own. The
    state's is that of zeros where there is none."""
    before, d_state = call.like(call.rows, call.chunks, *call.state[2:]), call.new(*call.state)
    tokens = call.batch, call.heads, call.kv_len
    corrects = call.beta is not None
    u = call.like(*tokens, call.v_head_dim) if corrects else None
    walk(call, made, starts, u=u, states=before)
    ends = starts_of(call, d_end, lambda *local: back(call, made, None, do, local=local))
    decays = decays and call.g is not None
    dbeta = call.new(*tokens) if corrects else None
    if hopper.takes_fused(call):
        dq, dk, dv = call.like(*call.q.shape), call.like(*tokens, call.head_dim), call.like(*tokens, call.v_head_dim)
        found = Gradients(dq, dk, dv, call.new(*tokens) if decays else None, dbeta, d_state)
        hopper.fused(call, made, ends, call.v if u is None else u, before, do, found)
        return found
    # Heads that share keys add up: in float32, for the sum is rounded once.
    shared = call.q.dtype if call.group == 1 else torch.float32
    behind, z = empty_like(before), None if u is None else empty_like(u)
    dv = call.new(*tokens, call.v_head_dim, dtype=shared)
    back(call, made, ends, do, end=d_state, z=z, dv=dv, states=behind)

    if on_hopper.takes_channels(call):
        dq, dk = call.like(*call.q.shape), call.new(*tokens, call.head_dim, dtype=shared)
        dg = call.new(*tokens, call.head_dim)
        on_hopper.channels(call, made, (u, z, do, before, behind), (dq, dk, dg, dbeta))
        return Gradients(dq, dk, dv, dg if decays else None, dbeta, d_state)
    dq = call.new(*call.q.shape, dtype=torch.float32 if call.channels else call.q.dtype)
    dk = call.new(*tokens, call.head_dim, dtype=torch.float32 if call.channels else shared)
    dg = da = db = None
    if made.a is not None:
        dg, da = call.new(call.rows, call.chunks * call.chunk, call.head_dim), empty_like(made.a)
        db = empty_like(da) if corrects else None
    elif decays:
        dg = call.new(*tokens)
    states, found = (u, z, do, before, behind), (dq, dk, dg, dbeta)
    if on_hopper.takes(call):
        on_hopper.gradients(call, made, states, found)
    else:
        tile = call.tile("gradients")
        unit, steps = _steps(call.q, call.k, call.v, do)
        arguments = (
            call.q, call.k, call.v, made.g, made.beta, made.b, *states, *found, da, db, *steps, *call.sizes,
            call.scale, *constants(call, tile.columns), unit, INTERPRETED,
        )  # fmt: skip
        launch(gradient_kernels.gradients, call.rows * call.chunks, arguments, **tile.options)
    if call.channels:
        dq, dk, dg = _inner(call, made, (da, db), (dq, dk, dg), shared, decays)
    return Gradients(dq, dk, dv, dg, dbeta, d_state)


def _inner(
    call: Call, made: Prepared, pairs: tuple[Tensor | None, Tensor | None], parts: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype, decays: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk and dg, whole. dtype: of dk."""
    dq, dk = call.like(*call.q.shape), call.new(*parts[1].shape, dtype=dtype)
    dg = call.new(*parts[1].shape) if decays else None
    unit, steps = _steps(call.q, call.k)
    for moderate, tile in ((True, call.tile("inner")), (False, call.tile("inner blocks"))):
        arguments = (
            call.q, call.k, made.g, *pairs, *parts, dq, dk, dg, *steps, *call.sizes, call.head_dim, tile.columns,
            call.chunk, moderate, unit, INTERPRETED,
        )  # fmt: skip
        launch(inners.inner, call.rows * call.chunks * cdiv(call.head_dim, tile.columns), arguments, **tile.options)
    return dq, dk, dg


def shared(grad: Tensor, of: Tensor) -> Tensor:
    """The gradient of what heads share, from one for each of them."""
    return grad if grad.shape == of.shape else grad.unflatten(1, (of.shape[1], -1)).sum(2).to(of.dtype)


def back(
    call: Call, made: Prepared, starts: Tensor | None, do: Tensor, *, end: Tensor | None = None,
    z: Tensor | None = None, dv: Tensor | None = None, states: Tensor | None = None,
    local: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> None:  # fmt: skip
    """As `walk`, from the end."""
    if hopper.takes(call) if local is None else hopper.takes_segments(call):
        hopper.back(call, made, starts, do, end=end, z=z, dv=dv, states=states, local=local)
        return
    tile = call.tile("back")
    end, totals, transition = (end, None, None) if local is None else local
    unit, steps = _steps(made.q, call.k if made.k_out is None else made.k_out, do)
    segments = call.segments - (local is not None)
    arguments = (
        made.q, made.k, made.k_out, do, made.ends, made.fades, made.beta, made.t, made.a, z, dv, starts, end,
        transition, totals, states, *steps, *call.sizes, segments, cdiv(call.chunks, call.segments), call.scale,
        *constants(call, tile.columns), call.even, unit, INTERPRETED,
    )  # fmt: skip
    programs = call.rows * segments * tiles_of(call, tile.columns, transition)
    launch(backs.back, programs, arguments, **tile.options)
