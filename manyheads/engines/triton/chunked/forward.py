"""Outputs and states: what is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from manyheads.engines.triton.blocks import cdiv, padded
from manyheads.engines.triton.chunked import hopper
from manyheads.engines.triton.chunked.call import Call, Prepared, fast_chunks, steps_of
from manyheads.engines.triton.chunked.kernels import step as steps_kernel
from manyheads.engines.triton.chunked.kernels import walk as walks
from manyheads.engines.triton.launch import INTERPRETED, _like, _steps
from manyheads.engines.triton.quick import launch

COLUMNS = 16  # of a state, where a program does nothing but read and write it
PRODUCTS = 32, 8  # columns and warps where it multiplies states, too

# Launches the walk through all segments but the last: (added, totals, transition).
Local = Callable[[Tensor, Tensor, Tensor | None], None]


def forward(call: Call, state: Tensor | None, made: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
    """o, the state behind the last token, and those at the beginning of each segment (None for one that is zero)."""
    o, end = _like(call.q, call.v_head_dim), call.new(*call.state)
    starts = starts_of(call, state, lambda *local: walk(call, made, None, local=local))
    walk(call, made, starts, o=o, end=end)
    if hopper.finds_ends(call, made):
        assert made.ends is not None, "the walk filled them"
        fast_chunks(call, made.ends, None, o=o)
    return o, end, starts


def step(call: Call, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for a single token."""
    o, end = call.like(call.batch, call.heads, 1, call.v_head_dim), call.new(*call.state)
    columns = min(COLUMNS, padded(call.v_head_dim))
    tensors = call.q, call.k, call.v, call.g, call.beta
    arguments: tuple[Any, ...] = (
        *tensors, None if state is None else state.contiguous(), o, end, *[s for t in tensors for s in steps_of(t)[:2]],
        call.heads, call.group, call.scale, call.head_dim, call.v_head_dim, padded(call.head_dim), columns,
        call.channels,
    )  # fmt: skip
    launch(steps_kernel.step, call.rows * cdiv(call.v_head_dim, columns), arguments, num_warps=4)
    return o, end


def starts_of(call: Call, state: Tensor | None, local: Local) -> Tensor | None:
    """The states at which segments begin, [rows, segments, head_dim, v_head_dim], in the order in which they are
    walked; `state` is the first."""
    state = None if state is None else state.contiguous()
    if call.segments == 1:
        return state
    _, _, head_dim, v_head_dim = call.state
    ahead = call.rows, call.segments - 1
    added, starts = call.new(*ahead, head_dim, v_head_dim), call.new(call.rows, call.segments, head_dim, v_head_dim)
    totals = call.new(*ahead, head_dim if call.channels and call.beta is None else 1)
    transition = None if call.beta is None else call.new(*ahead, head_dim, head_dim)
    local(added, totals, transition)
    columns, warps = (COLUMNS, 4) if transition is None else PRODUCTS
    columns = min(columns, padded(v_head_dim))
    arguments = (
        added, transition, totals, state, starts, call.segments, head_dim, v_head_dim, padded(head_dim), columns,
        call.channels, INTERPRETED,
    )  # fmt: skip
    launch(walks.carry, call.rows * cdiv(v_head_dim, columns), arguments, num_warps=warps, num_stages=1)
    return starts


def walk(
    call: Call, made: Prepared, starts: Tensor | None, *, o: Tensor | None = None, end: Tensor | None = None,
    u: Tensor | None = None, states: Tensor | None = None,
    local: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> None:  # fmt: skip
    """Through every segment, for outputs or for the states before each chunk; or, for `local`, all but the last."""
    if hopper.takes(call) if local is None else hopper.takes_segments(call):
        hopper.walk(call, made, starts, o=o, end=end, u=u, states=states, local=local)
        return
    tile = call.tile("walk")
    end, totals, transition = (end, None, None) if local is None else local
    unit, steps = _steps(made.q, call.k if made.k_out is None else made.k_out, call.v, made.q if o is None else o)
    segments = call.segments - (local is not None)
    arguments = (
        made.q, made.k, made.k_out, call.v, made.ends, made.fades, made.beta, made.t, made.a, o, u, starts, end,
        transition, totals, states, *steps, *call.sizes, segments, cdiv(call.chunks, call.segments), call.scale,
        *constants(call, tile.columns), call.even, unit, INTERPRETED,
    )  # fmt: skip
    programs = call.rows * segments * tiles_of(call, tile.columns, transition)
    launch(walks.walk, programs, arguments, **tile.options)


def tiles_of(call: Call, columns: int, transition: Tensor | None) -> int:
    """Of a state, and beside it of what becomes of the states before."""
    return cdiv(call.v_head_dim, columns) + (0 if transition is None else cdiv(padded(call.head_dim), columns))


def constants(call: Call, columns: int) -> tuple[Any, ...]:
    """From D to CHANNELS, in the kernels' order."""
    return call.head_dim, call.v_head_dim, padded(call.head_dim), columns, call.chunk, call.channels
