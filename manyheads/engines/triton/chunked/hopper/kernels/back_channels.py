"""`back` in Gluon where each channel of the keys decays by itself, with the state's gradient turned round, [values,
keys]. See channels.py for what R and P are, and walk_channels.py for the warp groups.

    du' = scale dO' A + (D' e^R) (k e^(P - G))',   z' = du' T,   dv' = beta z'
    D' <- e^R (e^P D' + scale dO' (q e^(G - R)) - dv' (k e^(G - R)))
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
    given, dos, room, column, DV: gl.constexpr, LOCAL: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    z_desc, dv_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale = given
    qs, ks, gs, _, ts, betas, scales, full, ready, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = dos.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    WIDE: gl.constexpr = dv_desc.dtype == gl.float32
    MEETS: gl.constexpr = CORRECTS or not LOCAL
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    channels: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = ks.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    total = gl.full([D], 1.0, gl.float32, channels)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        slot = step % STAGES
        if not LOCAL:
            rounded = S.to(dtype)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        if MEETS:
            rise = gl.expand_dims(scales.index(2 * slot).load(channels), 0)
            k_out = keys_out(gs, ks, slot)
            du_later = warpgroup_mma(
                gl.convert_layout((S * rise).to(dtype), left), k_out.permute((1, 0)), zero, use_acc=False, is_async=True
            )
        if not LOCAL:
            kept = room._reinterpret(dtype, [1, D, HALF], states_desc.layout)
            tma_store_wait(0)
            kept.reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + c, 0, column], kept)
        do = turned(dos.index(slot), layout)
        if LOCAL:
            do = gl.where(other, 0.0, do)
        first = scales.index(2 * slot + 1).load(channels)
        S = S * gl.expand_dims(first, 0)
        if LOCAL and not CORRECTS:
            total = total * first * scales.index(2 * slot).load(channels)
        S_later = warpgroup_mma(gl.convert_layout((do * scale).to(dtype), s_left), q, S, is_async=True)
        if MEETS:
            a = step % AHEAD
            mbarrier.wait(inner_full.index(a), (step // AHEAD) & 1)
            du = warpgroup_mma_wait(1, deps=[du_later])
            do16 = gl.convert_layout(do.to(dtype), left)
            du_later = warpgroup_mma(do16, inners.index(a), du, is_async=True)
            S, du = warpgroup_mma_wait(0, deps=[S_later, du_later])
            mbarrier.arrive(inner_free.index(a))
        else:
            S = warpgroup_mma_wait(0, deps=[S_later])
        if not LOCAL:
            tma_store_wait(0)
        if CORRECTS:
            du_later = warpgroup_mma(
                gl.convert_layout(du.to(dtype), left), ts.index(slot), zero, use_acc=False, is_async=True
            )
            du = warpgroup_mma_wait(0, deps=[du_later])
            z16 = du.to(dtype)
            du = betas.index(slot).load(layout) * du
            S_later = warpgroup_mma(gl.convert_layout((-du).to(dtype), s_left), k, S, is_async=True)
            if not LOCAL:
                room.index(0).reshape([C, HALF]).permute((1, 0)).store(z16)
                if WIDE:  # there is room for one
                    fence_async_shared()
                    tma_store(z_desc, [b, h, c * C, column], room.index(0))
                    tma_store_wait(0)
        if not LOCAL:
            if WIDE:
                dv_out = room._reinterpret(gl.float32, [1, 1, C, HALF], dv_desc.layout)
            else:
                dv_out = room.index(1)
            dv_out.reshape([C, HALF]).permute((1, 0)).store(du.to(dv_desc.dtype))
            fence_async_shared()
            if CORRECTS and not WIDE:
                tma_store(z_desc, [b, h, c * C, column], room.index(0))
            tma_store(dv_desc, [b, h, c * C, column], dv_out)
        if CORRECTS:
            S = warpgroup_mma_wait(0, deps=[S_later])
        S = S * gl.expand_dims(scales.index(2 * slot).load(channels), 0)
        mbarrier.arrive(free.index(slot))
    tma_store_wait(0)
    if kept_end:
        gl.store(END + near + far, S)
    if LOCAL and not CORRECTS:  # noqa: SIM102  known when it is compiled
        if column == 0:
            gl.store(TOTALS + gl.arange(0, D, channels), gl.log2(total))


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def back_channels(
    q_desc, k_desc, do_desc, t_desc, g_desc, ends_desc, beta_desc, z_desc, dv_desc, states_desc, A, START, END,
    TRANSITION, TOTALS, FADES, heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel: for Z, DV_ and STATES, or, with TOTALS, for what it adds.
    Descriptors of what is not there may be any. A: as in walk_channels.py."""
    C: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    HALF: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = k_desc.dtype
    LOCAL: gl.constexpr = TOTALS is not None
    INNER: gl.constexpr = CORRECTS or not LOCAL
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
        begin, forgotten = remembered_from(FADES + bh.to(gl.int64) * (chunks + 1), chunks, begin, stop, True)
        if TRANSITION is not None:
            gl.store(TOTALS, gl.where(forgotten, float("-inf"), 0.0))
            if other:
                END = TRANSITION + place * (D * DV)
                if forgotten:
                    return
    else:
        END += bh.to(gl.int64) * (D * DV)
    qs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], k_desc.layout)
    gs = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, C, D], g_desc.layout)
    ends = gl.allocate_shared_memory(gl.float32, [STAGES, 1, D], ends_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [2 * STAGES, D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    do0s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], do_desc.layout)
    do1s = do0s
    if HALVES == 2:
        do1s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], do_desc.layout)
    ts = ks
    betas = ks
    if CORRECTS:
        ts = gl.allocate_shared_memory(dtype, [STAGES, C, C], t_desc.layout)
        betas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], beta_desc.layout)
    room0 = ks
    room1 = ks
    if not LOCAL:
        room0 = gl.allocate_shared_memory(dtype, [2, 1, 1, C, HALF], do_desc.layout)
        if HALVES == 2:
            room1 = gl.allocate_shared_memory(dtype, [2, 1, 1, C, HALF], do_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=HALVES + (1 if INNER else 0))
    inner = (ks, full, free)
    if INNER:
        inners = gl.allocate_shared_memory(dtype, [1, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
        inner_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        inner_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(inner_full.index(0), count=1)
        mbarrier.init(inner_free.index(0), count=HALVES)
        inner = (inners, inner_full, inner_free)
    slots = (qs, ks, gs, ends, ts, betas, scales, full, ready, free)
    span = (line, begin, stop, chunks)
    loaded = (
        q_desc, k_desc, do_desc, t_desc, g_desc, ends_desc, beta_desc, slots, span, b, h, h // group, h,
    )  # fmt: skip
    given = (z_desc, dv_desc, states_desc, START, END, TOTALS, slots, inner, span, b, h, kept_end, other, scale)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (given, do0s, room0, column, DV, LOCAL, CORRECTS)),
                (_consumer, (given, do1s, room1, column + HALF, DV, LOCAL, CORRECTS)),
                (prepare, (slots, inner, A, span, scale, True, INNER, True)),
                (producer, (loaded, do0s, do1s, column, HALVES, True, True, CORRECTS)),
            ],
            [4, 4, 4],
            [200, 88, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (given, do0s, room0, column, DV, LOCAL, CORRECTS)),
                (prepare, (slots, inner, A, span, scale, True, INNER, True)),
                (producer, (loaded, do0s, do1s, column, HALVES, True, True, CORRECTS)),
            ],
            [4, 4],
            [128, 24],
        )  # fmt: skip
