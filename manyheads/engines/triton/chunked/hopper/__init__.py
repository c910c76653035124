"""Walks on Hopper GPUs, in Gluon: where they are taken, and what is launched."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv, is_hopper
from manyheads.engines.triton.hopper import MISSING
from manyheads.engines.triton.launch import INTERPRETED

if MISSING is None:
    from manyheads.engines.triton.chunked.hopper.kernels import back as backs
    from manyheads.engines.triton.chunked.hopper.kernels import fused as fuseds
    from manyheads.engines.triton.chunked.hopper.kernels import walk as walks
    from manyheads.engines.triton.hopper.launching import descriptor, kind_of

if TYPE_CHECKING:  # it asks here how many segments there are
    from manyheads.engines.triton.chunked.backward import Gradients
    from manyheads.engines.triton.chunked.call import Call, Prepared

HALF = 64  # values of a state that a warp group holds
KEYS, VALUES = (64, 128), (64, 128, 256)
STAGES, BACK_STAGES = 3, 2  # where channels decay by themselves, BACK_STAGES in both
OPTIONS = {"num_warps": 4}

Added = tuple[Tensor, Tensor, Tensor | None]  # what segments add to a state, totals, and what they make of it


def takes(call: Call) -> bool:
    """Whether the walks here have what a call needs: features of certain numbers, two bytes, and a query for each key,
    as the hardware stores no box that begins before a tensor. Where channels decay by themselves both ways are taken,
    with all segments, or neither: the plain ones are given other things."""
    if not narrow(call) or call.head_dim not in KEYS or call.v_head_dim not in VALUES or call.ahead:
        return False
    if call.g is None or not call.channels:
        return True
    return call.g.dtype.itemsize <= 4 and call.v_head_dim <= 2 * HALF and _whole(call)


def takes_segments(call: Call) -> bool:
    """Whether they have what a segment makes of a state before it."""
    return takes(call) and _whole(call)


def _whole(call: Call) -> bool:
    """Where writes correct, that is [head_dim, head_dim], and is made as if it were a state."""
    return call.beta is None or call.head_dim == call.v_head_dim == 2 * HALF


def fits(call: Call) -> bool:
    """What all other kernels ask for: two bytes for each number, and decays of whole steps."""
    return narrow(call) and not call.channels


def narrow(call: Call) -> bool:
    """Whether it is a Hopper's, and has two bytes for each number."""
    same = call.q.dtype == call.k.dtype == call.v.dtype
    return _hopper(call.q.device) and same and call.q.element_size() == 2


def _hopper(device: torch.device) -> bool:
    return MISSING is None and not INTERPRETED and is_hopper(device)


def walk(
    call: Call, made: Prepared, starts: Tensor | None, *, o: Tensor | None = None, end: Tensor | None = None,
    u: Tensor | None = None, states: Tensor | None = None, local: Added | None = None,
) -> None:  # fmt: skip
    """As forward.walk, for what `takes` let pass. Descriptors of what is not there are those of something else."""
    k = descriptor(call.k, call.chunk)
    _walk(call, made, k if o is None else descriptor(call.q, call.chunk), k, call.v, starts, o, end, u, states, local)


def _walk(
    call: Call, made: Prepared, q: quick.Box, k: quick.Box, values: Tensor, starts: Tensor | None,
    o: Tensor | None, end: Tensor | None, u: Tensor | None, states: Tensor | None, local: Added | None,
    backwards: bool = False,
) -> None:  # fmt: skip
    end, totals, transition = (end, None, None) if local is None else local
    v = _half(values, call.chunk)
    out = o if o is not None else u
    found = made.ends if o is not None and finds_ends(call, made) else None
    own = (
        q, k, v, *_sides(call, made), v if out is None else _half(out, call.chunk),
        v if states is None else _states(call, states), _ends(call, made), made.a, starts, end, transition, totals,
        None if local is None else made.fades, found, call.heads, 1 if backwards else call.group,
        *_spans(call, local), call.scale, call.v_head_dim, BACK_STAGES if call.channels else STAGES, o is not None,
        states is not None, backwards, call.g is not None, made.t is not None,
    )  # fmt: skip
    quick.launch(walks.walk, _programs(call, local), own, **OPTIONS)


def back(
    call: Call, made: Prepared, starts: Tensor | None, do: Tensor, *, end: Tensor | None = None,
    z: Tensor | None = None, dv: Tensor | None = None, states: Tensor | None = None, local: Added | None = None,
) -> None:  # fmt: skip
    """As backward.back, for what `takes` let pass."""
    q, half = descriptor(call.q, call.chunk), _half(do, call.chunk)
    if local is not None and call.beta is None:
        return _walk(call, made, q, q, do, None, None, None, None, None, local, backwards=True)
    end, totals, transition = (end, None, None) if local is None else local
    own = (
        q, descriptor(call.k, call.chunk), half, *_sides(call, made),
        half if z is None else _half(z, call.chunk), half if dv is None else _half(dv, call.chunk),
        half if states is None else _states(call, states), _ends(call, made), made.a, starts, end, transition, totals,
        None if local is None else made.fades, call.heads, call.group, *_spans(call, local), call.scale,
        call.v_head_dim, BACK_STAGES, call.g is not None, made.t is not None,
    )  # fmt: skip
    return quick.launch(backs.back, _programs(call, local), own, **OPTIONS)


def takes_fused(call: Call) -> bool:
    """Whether `fused` has what a call needs. What is written has to have float32's range: dbeta is of u / beta."""
    wide = call.head_dim == call.v_head_dim == 2 * HALF
    return takes(call) and fits(call) and wide and (call.beta is None or call.q.dtype == torch.bfloat16)


def fused(
    call: Call, made: Prepared, starts: Tensor | None, u: Tensor, states: Tensor, do: Tensor, found: Gradients
) -> None:
    """`back` and `gradients` at once, into `found`. starts: as in backward.back. u: v where writes add. states: those
    before each chunk."""
    chunk, half = call.chunk, _half(do, call.chunk)
    own = (
        descriptor(call.q, chunk), descriptor(call.k, chunk), half, *_sides(call, made), _half(u, chunk),
        _states(call, states), _half(found.v, chunk), descriptor(found.q, chunk), descriptor(found.k, chunk), starts,
        found.state, found.g, found.beta, call.heads, call.group, *_spans(call, None), call.kv_len, call.scale,
        call.v_head_dim, BACK_STAGES, made.g is not None, made.t is not None,
    )  # fmt: skip
    quick.launch(fuseds.fused, _programs(call, None), own, **OPTIONS)


def _spans(call: Call, local: Added | None) -> tuple[int, int, int]:
    """Segments that are walked, chunks of each, and of all."""
    return call.segments - (local is not None), cdiv(call.chunks, call.segments), call.chunks


def _programs(call: Call, local: Added | None) -> int:
    tiles = cdiv(call.v_head_dim, 2 * HALF) + (local is not None and local[2] is not None)
    return call.rows * (call.segments - (local is not None)) * tiles


def _half(x: Tensor, rows: int) -> quick.Box:
    """As `descriptor`, of boxes of HALF values."""
    box = descriptor(x, rows)
    return box._replace(kind=kind_of((1, 1, rows, HALF), x.dtype))


def _states(call: Call, states: Tensor) -> quick.Box:
    """Of a state for each chunk."""
    return _flat(states, (call.rows * call.chunks, call.head_dim, call.v_head_dim), (1, call.head_dim, HALF))


def _sides(call: Call, made: Prepared) -> tuple[quick.Box, quick.Box, quick.Box]:
    """T, decays and strengths of each chunk. Decays are sums, but those of channels are as they came."""
    chunk, chunks = call.chunk, call.rows * call.chunks
    t = None if made.t is None else _flat(made.t, (chunks * chunk, chunk), (chunk, chunk))
    beta = None if made.beta is None else _flat(made.beta, (chunks, chunk), (1, chunk))
    if call.g is not None and call.channels:
        g = descriptor(call.g, chunk)
    else:
        g = None if made.g is None else _flat(made.g, (chunks, chunk), (1, chunk))
    spare = g or beta or descriptor(call.k, chunk)
    return t or spare, g or spare, beta or spare


def _ends(call: Call, made: Prepared) -> quick.Box | None:
    """The last sums of each chunk, where channels decay by themselves."""
    if made.ends is None or not call.channels or finds_ends(call, made):
        return None
    return _flat(made.ends, (call.rows * call.chunks, call.head_dim), (1, call.head_dim))


def finds_ends(call: Call, made: Prepared) -> bool:
    """Whether walks find the last sums of each chunk themselves, which the one for outputs leaves behind, and leave out
    what tokens of fast chunks read of each other, for `rapid` to add."""
    return call.channels and made.a is None


def _flat(x: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> quick.Box:
    """Of numbers that lie one behind the other."""
    strides = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
    return quick.Box(x, shape, strides, kind_of(block, x.dtype))
