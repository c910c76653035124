"""Walks on Hopper GPUs, in Gluon, where each channel of the keys decays by itself: where they are taken, and what is
launched. They take q, k and log decays as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from manyheads.engines.triton import quick
from manyheads.engines.triton.chunked import hopper
from manyheads.engines.triton.hopper import MISSING

if MISSING is None:
    from manyheads.engines.triton.chunked.hopper.kernels import back_channels as backs
    from manyheads.engines.triton.chunked.hopper.kernels import walk_channels as walks
    from manyheads.engines.triton.hopper.launching import descriptor

if TYPE_CHECKING:
    from manyheads.engines.triton.chunked.call import Call, Prepared

STAGES = 2
VALUES = (64, 128)


def takes(call: Call) -> bool:
    """Whether the kernels here have what a call needs, for all of its walks: the plain ones are given other things."""
    if call.g is None or not call.channels or call.g.dtype.itemsize > 4 or call.ahead or not hopper.narrow(call):
        return False
    whole = call.beta is None or call.head_dim == call.v_head_dim == 2 * hopper.HALF
    return call.head_dim in hopper.KEYS and call.v_head_dim in VALUES and whole


def walk(
    call: Call, made: Prepared, starts: Tensor | None, *, o: Tensor | None = None, end: Tensor | None = None,
    u: Tensor | None = None, states: Tensor | None = None, local: hopper.Added | None = None,
) -> None:  # fmt: skip
    """As forward.walk, for what `takes` let pass."""
    end, totals, transition = (end, None, None) if local is None else local
    k, v = descriptor(call.k, call.chunk), hopper._half(call.v, call.chunk)
    out = o if o is not None else u
    own = (
        k if o is None else descriptor(call.q, call.chunk), k, v, *_sides(call, made),
        v if out is None else hopper._half(out, call.chunk), v if states is None else hopper._states(call, states),
        made.a, starts, end, transition, totals, None if local is None else made.fades, call.heads, call.group,
        *hopper._spans(call, local), call.scale, call.v_head_dim, STAGES, o is not None, states is not None,
        made.t is not None,
    )  # fmt: skip
    quick.launch(walks.walk_channels, hopper._programs(call, local), own, **hopper.OPTIONS)


def back(
    call: Call, made: Prepared, starts: Tensor | None, do: Tensor, *, end: Tensor | None = None,
    z: Tensor | None = None, dv: Tensor | None = None, states: Tensor | None = None, local: hopper.Added | None = None,
) -> None:  # fmt: skip
    """As backward.back, for what `takes` let pass."""
    end, totals, transition = (end, None, None) if local is None else local
    q, k, half = descriptor(call.q, call.chunk), descriptor(call.k, call.chunk), hopper._half(do, call.chunk)
    own = (
        q, k, half, *_sides(call, made), half if z is None else hopper._half(z, call.chunk),
        half if dv is None else hopper._half(dv, call.chunk), half if states is None else hopper._states(call, states),
        made.a, starts, end, transition, totals, None if local is None else made.fades, call.heads, call.group,
        *hopper._spans(call, local), call.scale, call.v_head_dim, STAGES, made.t is not None,
    )  # fmt: skip
    quick.launch(backs.back_channels, hopper._programs(call, local), own, **hopper.OPTIONS)


def _sides(call: Call, made: Prepared) -> tuple[quick.Box, quick.Box, quick.Box, quick.Box]:
    """T, decays, the last sums and strengths of each chunk."""
    assert call.g is not None and made.ends is not None, "channels decay"
    chunk, chunks = call.chunk, call.rows * call.chunks
    ends = hopper._flat(made.ends, (chunks, call.head_dim), (1, call.head_dim))
    t = ends if made.t is None else hopper._flat(made.t, (chunks * chunk, chunk), (chunk, chunk))
    beta = ends if made.beta is None else hopper._flat(made.beta, (chunks, chunk), (1, chunk))
    return t, descriptor(call.g, chunk), ends, beta
