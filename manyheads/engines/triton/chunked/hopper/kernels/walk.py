"""`walk` in Gluon, for Hopper GPUs: the same sums, with the state turned round, [values, keys]. See walking.py for the
warp groups.

    u' = (beta (v' - (S' k') e^G)) T',   o' = scale ((S' q') e^G + u' A'),   S' <- e^(G_end) S' + (u' e^(G_end - G)) k

Where each channel of the keys decays by itself, with R and P of channels.py:

    u' = (beta (v' - (S' e^R) (k e^(G - R))')) T',   o' = scale ((S' e^R) (q e^(G - R))' + u' A')
    S' <- e^R (e^P S' + u' (k e^(P - G)))
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
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _consumer(given, PART: gl.constexpr, DV: gl.constexpr, BACKWARDS: gl.constexpr):
    leaving, held, START, END, TOTALS, slots, inner, span, b, h, column, kept_end, other, scale = given
    out_desc, states_desc = leaving
    outs, kepts = held
    out, kept = outs[PART], kepts[PART]
    qs, ks, vs, ts, betas, gs, _, scales, full, ready, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = vs[PART].shape[4]
    OUTPUTS: gl.constexpr = qs is not None
    CORRECTS: gl.constexpr = ts is not None
    STATES: gl.constexpr = kept is not None
    LOCAL: gl.constexpr = TOTALS is not None
    CHANNELS: gl.constexpr = scales is not None
    DECAYS: gl.constexpr = gs is not None and not CHANNELS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    totals: gl.constexpr = gl.SliceLayout(0, s_layout) if CHANNELS else gl.SliceLayout(1, layout)
    dtype: gl.constexpr = ks.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    tokens = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    column += PART * HALF
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    total = gl.full([D if CHANNELS else 1], 1.0 if CHANNELS else 0.0, gl.float32, totals)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n if BACKWARDS else n
        slot = step % STAGES
        rounded = S.to(dtype)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([C, D])
        k_out = k
        if CHANNELS:
            mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
            S16 = gl.convert_layout(times(S, scales, 2 * slot).to(dtype), left)
            if not BACKWARDS:
                k_out = keys_out(gs, ks, slot)
        else:
            S16 = gl.convert_layout(rounded, left)
        if CORRECTS:
            seen_later = warpgroup_mma(S16, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUTPUTS:
            q = qs.index(slot).reshape([C, D]).permute((1, 0))
            o_later = warpgroup_mma(S16, q, zero, use_acc=False, is_async=True)
        if STATES:
            tma_store_wait(1 if CORRECTS else 0)
            kept.index(0).reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + c, 0, column], kept.index(0))
        if CORRECTS:
            if OUTPUTS:  # for both, as S16 is then done with: registers are short
                u, o = warpgroup_mma_wait(0, deps=[seen_later, o_later])
            else:
                u = warpgroup_mma_wait(0, deps=[seen_later])
            if DECAYS:
                u = u * gl.exp2(gs.index(slot).load(layout))
            v = turned(vs[PART].index(slot), layout)
            if LOCAL:
                v = gl.where(other, 0.0, v)
            u = betas.index(slot).load(layout) * (v - u)
            t = ts.index(slot).permute((1, 0))
            u_later = warpgroup_mma(gl.convert_layout(u.to(dtype), left), t, zero, use_acc=False, is_async=True)
        else:
            u = turned(vs[PART].index(slot), layout)
            if OUTPUTS:
                o = warpgroup_mma_wait(0, deps=[o_later])
        if DECAYS:
            sum_g = gs.index(slot).load(layout)
            end = gl.sum(gl.where(tokens == C - 1, sum_g, 0.0), 1)
            S = S * gl.expand_dims(gl.exp2(gl.convert_layout(end, gl.SliceLayout(1, s_layout))), 1)
            if OUTPUTS:
                o = o * gl.exp2(sum_g)
            if LOCAL:
                total += end
        if CORRECTS:
            u = warpgroup_mma_wait(0, deps=[u_later])
        if CHANNELS:
            S = times(S, scales, 2 * slot + 1)
            if LOCAL:
                total = total * scales.index(2 * slot + 1).load(totals) * scales.index(2 * slot).load(totals)
        u16 = u.to(dtype)
        if DECAYS:
            u = u * gl.exp2(sum_g if BACKWARDS else gl.expand_dims(end, 1) - sum_g)
        if BACKWARDS:
            u = u * scale
        S_later = warpgroup_mma(gl.convert_layout(u.to(dtype), s_left), k_out, S, is_async=True)
        if OUTPUTS:
            a = step % inners.shape[0]
            mbarrier.wait(inner_full.index(a), (step // inners.shape[0]) & 1)
            o_later = warpgroup_mma(gl.convert_layout(u16, left), inners.index(a), o, is_async=True)
            S, o = warpgroup_mma_wait(0, deps=[S_later, o_later])
        else:
            S = warpgroup_mma_wait(0, deps=[S_later])
        if CHANNELS:
            S = times(S, scales, 2 * slot)
        mbarrier.arrive(free.index(slot))
        if out is not None:
            if OUTPUTS:
                mbarrier.arrive(inner_free.index(a))
                u16 = (o * scale).to(dtype)
            tma_store_wait(1 if STATES else 0)
            out.index(0).reshape([C, HALF]).permute((1, 0)).store(u16)
            fence_async_shared()
            tma_store(out_desc, [b, h, c * C, column], out.index(0))
    tma_store_wait(0)
    if END is not None:  # noqa: SIM102  known when it is compiled
        if kept_end:
            gl.store(END + near + far, S)
    if LOCAL and not CORRECTS:  # noqa: SIM102  as before
        if column == 0:
            gl.store(TOTALS + gl.arange(0, total.shape[0], totals), gl.log2(total) if CHANNELS else total)


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def walk(
    q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, out_desc, states_desc, ends_desc, A, START, END, TRANSITION,
    TOTALS, FADES, ENDS, heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    OUTPUTS: gl.constexpr, STATES: gl.constexpr, BACKWARDS: gl.constexpr, DECAYS: gl.constexpr,
    CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel. OUTPUTS: out is o; else it is u, if writes correct. STATES:
    those before each chunk are wanted. Descriptors of what is not there may be any. Where channels decay by
    themselves A is read of chunks with a channel that is not moderate; without A they are left to others, and ENDS,
    where `ends_desc` would read, are filled.

    BACKWARDS: from the end, with q for k and dO for v; TOTALS and END are then what the plain `back` makes of a segment
    where writes add."""
    HALVES: gl.constexpr = 1 if v_desc.block_shape[3] == DV else 2
    outs = rooms(out_desc, 1, HALVES) if OUTPUTS or (CORRECTS and TOTALS is None) else (None, None)
    kepts = rooms(states_desc, 1, HALVES) if STATES else (None, None)
    boxes = (
        q_desc if OUTPUTS else None, k_desc, v_desc, t_desc if CORRECTS else None,
        g_desc if DECAYS else None, beta_desc if CORRECTS else None, ends_desc,
    )  # fmt: skip
    walking(
        _consumer, boxes, (out_desc, states_desc), (outs, kepts), A, (START, END, TRANSITION, TOTALS, FADES, ENDS),
        (heads, group, segments, per, chunks), scale, DV, STAGES, BACKWARDS,
    )  # fmt: skip
