"""The way back in fused.py: two warp groups, each with 64 values of the state's gradient, turned round, [values, keys].

    du' = scale dO' A + (D' k') e^(G_end - G),   z' = du' T,   dv' = beta z'
    D' <- e^(G_end) D' + scale (dO' e^G) q - (dv' e^G) k

Where nothing is corrected dv is du. A chunk's A is made by one of them for both, and by the other one dq.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.parts import place_of, state_before, turned
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

# Barriers, but those of what there are STAGES of. FULL: the state before a chunk, u, T, D, dv, A and P are there; FREE:
# they were read. Q_READ: q was, by fused_chunks.py; WALKED: a chunk is done with here. At those from BOTH on both
# walkers arrive.
S_FULL, S_FREE, U_FULL, U_FREE, T_FULL, D_FREE, DV_FREE, A_FULL = (gl.constexpr(n) for n in range(8))
P_FULL, P_FREE, Q_READ = (gl.constexpr(n) for n in range(8, 11))
T_FREE, D_FULL, DV_FULL, A_FREE, WALKED = (gl.constexpr(n) for n in range(11, 16))
BOTH, BARRIERS = gl.constexpr(11), gl.constexpr(16)


@gluon.jit
def _meet(slots, inners, bars, step, scale, layout: gl.constexpr, GATED: gl.constexpr):
    """A_ij = scale q_i.k_j e^(G_i - G_j) where j <= i, of a chunk."""
    qs, ks, _, _, gs, _, full, _ = slots
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    slot = step % STAGES
    zero = gl.full([C, C], 0.0, gl.float32, layout)
    nought = step >> 24
    row = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, layout)) + nought, 1)
    column = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)) + nought, 0)
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    q = qs.index(slot).reshape([C, D])
    k = ks.index(slot).reshape([C, D])
    later = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if GATED:
        fade = gs.index(slot).permute((1, 0)).load(layout) - gs.index(slot).load(layout)
        fade = gl.exp2(gl.where(column <= row, fade, float("-inf"))) * scale
        product = warpgroup_mma_wait(0, deps=[later]) * fade
    else:
        product = gl.where(column <= row, warpgroup_mma_wait(0, deps=[later]) * scale, 0.0)
    inners.index(nought).store(product.to(inners.dtype))
    fence_async_shared()
    mbarrier.arrive(bars.index(A_FULL))


@gluon.jit
def _queries(
    slots, of_dq, bars, step, b, h, first, scale, layout: gl.constexpr, GATED: gl.constexpr, DECAYS: gl.constexpr,
):  # fmt: skip
    """dq of a chunk, by way of the queries' place."""
    qs, ks, do0s, do1s, gs, _, _, _ = slots
    dq_desc, s0s, s1s, pss, owns = of_dq
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = do0s.shape[4]
    slot = step % STAGES
    nought = step >> 24
    zero = gl.full([C, D], 0.0, gl.float32, layout)
    q = qs.index(slot).reshape([C, D])
    k = ks.index(slot).reshape([C, D])
    do0 = do0s.index(slot).reshape([C, HALF])
    do1 = do1s.index(slot).reshape([C, HALF])
    s0, s1 = s0s.index(nought).reshape([D, HALF]), s1s.index(nought).reshape([D, HALF])
    later = warpgroup_mma(do0, s0.permute((1, 0)), zero, use_acc=False, is_async=True)
    later = warpgroup_mma(do1, s1.permute((1, 0)), later, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[later]) * scale
    if GATED:
        dq = dq * gl.exp2(gs.index(slot).permute((1, 0)).load(layout))
    mbarrier.wait(bars.index(P_FULL), step & 1)
    later = warpgroup_mma(pss.index(0), k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[later])
    mbarrier.arrive(bars.index(P_FREE))
    if DECAYS:
        owns.index(step & 1).store(gl.sum(q.load(layout).to(gl.float32) * dq, 1))
    mbarrier.wait(bars.index(A_FREE), step & 1)  # the other walker has read q, too
    mbarrier.wait(bars.index(Q_READ), step & 1)
    q.store(dq.to(qs.dtype))
    fence_async_shared()
    tma_store(dq_desc, [b, h, first, 0], qs.index(slot))


@gluon.jit
def walker(
    given, half, of_dq, column, DV: gl.constexpr, GATED: gl.constexpr, CORRECTS: gl.constexpr, DECAYS: gl.constexpr,
    TURN: gl.constexpr,
):  # fmt: skip
    """half: of what is 128 values wide, those that it holds. TURN: 0 or 1, of every second chunk, whose dq it makes."""
    dv_desc, START, END, slots, ts, inners, bars, span, b, h, kept_end, scale = given
    dos, dvs, behind, before, us, kept, gone = half
    qs, ks, _, _, gs, betas, full, free = slots
    begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = dos.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dtype: gl.constexpr = ks.dtype
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    zero = gl.full([HALF, C], 0.0, gl.float32, layout)
    tokens = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    near, far, same = place_of(column, HALF, D, DV, s_layout)
    S = state_before(START, near, far, same, None)
    if TURN == 0:
        _meet(slots, inners, bars, 0, scale, layout, GATED)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        slot = step % STAGES
        nought = step >> 24
        rounded = behind.index(nought).reshape([D, HALF]).permute((1, 0))
        mbarrier.wait(bars.index(D_FREE), (step & 1) ^ 1)
        rounded.store(S.to(dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(D_FULL))
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        du_later = warpgroup_mma(rounded, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        do = turned(dos.index(slot), layout)
        do16 = gl.convert_layout(do.to(dtype), left)
        do = do * scale
        if GATED:
            sum_g = gs.index(slot).load(layout)
            end = gl.sum(gl.where(tokens == C - 1, sum_g, 0.0), 1)
            S = S * gl.expand_dims(gl.exp2(gl.convert_layout(end, gl.SliceLayout(1, s_layout))), 1)
            do = do * gl.exp2(sum_g)
        S_later = warpgroup_mma(gl.convert_layout(do.to(dtype), s_left), q, S, is_async=True)
        du = warpgroup_mma_wait(1, deps=[du_later])
        if GATED:
            du = du * gl.exp2(gl.expand_dims(end, 1) - gs.index(slot).load(layout))
        if DECAYS:
            mbarrier.wait(bars.index(U_FULL), step & 1)
            gone.index(step & 1).store(gl.sum(turned(us.index(nought), layout) * du, 1))
            mbarrier.arrive(bars.index(U_FREE))
        mbarrier.wait(bars.index(A_FULL), step & 1)
        du_later = warpgroup_mma(do16, inners.index(0), du, is_async=True)
        S, du = warpgroup_mma_wait(0, deps=[S_later, du_later])
        mbarrier.arrive(bars.index(A_FREE))
        if CORRECTS:
            mbarrier.wait(bars.index(T_FULL), step & 1)
            du16 = gl.convert_layout(du.to(dtype), left)
            du_later = warpgroup_mma(du16, ts.index(0), zero, use_acc=False, is_async=True)
            du = betas.index(slot).load(layout) * warpgroup_mma_wait(0, deps=[du_later])
            mbarrier.arrive(bars.index(T_FREE))
            fallen = du
            if GATED:
                fallen = du * gl.exp2(gs.index(slot).load(layout))
            S_later = warpgroup_mma(gl.convert_layout((-fallen).to(dtype), s_left), k, S, is_async=True)
        mbarrier.wait(bars.index(DV_FREE), (step & 1) ^ 1)
        tma_store_wait(0)
        if (step > 0) & (step % 2 != TURN):
            mbarrier.arrive(free.index((step + 1) % STAGES))
        dvs.index(nought).reshape([C, HALF]).permute((1, 0)).store(du.to(dtype))
        fence_async_shared()
        tma_store(dv_desc, [b, h, c * C, column], dvs.index(0))
        if CORRECTS:
            mbarrier.arrive(bars.index(DV_FULL))
        mbarrier.wait(bars.index(S_FULL), step & 1)
        if DECAYS:
            both = gl.full([32, HALF], 0.0, gl.float32, flat)
            for part in gl.static_range(D // 32):
                x = before.index(nought).reshape([D, HALF]).slice(part * 32, 32).load(flat).to(gl.float32)
                y = behind.index(nought).reshape([D, HALF]).slice(part * 32, 32).load(flat).to(gl.float32)
                both += x * y
            kept.index(step & 1).store(gl.sum(both, 1))
        if CORRECTS:
            S = warpgroup_mma_wait(0, deps=[S_later])
        if step % 2 == TURN:
            _queries(slots, of_dq, bars, step, b, h, c * C, scale, s_layout, GATED, DECAYS)
        mbarrier.arrive(bars.index(S_FREE))
        mbarrier.arrive(bars.index(WALKED))
        if (n + 1 < stop) & (step % 2 != TURN):
            mbarrier.wait(bars.index(A_FREE), step & 1)
            _meet(slots, inners, bars, step + 1, scale, layout, GATED)
    tma_store_wait(0)
    if kept_end:
        gl.store(END + near + far, S)
