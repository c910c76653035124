"""`back` in Gluon, for Hopper GPUs: the same sums, with the state's gradient turned round, [values, keys].

    du' = scale dO' A + (D' k') e^(G_end - G),   z' = du' T,   dv' = beta z'
    D' <- e^(G_end) D' + scale (dO' e^G) q - (dv' e^G) k

Warp groups as in walk.py.
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
    given, do0s, do1s, column, HALVES: gl.constexpr, DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, do_desc, t_desc, g_desc, beta_desc, slots, span, b, h, kv_head = given
    qs, ks, ts, gs, betas, full, free = slots
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = do0s.shape[4]
    ROWS: gl.constexpr = (2 * D + HALVES * HALF + (C if CORRECTS else 0)) * 2
    BYTES: gl.constexpr = C * (ROWS + (4 if DECAYS else 0) + (4 if CORRECTS else 0))
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        slot = step % STAGES
        here = full.index(slot)
        mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(here, BYTES)
        tma_load(k_desc, [b, kv_head, c * C, 0], here, ks.index(slot))
        tma_load(q_desc, [b, h, c * C, 0], here, qs.index(slot))
        tma_load(do_desc, [b, h, c * C, column], here, do0s.index(slot))
        if HALVES == 2:
            tma_load(do_desc, [b, h, c * C, column + HALF], here, do1s.index(slot))
        if CORRECTS:
            tma_load(t_desc, [(line + c) * C, 0], here, ts.index(slot))
            tma_load(beta_desc, [line + c, 0], here, betas.index(slot))
        if DECAYS:
            tma_load(g_desc, [line + c, 0], here, gs.index(slot))


@gluon.jit
def _consumer(
    given, dos, z_out, dv_out, kept, column, DV: gl.constexpr, LOCAL: gl.constexpr, DECAYS: gl.constexpr,
    CORRECTS: gl.constexpr,
):  # fmt: skip
    z_desc, dv_desc, states_desc, START, END, slots, inner, span, b, h, kept_end, other, scale = given
    qs, ks, ts, gs, betas, full, free = slots
    inners, inner_full, inner_free = inner
    line, begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = dos.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = states_desc.dtype
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    tokens = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, other)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        slot = step % STAGES
        a = step % AHEAD
        rounded = S.to(dtype)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        du_later = warpgroup_mma(
            gl.convert_layout(rounded, left), k.permute((1, 0)), zero, use_acc=False, is_async=True
        )
        if not LOCAL:
            tma_store_wait(2 if CORRECTS else 1)
            kept.reshape([D, HALF]).permute((1, 0)).store(rounded)
            fence_async_shared()
            tma_store(states_desc, [line + c, 0, column], kept)
        do = turned(dos.index(slot), layout)
        if LOCAL:
            do = gl.where(other, 0.0, do)
        do16 = gl.convert_layout(do.to(dtype), left)
        do = do * scale
        if DECAYS:
            sum_g = gs.index(slot).load(layout)
            end = gl.sum(gl.where(tokens == C - 1, sum_g, 0.0), 1)
            S = S * gl.expand_dims(gl.exp2(gl.convert_layout(end, gl.SliceLayout(1, s_layout))), 1)
            do = do * gl.exp2(sum_g)
        S_later = warpgroup_mma(gl.convert_layout(do.to(dtype), s_left), q, S, is_async=True)
        mbarrier.wait(inner_full.index(a), (step // AHEAD) & 1)
        du = warpgroup_mma_wait(1, deps=[du_later])
        if DECAYS:
            du = du * gl.exp2(gl.expand_dims(end, 1) - sum_g)
        du_later = warpgroup_mma(do16, inners.index(a), du, is_async=True)
        S, du = warpgroup_mma_wait(0, deps=[S_later, du_later])
        mbarrier.arrive(inner_free.index(a))
        if not LOCAL:
            tma_store_wait(1)
        if CORRECTS:
            du_later = warpgroup_mma(
                gl.convert_layout(du.to(dtype), left), ts.index(slot), zero, use_acc=False, is_async=True
            )
            du = warpgroup_mma_wait(0, deps=[du_later])
            z16 = du.to(dtype)
            du = betas.index(slot).load(layout) * du
            fallen = du
            if DECAYS:
                fallen = du * gl.exp2(gs.index(slot).load(layout))
            S_later = warpgroup_mma(gl.convert_layout((-fallen).to(dtype), s_left), k, S, is_async=True)
            if not LOCAL:
                z_out.reshape([C, HALF]).permute((1, 0)).store(z16)
        if not LOCAL:
            dv_out.reshape([C, HALF]).permute((1, 0)).store(du.to(dv_desc.dtype))
            fence_async_shared()
            if CORRECTS:
                tma_store(z_desc, [b, h, c * C, column], z_out)
            tma_store(dv_desc, [b, h, c * C, column], dv_out)
        if CORRECTS:
            S = warpgroup_mma_wait(0, deps=[S_later])
        mbarrier.arrive(free.index(slot))
    tma_store_wait(0)
    if kept_end:
        gl.store(END + near + far, S)


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks"])
def back(
    q_desc, k_desc, do_desc, t_desc, g_desc, beta_desc, z_desc, dv_desc, states_desc, START, END, TRANSITION,
    TOTALS, FADES, heads, group, segments, per, chunks, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    DECAYS: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks, as in the plain kernel: for Z, DV_ and STATES, or, with TOTALS, where writes correct,
    for what it adds. Descriptors of what is not there may be any."""
    C: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    HALF: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = k_desc.dtype
    LOCAL: gl.constexpr = TOTALS is not None
    HALVES: gl.constexpr = 1 if DV == HALF else 2
    TILES: gl.constexpr = DV // (HALVES * HALF)
    ALL: gl.constexpr = TILES + 1 if LOCAL else TILES
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
        forgotten = False
        if FADES is not None:
            begin, forgotten = remembered_from(FADES + bh.to(gl.int64) * (chunks + 1), chunks, begin, stop, True)
        gl.store(TOTALS + place, gl.where(forgotten, float("-inf"), 0.0))
        if other:
            END = TRANSITION + place * (D * DV)
            if forgotten:
                return
    else:
        END += bh.to(gl.int64) * (D * DV)
    qs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, D], k_desc.layout)
    do0s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], do_desc.layout)
    do1s = do0s
    if HALVES == 2:
        do1s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, HALF], do_desc.layout)
    dv0 = ks
    dv1 = ks
    kept0 = ks
    kept1 = ks
    if not LOCAL:
        dv0 = gl.allocate_shared_memory(dv_desc.dtype, [1, 1, C, HALF], dv_desc.layout)
        if HALVES == 2:
            dv1 = gl.allocate_shared_memory(dv_desc.dtype, [1, 1, C, HALF], dv_desc.layout)
        kept0 = gl.allocate_shared_memory(dtype, [1, D, HALF], states_desc.layout)
        if HALVES == 2:
            kept1 = gl.allocate_shared_memory(dtype, [1, D, HALF], states_desc.layout)
    inners = gl.allocate_shared_memory(dtype, [2, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))
    ts = ks
    betas = ks
    z0 = dv0
    z1 = dv1
    if CORRECTS:
        ts = gl.allocate_shared_memory(dtype, [STAGES, C, C], t_desc.layout)
        betas = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], beta_desc.layout)
        if not LOCAL:
            z0 = gl.allocate_shared_memory(dtype, [1, 1, C, HALF], z_desc.layout)
            if HALVES == 2:
                z1 = gl.allocate_shared_memory(dtype, [1, 1, C, HALF], z_desc.layout)
    gs = ks
    if DECAYS:
        gs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, C], g_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    inner_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    inner_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=HALVES + 1)
    for a in gl.static_range(2):
        mbarrier.init(inner_full.index(a), count=1)
        mbarrier.init(inner_free.index(a), count=HALVES)
    slots = (qs, ks, ts, gs, betas, full, free)
    inner = (inners, inner_full, inner_free)
    span = (line, begin, stop, chunks)
    loaded = (q_desc, k_desc, do_desc, t_desc, g_desc, beta_desc, slots, span, b, h, h // group)
    given = (z_desc, dv_desc, states_desc, START, END, slots, inner, span, b, h, kept_end, other, scale)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (given, do0s, z0, dv0, kept0, column, DV, LOCAL, DECAYS, CORRECTS)),
                (_consumer, (given, do1s, z1, dv1, kept1, column + HALF, DV, LOCAL, DECAYS, CORRECTS)),
                (pairs, (slots, inner, begin, stop, scale, DECAYS, False)),
                (_producer, (loaded, do0s, do1s, column, HALVES, DECAYS, CORRECTS)),
            ],
            [4, 4, 4],
            [200, 88, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (given, do0s, z0, dv0, kept0, column, DV, LOCAL, DECAYS, CORRECTS)),
                (pairs, (slots, inner, begin, stop, scale, DECAYS, False)),
                (_producer, (loaded, do0s, do1s, column, HALVES, DECAYS, CORRECTS)),
            ],
            [4, 4],
            [104, 24],
        )  # fmt: skip
