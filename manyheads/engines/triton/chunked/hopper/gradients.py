"""Gradients of chunks on Hopper GPUs, in Gluon: where they are taken, and what is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import multiprocessors
from manyheads.engines.triton.chunked import hopper
from manyheads.engines.triton.hopper import MISSING

if MISSING is None:
    from manyheads.engines.triton.chunked.hopper.kernels import gradients as kernels
    from manyheads.engines.triton.chunked.hopper.kernels import gradients_channels as of_channels
    from manyheads.engines.triton.hopper.launching import UNIT, descriptor, kind_of, wide

if TYPE_CHECKING:  # it asks here what to prepare
    from manyheads.engines.triton.chunked.call import Call, Prepared

LARGEST = 128  # of head_dim and v_head_dim: a chunk and a part of the next lie in shared memory
STAGES = 2  # of what is read until the end of a chunk


def takes(call: Call) -> bool:
    """Whether the kernel has what a call needs: features up to LARGEST, two bytes, decays of whole steps."""
    sizes = call.head_dim, call.v_head_dim
    return hopper.fits(call) and max(sizes) <= LARGEST and not any(size % UNIT for size in sizes)


def gradients(
    call: Call, made: Prepared, states: tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """states: u, z, do, the states and their gradients, of each chunk. found: dq, dk, dg and dbeta, to be filled."""
    u, z, do, before, behind = states
    dq, dk, dg, dbeta = found
    width, chunk = wide(call.head_dim), call.chunk
    v = descriptor(call.v, chunk)
    z, u = (v, v) if z is None or u is None else (descriptor(z, chunk), descriptor(u, chunk))
    shared = dk.dtype != dq.dtype  # by heads: float32
    boxes = (
        descriptor(before, width), descriptor(behind, width), z, v, u, descriptor(do, chunk),
        descriptor(call.k, chunk), descriptor(call.q, chunk), descriptor(dq, chunk),
        descriptor(dq if shared else dk, chunk),
    )  # fmt: skip
    total = call.rows * call.chunks
    arguments = (
        *boxes, made.g, made.beta, dq, dk if shared else None, dg, dbeta, total, call.chunks, *call.sizes, call.scale,
        call.head_dim, dbeta is not None, dg is not None, STAGES,
    )  # fmt: skip
    quick.launch(kernels.gradients, min(total, multiprocessors(call.q.device)), arguments, num_warps=4)


def takes_channels(call: Call) -> bool:
    """The same where channels decay by themselves. Gradients want float32's range, as dbeta is of u / beta."""
    return call.channels and hopper.takes(call) and call.q.dtype == torch.bfloat16


def channels(
    call: Call, made: Prepared, states: tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:  # fmt: skip
    """As `gradients`, for what `takes_channels` let pass, and all of them: `inner` has nothing to add."""
    assert call.g is not None and made.g is not None and made.ends is not None, "channels decay"
    u, z, do, before, behind = states
    dq, dk, dg, dbeta = found
    u = call.v if u is None else u
    tensors = before, behind, do, u, u if z is None else z, call.q, call.k, dq, dk
    tile = 1, 1, call.chunk, call.chunk
    boxes = (descriptor(x, call.chunk)._replace(kind=kind_of(tile, x.dtype)) for x in tensors)
    arguments = (
        *boxes, call.g, made.ends, made.g, made.beta, dg, dbeta, *call.g.stride()[:3], call.chunks, call.kv_len,
        call.heads, call.group, call.scale, call.head_dim, call.v_head_dim, dbeta is not None,
    )  # fmt: skip
    programs = call.rows * call.chunks * (call.head_dim // call.chunk)
    quick.launch(of_channels.gradients_channels, programs, arguments, num_warps=4)
