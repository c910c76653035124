"""`walk` in Gluon, for Hopper GPUs: the same sums, with the state turned round, [values, keys].

    u' = (beta (v' - (S' k') e^G)) T',   o' = scale ((S' q') e^G + u' A'),   S' <- e^(G_end) S' + (u' e^(G_end - G)) k

A producer warp group loads chunks into STAGES slots. Consumers hold 64 values of the state each: what one product
gives is, rounded, the left side of the next one without leaving the registers, and they never wait for each other. One
more warp group makes A' for them, a chunk or two ahead.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.parts import (
    pairs,
    place_of,
    remembered_from,
    state_before,
    turned,
    work_of,
)
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _producer(
    given, v0s, v1s, column, HALVES: gl.constexpr, OUTPUTS: gl.constexpr,
    BACKWARDS: gl.constexpr, DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, slots, span, b, h, kv_head = given
    qs, ks, ts, gs, betas, full, free = slots
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = v0s.shape[4]
    ROWS: gl.constexpr = (D * (2 if OUTPUTS else 1) + HALVES * HALF + (C if CORRECTS else 0)) * 2
    BYTES: gl.constexpr = C * (ROWS + (4 if DECAYS else 0) + (4 if CORRECTS else 0))
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n if BACKWARDS else n
        slot = step % STAGES
        here = full.index(slot)
        mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(here, BYTES)
        tma_load(k_desc, [b, kv_head, c * C, 0], here, ks.index(slot))
        if OUTPUTS:
            tma_load(q_desc, [b, h, c * C, 0], here, qs.index(slot))
        tma_load(v_desc, [b, kv_head, c * C, column], here, v0s.index(slot))
        if HALVES == 2:
            tma_load(v_desc, [b, kv_head, c * C, column + HALF], here, v1s.index(slot))
        if CORRECTS:
            tma_load(t_desc, [(line + c) * C, 0], here, ts.index(slot))
            tma_load(beta_desc, [line + c, 0], here, betas.index(slot))
        if DECAYS:
            tma_load(g_desc, [line + c, 0], here, gs.index(slot))


@gluon.jit
def _consumer(
    given, vs, out, kept, column, DV: gl.constexpr, OUTPUTS: gl.constexpr, STATES: gl.constexpr, LOCAL: gl.constexpr,
    BACKWARDS: gl.constexpr, DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    out_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale = given
    qs, ks, ts, gs, betas, full, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = vs.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = out_desc.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    tokens = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    total = gl.full([1], 0.0, gl.float32, gl.SliceLayout(1, layout))
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n if BACKWARDS else n
        slot = step % STAGES
        rounded = S.to(dtype)
        S16 = gl.convert_layout(rounded, left)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([C, D])
        if CORRECTS:
            seen_later = warpgroup_mma(S16, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUTPUTS:
            q = qs.index(slot).reshape([C, D]).permute((1, 0))
            o_later = warpgroup_mma(S16, q, zero, use_acc=False, is_async=True)
        if STATES:
            tma_store_wait(1 if CORRECTS else 0)
            kept.reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + c, 0, column], kept)
        if CORRECTS:
            if OUTPUTS:  # for both, as S16 is then done with: registers are short
                u, o = warpgroup_mma_wait(0, deps=[seen_later, o_later])
            else:
                u = warpgroup_mma_wait(0, deps=[seen_later])
            if DECAYS:
                u = u * gl.exp2(gs.index(slot).load(layout))
            v = turned(vs.index(slot), layout)
            if LOCAL:
                v = gl.where(other, 0.0, v)
            u = betas.index(slot).load(layout) * (v - u)
            t = ts.index(slot).permute((1, 0))
            u_later = warpgroup_mma(gl.convert_layout(u.to(dtype), left), t, zero, use_acc=False, is_async=True)
        else:
            u = turned(vs.index(slot), layout)
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
        u16 = u.to(dtype)
        if DECAYS:
            u = u * gl.exp2(sum_g if BACKWARDS else gl.expand_dims(end, 1) - sum_g)
        if BACKWARDS:
            u = u * scale
        S_later = warpgroup_mma(gl.convert_layout(u.to(dtype), s_left), k, S, is_async=True)
        if OUTPUTS:
            a = step % AHEAD
            mbarrier.wait(inner_full.index(a), (step // AHEAD) & 1)
            o_later = warpgroup_mma(gl.convert_layout(u16, left), inners.index(a), o, is_async=True)
            S, o = warpgroup_mma_wait(0, deps=[S_later, o_later])
            mbarrier.arrive(free.index(slot))
            mbarrier.arrive(inner_free.index(a))
            u16 = (o * scale).to(dtype)
        else:
            S = warpgroup_mma_wait(0, deps=[S_later])
            mbarrier.arrive(free.index(slot))
        if OUTPUTS or (CORRECTS and not LOCAL):
            tma_store_wait(1 if STATES else 0)
            out.reshape([C, HALF]).permute((1, 0)).store(u16)
            fence_async_shared()
            tma_store(out_desc, [b, h, c * C, column], out)
    tma_store_wait(0)
    if END is not None:  # noqa: SIM102  known when it is compiled
        if kept_end:
            gl.store(END + near + far, S)
    if LOCAL and not CORRECTS:  # noqa: SIM102  as before
        if column == 0:
            gl.store(TOTALS + gl.arange(0, 1, gl.SliceLayout(1, layout)), total)


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def walk(
    q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, out_desc, states_desc, START, END, TRANSITION, TOTALS, FADES,
    heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr, OUTPUTS: gl.constexpr,
    STATES: gl.constexpr, BACKWARDS: gl.constexpr, DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel. OUTPUTS: out is o; else it is u, if writes correct. STATES:
    those before each chunk are wanted. Descriptors of what is not there may be any.

    BACKWARDS: from the end, with q for k and dO for v; TOTALS and END are then what the plain `back` makes of a segment
    where writes add."""
    C: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    HALF: gl.constexpr = v_desc.block_shape[3]
    LOCAL: gl.constexpr = TOTALS is not None
    dtype: gl.constexpr = k_desc.dtype
    HALVES: gl.constexpr = 1 if DV == HALF else 2
    TILES: gl.constexpr = DV // (HALVES * HALF)
    ALL: gl.constexpr = TILES if TRANSITION is None else TILES + 1
    tile, bh, b, h, segment, begin, stop = work_of(heads, segments, per, chunks, ALL)
    column = tile % TILES * (HALVES * HALF)
    other = tile == TILES  # a program for TRANSITION, [D, D], beside those for END; D is DV then
    line = bh * chunks
    kept_end = segment == segments - 1
    place = (bh * segments + segment).to(gl.int64)
    if START is not None:
        START += place * (D * DV)
    if LOCAL:
        kept_end = True
        END += place * (D * DV)
        TOTALS += place
        forgotten = False
        if FADES is not None:
            begin, forgotten = remembered_from(FADES + bh.to(gl.int64) * (chunks + 1), chunks, begin, stop, BACKWARDS)
        if TRANSITION is not None:
            gl.store(TOTALS, gl.where(forgotten, float("-inf"), 0.0))
            if other:
                END = TRANSITION + place * (D * DV)
                if forgotten:
                    return
    elif END is not None:
        END += bh.to(gl.int64) * (D * DV)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], k_desc.layout)
    v0s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], v_desc.layout)
    v1s = v0s
    if HALVES == 2:
        v1s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], v_desc.layout)
    qs = ks
    if OUTPUTS:
        qs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], q_desc.layout)
    ts = ks
    betas = ks
    if CORRECTS:
        ts = gl.allocate_shared_memory(dtype, [STAGES, C, C], t_desc.layout)
        betas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], beta_desc.layout)
    gs = ks
    if DECAYS:
        gs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], g_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=HALVES + (1 if OUTPUTS else 0))
    out0 = v0s
    out1 = v1s
    if OUTPUTS or (CORRECTS and not LOCAL):
        out0 = gl.allocate_shared_memory(dtype, [1, 1, C, HALF], out_desc.layout)
        if HALVES == 2:
            out1 = gl.allocate_shared_memory(dtype, [1, 1, C, HALF], out_desc.layout)
    kept0 = v0s
    kept1 = v1s
    if STATES:
        kept0 = gl.allocate_shared_memory(dtype, [1, D, HALF], states_desc.layout)
        if HALVES == 2:
            kept1 = gl.allocate_shared_memory(dtype, [1, D, HALF], states_desc.layout)
    slots = (qs, ks, ts, gs, betas, full, free)
    inner = (ks, full, free)
    if OUTPUTS:
        inners = gl.allocate_shared_memory(dtype, [2, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        inner_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        inner_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for a in gl.static_range(2):
            mbarrier.init(inner_full.index(a), count=1)
            mbarrier.init(inner_free.index(a), count=HALVES)
        inner = (inners, inner_full, inner_free)
    span = (line, begin, stop, chunks)
    loaded = (q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, slots, span, b, h, h // group)
    given = (out_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale)
    if OUTPUTS and HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (_consumer, (
                    given, v1s, out1, kept1, column + HALF, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (pairs, (slots, inner, begin, stop, None, DECAYS, True)),
                (_producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, BACKWARDS, DECAYS, CORRECTS)),
            ],
            [4, 4, 4],
            [200, 88, 24],
        )  # fmt: skip
    elif OUTPUTS:
        gl.warp_specialize(
            [
                (_consumer, (
                    given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (pairs, (slots, inner, begin, stop, None, DECAYS, True)),
                (_producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, BACKWARDS, DECAYS, CORRECTS)),
            ],
            [4, 4],
            [104, 24],
        )  # fmt: skip
    elif HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (_consumer, (
                    given, v1s, out1, kept1, column + HALF, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (_producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, BACKWARDS, DECAYS, CORRECTS)),
            ],
            [4, 4],
            [224, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, BACKWARDS, DECAYS, CORRECTS,
                )),
                (_producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, BACKWARDS, DECAYS, CORRECTS)),
            ],
            [4],
            [24],
        )  # fmt: skip
