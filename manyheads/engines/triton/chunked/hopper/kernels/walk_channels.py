"""`walk` in Gluon where each channel of the keys decays by itself, with the state turned round, [values, keys]. See
channels.py for what R and P are, and walk.py for the warp groups, of which one more prepares chunks.

    u' = (beta (v' - (S' e^R) (k e^(G - R))')) T',   o' = scale ((S' e^R) (q e^(G - R))' + u' A')
    S' <- e^(G_end - P) (e^P S' + u' (k e^(P - G)))
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.channels import keys_out, prepare, producer
from manyheads.engines.triton.chunked.hopper.kernels.parts import (
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
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _consumer(
    given, vs, out, kept, column, DV: gl.constexpr, OUTPUTS: gl.constexpr, STATES: gl.constexpr, LOCAL: gl.constexpr,
    CORRECTS: gl.constexpr,
):  # fmt: skip
    out_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale = given
    qs, ks, gs, _, ts, betas, scales, full, ready, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, _ = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = vs.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    channels: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = out_desc.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    total = gl.full([D], 1.0, gl.float32, channels)
    for n in range(begin, stop):
        step = n - begin
        slot = step % STAGES
        if STATES:
            rounded = S.to(dtype)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([C, D])
        rise = gl.expand_dims(scales.index(2 * slot).load(channels), 0)
        S16 = gl.convert_layout((S * rise).to(dtype), left)
        if CORRECTS:
            seen_later = warpgroup_mma(S16, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUTPUTS:
            q = qs.index(slot).reshape([C, D]).permute((1, 0))
            o_later = warpgroup_mma(S16, q, zero, use_acc=False, is_async=True)
        if STATES:
            tma_store_wait(1 if CORRECTS else 0)
            kept.reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + n, 0, column], kept)
        if CORRECTS:
            if OUTPUTS:  # for both, as S16 is then done with: registers are short
                u, o = warpgroup_mma_wait(0, deps=[seen_later, o_later])
            else:
                u = warpgroup_mma_wait(0, deps=[seen_later])
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
        if CORRECTS:
            u = warpgroup_mma_wait(0, deps=[u_later])
        first = scales.index(2 * slot + 1).load(channels)
        S = S * gl.expand_dims(first, 0)
        if LOCAL and not CORRECTS:
            total = total * first * scales.index(2 * slot).load(channels)
        u16 = u.to(dtype)
        k_out = keys_out(gs, ks, slot)
        S_later = warpgroup_mma(gl.convert_layout(u16, s_left), k_out, S, is_async=True)
        if OUTPUTS:
            a = step % AHEAD
            mbarrier.wait(inner_full.index(a), (step // AHEAD) & 1)
            o_later = warpgroup_mma(gl.convert_layout(u16, left), inners.index(a), o, is_async=True)
            S, o = warpgroup_mma_wait(0, deps=[S_later, o_later])
            mbarrier.arrive(inner_free.index(a))
            u16 = (o * scale).to(dtype)
        else:
            S = warpgroup_mma_wait(0, deps=[S_later])
        S = S * gl.expand_dims(scales.index(2 * slot).load(channels), 0)
        mbarrier.arrive(free.index(slot))
        if OUTPUTS or (CORRECTS and not LOCAL):
            tma_store_wait(1 if STATES else 0)
            out.reshape([C, HALF]).permute((1, 0)).store(u16)
            fence_async_shared()
            tma_store(out_desc, [b, h, n * C, column], out)
    tma_store_wait(0)
    if END is not None:  # noqa: SIM102  known when it is compiled
        if kept_end:
            gl.store(END + near + far, S)
    if LOCAL and not CORRECTS:  # noqa: SIM102  as before
        if column == 0:
            gl.store(TOTALS + gl.arange(0, D, channels), gl.log2(total))


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def walk_channels(
    q_desc, k_desc, v_desc, t_desc, g_desc, ends_desc, beta_desc, out_desc, states_desc, A, START, END, TRANSITION,
    TOTALS, FADES, heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    OUTPUTS: gl.constexpr, STATES: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel. OUTPUTS: out is o; else it is u, if writes correct. STATES:
    those before each chunk are wanted. Descriptors of what is not there may be any. A is read of chunks with a channel
    that is not moderate."""
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
        TOTALS += place * (1 if CORRECTS else D)
        begin, forgotten = remembered_from(FADES + bh.to(gl.int64) * (chunks + 1), chunks, begin, stop, False)
        if TRANSITION is not None:
            gl.store(TOTALS, gl.where(forgotten, float("-inf"), 0.0))
            if other:
                END = TRANSITION + place * (D * DV)
                if forgotten:
                    return
    elif END is not None:
        END += bh.to(gl.int64) * (D * DV)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], k_desc.layout)
    gs = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, C, D], g_desc.layout)
    ends = gl.allocate_shared_memory(gl.float32, [STAGES, 1, D], ends_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [2 * STAGES, D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(ready.index(slot), count=1)
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
    inner = (ks, full, free)
    if OUTPUTS:
        inners = gl.allocate_shared_memory(dtype, [2, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        inner_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        inner_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for a in gl.static_range(2):
            mbarrier.init(inner_full.index(a), count=1)
            mbarrier.init(inner_free.index(a), count=HALVES)
        inner = (inners, inner_full, inner_free)
    slots = (qs, ks, gs, ends, ts, betas, scales, full, ready, free)
    span = (line, begin, stop, chunks)
    kv_head = h // group
    loaded = (
        q_desc, k_desc, v_desc, t_desc, g_desc, ends_desc, beta_desc, slots, span, b, h, kv_head, kv_head,
    )  # fmt: skip
    given = (out_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, CORRECTS)),
                (_consumer, (given, v1s, out1, kept1, column + HALF, DV, OUTPUTS, STATES, LOCAL, CORRECTS)),
                (prepare, (slots, inner, A, span, None, OUTPUTS, OUTPUTS, False)),
                (producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, False, CORRECTS)),
            ],
            [4, 4, 4],
            [200, 88, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (given, v0s, out0, kept0, column, DV, OUTPUTS, STATES, LOCAL, CORRECTS)),
                (prepare, (slots, inner, A, span, None, OUTPUTS, OUTPUTS, False)),
                (producer, (loaded, v0s, v1s, column, HALVES, OUTPUTS, False, CORRECTS)),
            ],
            [4, 4],
            [128, 24],
        )  # fmt: skip
