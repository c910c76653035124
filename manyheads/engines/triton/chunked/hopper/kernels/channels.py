"""What the walks in Gluon share where each channel of the keys decays by itself.

q, k and log decays come as they are. A warp group makes of them, chunk after chunk and in place, what the others
multiply:

    q e^(G - R), k e^(G - R)    where q and k were,    k e^(P - G)    where the decays were

R and P are half of G_end for a channel whose decays are moderate, as kernels/pairs.py has it, else 0 and G_end; so
G_end = R + P. A state, or its gradient, is multiplied by `scales` of each channel: by e^R where it meets q and k, by
e^P before something is added, and by e^R behind that. Where all channels of a chunk are moderate, A is one product,
which the same warp group makes; else `pairs` has left it in memory.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.parts import add
from manyheads.engines.triton.chunked.kernels import common, pairs
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E, LEAST_DECAY = gl.constexpr(common.LOG2E.value), gl.constexpr(common.LEAST_DECAY.value)
LEAST, LEAST_HALF = gl.constexpr(pairs.LEAST.value), gl.constexpr(pairs.LEAST_HALF.value)
PART = gl.constexpr(64)  # channels at a time: their decays' room takes all of the new keys


@gluon.jit
def keys_out(gs, ks, slot):
    """k e^(P - G), where the decays were."""
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    N: gl.constexpr = 2 if gs.dtype == gl.float32 else 1
    return reinterpret(gs.index(slot), ks.dtype, [N, 1, 1, C, D], ks.layout).index(0).reshape([C, D])


@gluon.jit
def times(S, scales, place):
    """A state, each of its channels times its scale."""
    return S * gl.expand_dims(scales.index(place).load(gl.SliceLayout(0, S.type.layout)), 0)


@gluon.jit
def prepare(slots, inner, A, ENDS, span, scale, BACKWARDS: gl.constexpr):
    """Where there is q, also A' of each chunk, [keys, queries]; BACKWARDS scale A, [queries, keys]. BACKWARDS without q
    k is q, and nobody asks for k e^(P - G)."""
    qs, ks, _, _, _, gs, ends, scales, full, ready, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    QUERIES: gl.constexpr = qs is not None
    KEYS_OUT: gl.constexpr = QUERIES or not BACKWARDS
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    dtype: gl.constexpr = ks.dtype
    layout: gl.constexpr = gl.BlockedLayout([16, 2], [1, 32], [4, 1], [1, 0])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    BOUND: gl.constexpr = LEAST_HALF if dtype == gl.float16 else LEAST
    zero = gl.full([C, C], 0.0, gl.float32, square)
    row = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, square)), 1)
    column = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, square)), 0)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n if BACKWARDS else n
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        out = keys_out(gs, ks, slot)
        k = ks.index(slot).reshape([C, D])
        q = qs.index(slot).reshape([C, D]) if QUERIES else None
        decays = gs.index(slot).reshape([C, D])
        low = 0.0
        for part in gl.static_range(D // PART):
            g = decays.slice(part * PART, PART, dim=1).load(layout).to(gl.float32) * LOG2E
            g = gl.where(g < LEAST_DECAY, LEAST_DECAY, g)
            sums = gl.associative_scan(g, 0, add)
            if ends is not None:
                end = ends.index(slot).reshape([D]).slice(part * PART, PART).load(gl.SliceLayout(0, layout))
            else:
                end = gl.sum(g, 0)
                if ENDS is not None:
                    channels = part * PART + gl.arange(0, PART, gl.SliceLayout(0, layout))
                    gl.store(ENDS + (line + c).to(gl.int64) * D + channels, end)
            low = gl.minimum(low, gl.min(end, 0))
            room = end >= BOUND
            half = gl.where(room, 0.5 * end, 0.0)
            whole = gl.where(room, half, end)
            left = gl.exp2(sums - gl.expand_dims(half, 0))
            right = gl.exp2(gl.expand_dims(whole, 0) - sums)
            k_part = k.slice(part * PART, PART, dim=1)
            keys = k_part.load(layout).to(gl.float32)
            k_part.store((keys * left).to(dtype))
            if KEYS_OUT:
                out.slice(part * PART, PART, dim=1).store((keys * right).to(dtype))
            if QUERIES:
                q_part = q.slice(part * PART, PART, dim=1)
                q_part.store((q_part.load(layout).to(gl.float32) * left).to(dtype))
            scales.index(2 * slot).slice(part * PART, PART).store(gl.exp2(half))
            scales.index(2 * slot + 1).slice(part * PART, PART).store(gl.exp2(whole))
        fence_async_shared()
        mbarrier.arrive(ready.index(slot))
        if QUERIES:
            a = step % inners.shape[0]
            if BACKWARDS:
                later = warpgroup_mma(q, out.permute((1, 0)), zero, use_acc=False, is_async=True)
                product = gl.where(column <= row, warpgroup_mma_wait(0, deps=[later]), 0.0)
                place = row * C + column
            else:
                later = warpgroup_mma(out, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                product = gl.where(row <= column, warpgroup_mma_wait(0, deps=[later]), 0.0)
                place = column * C + row
            mbarrier.arrive(free.index(slot))
            if low < BOUND:
                if A is not None:
                    product = gl.load(A + (line + c).to(gl.int64) * (C * C) + place).to(gl.float32)
                else:
                    product = zero
            if BACKWARDS:
                product = product * scale
            mbarrier.wait(inner_free.index(a), ((step // inners.shape[0]) & 1) ^ 1)
            inners.index(a).store(product.to(dtype))
            fence_async_shared()
            mbarrier.arrive(inner_full.index(a))
