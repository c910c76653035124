"""`back` in Gluon, for Hopper GPUs: the same sums, with the state's gradient turned round, [values, keys]. See
walking.py for the warp groups.

    du' = scale dO' A + (D' k') e^(G_end - G),   z' = du' T,   dv' = beta z'
    D' <- e^(G_end) D' + scale (dO' e^G) q - (dv' e^G) k

Where each channel of the keys decays by itself, with R and P of channels.py:

    du' = scale dO' A + (D' e^R) (k e^(P - G))',   z' = du' T,   dv' = beta z'
    D' <- e^R (e^P D' + scale dO' (q e^(G - R)) - dv' (k e^(G - R)))
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.channels import keys_out, times
from manyheads.engines.triton.chunked.hopper.kernels.parts import place_of, rooms, state_before, turned
from manyheads.engines.triton.chunked.hopper.kernels.walking import walking
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _consumer(given, PART: gl.constexpr, DV: gl.constexpr, BACKWARDS: gl.constexpr):
    leaving, held, START, END, TOTALS, slots, inner, span, b, h, column, kept_end, other, scale = given
    z_desc, dv_desc, states_desc = leaving
    qs, ks, dos, ts, betas, gs, _, scales, full, ready, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = dos[PART].shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    CORRECTS: gl.constexpr = ts is not None
    LOCAL: gl.constexpr = TOTALS is not None
    CHANNELS: gl.constexpr = scales is not None
    DECAYS: gl.constexpr = gs is not None and not CHANNELS
    WIDE: gl.constexpr = dv_desc.dtype == gl.float32
    TIGHT: gl.constexpr = CHANNELS and WIDE  # z has to leave before there is room for dv
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = ks.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    tokens = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    column += PART * HALF
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    if CHANNELS and not LOCAL:
        kept = reinterpret(held[PART], dtype, [2 * C // D, 1, D, HALF], states_desc.layout).index(0)
        z_out, dv_out = held[PART].index(0), held[PART].index(1)
        if WIDE:
            dv_out = reinterpret(held[PART], gl.float32, [1, 1, C, HALF], dv_desc.layout)
    elif not LOCAL:
        zs, dvs, kepts = held
        z_out, dv_out, kept = zs[PART].index(0) if CORRECTS else None, dvs[PART].index(0), kepts[PART].index(0)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        slot = step % STAGES
        a = step % AHEAD
        rounded = S.to(dtype)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        if CHANNELS:
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            S16 = gl.convert_layout(times(S, scales, 2 * slot).to(dtype), left)
            k_out = keys_out(gs, ks, slot)
        else:
            S16 = gl.convert_layout(rounded, left)
            k_out = k
        du_later = warpgroup_mma(S16, k_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        if not LOCAL:
            tma_store_wait(0 if CHANNELS else 2 if CORRECTS else 1)
            kept.reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + c, 0, column], kept)
        do = turned(dos[PART].index(slot), layout)
        if LOCAL:
            do = gl.where(other, 0.0, do)
        met = do * scale
        if DECAYS:
            sum_g = gs.index(slot).load(layout)
            end = gl.sum(gl.where(tokens == C - 1, sum_g, 0.0), 1)
            S = S * gl.expand_dims(gl.exp2(gl.convert_layout(end, gl.SliceLayout(1, s_layout))), 1)
            met = met * gl.exp2(sum_g)
        if CHANNELS:
            S = times(S, scales, 2 * slot + 1)
        S_later = warpgroup_mma(gl.convert_layout(met.to(dtype), s_left), q, S, is_async=True)
        mbarrier.wait(inner_full.index(a), (step // AHEAD) & 1)
        du = warpgroup_mma_wait(1, deps=[du_later])
        if DECAYS:
            du = du * gl.exp2(gl.expand_dims(end, 1) - sum_g)
        du_later = warpgroup_mma(gl.convert_layout(do.to(dtype), left), inners.index(a), du, is_async=True)
        S, du = warpgroup_mma_wait(0, deps=[S_later, du_later])
        mbarrier.arrive(inner_free.index(a))
        if not LOCAL:
            tma_store_wait(0 if CHANNELS else 1)
        if CORRECTS:
            du16 = gl.convert_layout(du.to(dtype), left)
            du_later = warpgroup_mma(du16, ts.index(slot), zero, use_acc=False, is_async=True)
            du = warpgroup_mma_wait(0, deps=[du_later])
            z16 = du.to(dtype)
            du = betas.index(slot).load(layout) * du
            fallen = du
            if DECAYS:
                fallen = du * gl.exp2(gs.index(slot).load(layout))
            S_later = warpgroup_mma(gl.convert_layout((-fallen).to(dtype), s_left), k, S, is_async=True)
            if not LOCAL:
                z_out.reshape([C, HALF]).permute((1, 0)).store(z16)
                if TIGHT:
                    fence_async_shared()
                    tma_store(z_desc, [b, h, c * C, column], z_out)
                    tma_store_wait(0)
        if not LOCAL:
            dv_out.reshape([C, HALF]).permute((1, 0)).store(du.to(dv_desc.dtype))
            fence_async_shared()
            if CORRECTS and not TIGHT:
                tma_store(z_desc, [b, h, c * C, column], z_out)
            tma_store(dv_desc, [b, h, c * C, column], dv_out)
        if CORRECTS:
            S = warpgroup_mma_wait(0, deps=[S_later])
        if CHANNELS:
            S = times(S, scales, 2 * slot)
        mbarrier.arrive(free.index(slot))
    tma_store_wait(0)
    if kept_end:
        gl.store(END + near + far, S)


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def back(
    q_desc, k_desc, do_desc, t_desc, g_desc, beta_desc, z_desc, dv_desc, states_desc, ends_desc, A, START, END,
    TRANSITION, TOTALS, FADES, heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel: for Z, DV_ and STATES, or, with TOTALS, where writes correct,
    for what it adds. Descriptors of what is not there may be any. ends_desc, A: as in walk.py."""
    HALVES: gl.constexpr = 1 if do_desc.block_shape[3] == DV else 2
    if TOTALS is not None:
        held = (None, None)
    elif ends_desc is not None:  # there is room for one state, or two of the others, or one in float32
        held = rooms(do_desc, 2, HALVES)
    else:
        zs = rooms(z_desc, 1, HALVES) if CORRECTS else (None, None)
        held = (zs, rooms(dv_desc, 1, HALVES), rooms(states_desc, 1, HALVES))
    boxes = (
        q_desc, k_desc, do_desc, t_desc if CORRECTS else None, g_desc if DECAYS else None,
        beta_desc if CORRECTS else None, ends_desc,
    )  # fmt: skip
    walking(
        _consumer, boxes, (z_desc, dv_desc, states_desc), held, A, (START, END, TRANSITION, TOTALS, FADES, None),
        (heads, group, segments, per, chunks), scale, DV, STAGES, True,
    )  # fmt: skip
