"""What the walks in Gluon share."""

from __future__ import annotations

from manyheads.engines.triton.chunked.kernels import common
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

FORGOTTEN, SEEN = gl.constexpr(common.FORGOTTEN.value), gl.constexpr(common.SEEN.value)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def remembered_from(FADES, chunks, begin, stop, BACKWARDS: gl.constexpr):
    """As in common.py."""
    at = stop - 1 - gl.arange(0, SEEN, gl.BlockedLayout([2], [32], [4], [0]))
    there = at >= begin
    fades = gl.load(FADES + (chunks - 1 - at if BACKWARDS else at), mask=there, other=0.0)
    least = gl.where(gl.load(FADES + chunks) > 0.0, float("-inf"), FORGOTTEN)
    gone = there & (gl.associative_scan(fades, 0, add) < least)
    return gl.max(gl.where(gone, at, begin), 0), gl.max(gone.to(gl.int32), 0) > 0


@gluon.jit
def work_of(heads, segments, per, chunks, ALL: gl.constexpr):
    """What a program does, in a grid of ALL tiles for each segment of each head: its tile; the head, with its row and
    by itself; the segment, and the chunks where it begins and stops."""
    segment = gl.program_id(0) // ALL % segments
    bh = gl.program_id(0) // ALL // segments
    begin = segment * per
    return gl.program_id(0) % ALL, bh, bh // heads, bh % heads, segment, begin, gl.minimum(begin + per, chunks)


@gluon.jit
def state_before(START, near, far, same, other):
    """A consumer's part of a state before the first chunk, 0 where nothing was. The program for TRANSITION (`other`)
    adds the identity: where v = 0, S is then what the segment makes of the state before it."""
    if START is None:
        S = gl.full(same.shape, 0.0, gl.float32, same.type.layout)
    else:
        S = gl.load(START + near + far).to(gl.float32)
    if other is not None:  # noqa: SIM102  known when it is compiled
        if other:
            S += gl.where(same, 1.0, 0.0)
    return S


@gluon.jit
def turned(x, layout: gl.constexpr):
    """A chunk [tokens, values], the other way round, in float32."""
    return x.reshape([x.shape[2], x.shape[3]]).permute((1, 0)).load(layout).to(gl.float32)


@gluon.jit
def place_of(column, HALF: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr):
    """Where the numbers of a consumer's part lie in a state [D, DV], as a sum, and which are on the diagonal. Of the
    sum a thread has one `near`, and `far` are constants of the machine code."""
    values = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, layout)), 1)
    keys = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, layout)), 0)
    near = (keys & 6) * DV + (values & ~8) + column
    return near, (keys & ~6) * DV + (values & 8), keys == values + column


@gluon.jit
def pairs(
    slots, inner, begin, stop, scale, DECAYS: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """A warp group's work: A_ij = scale q_i.k_j e^(G_i - G_j) where j <= i of each chunk, [queries, keys], or TURNED.
    No scale: 1."""
    qs, ks, _, gs, _, full, free = slots
    inners, inner_full, inner_free = inner
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    zero = gl.full([C, C], 0.0, gl.float32, layout)
    row = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    for step in range(0, stop - begin):
        slot = step % STAGES
        a = step % AHEAD
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        if TURNED:
            later = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        else:
            later = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        inside = row <= column if TURNED else column <= row
        if DECAYS:
            above = gs.index(slot).load(layout)
            beside = gs.index(slot).permute((1, 0)).load(layout)
            fade = above - beside if TURNED else beside - above
            product = warpgroup_mma_wait(0, deps=[later]) * gl.exp2(gl.where(inside, fade, float("-inf")))
        else:
            product = gl.where(inside, warpgroup_mma_wait(0, deps=[later]), 0.0)
        if scale is not None:
            product = product * scale
        mbarrier.arrive(free.index(slot))
        mbarrier.wait(inner_free.index(a), ((step // AHEAD) & 1) ^ 1)
        inners.index(a).store(product.to(inners.dtype))
        fence_async_shared()
        mbarrier.arrive(inner_full.index(a))
