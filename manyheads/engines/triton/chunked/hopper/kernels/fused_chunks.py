"""dk, dbeta and dg of chunks in fused.py, by one warp group, one chunk after the other."""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.fused_walker import (
    D_FREE,
    D_FULL,
    DV_FREE,
    DV_FULL,
    P_FREE,
    P_FULL,
    Q_READ,
    S_FREE,
    U_FREE,
    U_FULL,
    WALKED,
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
def chunks_of(
    given, slots, single, behind, dvs, pss, bars, span, bh, b, h, kv_len, scale, GATED: gl.constexpr,
    CORRECTS: gl.constexpr, DECAYS: gl.constexpr,
):  # fmt: skip
    dk_desc, DG, DBETA, kept0, kept1, gone0, gone1, owns = given
    qs, ks, do0s, do1s, gs, betas, full, free = slots
    s0s, s1s, u0s, u1s, _ = single
    behind0s, behind1s = behind
    dv0s, dv1s = dvs
    begin, stop, chunks = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = do0s.shape[4]
    dtype: gl.constexpr = ks.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    lines: gl.constexpr = gl.SliceLayout(1, square)
    across: gl.constexpr = gl.SliceLayout(0, square)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    zero_wide = gl.full([C, D], 0.0, gl.float32, wide)
    zero = gl.full([C, C], 0.0, gl.float32, square)
    for n in range(begin, stop):
        step = n - begin
        turn = step & 1
        c = chunks - 1 - n
        first = c * C
        slot = step % STAGES
        nought = step >> 24
        i, j = gl.arange(0, C, lines) + nought, gl.arange(0, C, across) + nought
        s0, s1 = s0s.index(nought).reshape([D, HALF]), s1s.index(nought).reshape([D, HALF])
        u0, u1 = u0s.index(nought).reshape([C, HALF]), u1s.index(nought).reshape([C, HALF])
        behind0, behind1 = behind0s.index(nought).reshape([D, HALF]), behind1s.index(nought).reshape([D, HALF])
        dv0, dv1 = dv0s.index(nought).reshape([C, HALF]), dv1s.index(nought).reshape([C, HALF])
        ps = pss.index(nought)
        tokens = bh.to(gl.int64) * kv_len + first
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        do0 = do0s.index(slot).reshape([C, HALF])
        do1 = do1s.index(slot).reshape([C, HALF])
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        mbarrier.wait(bars.index(U_FULL), turn)
        da_later = warpgroup_mma(do0, u0.permute((1, 0)), zero, use_acc=False, is_async=True)
        da_later = warpgroup_mma(do1, u1.permute((1, 0)), da_later, is_async=True)
        tma_store_wait(0)
        if step > 0:
            mbarrier.arrive(free.index((step + 1) % STAGES))
        mbarrier.wait(bars.index(D_FULL), turn)
        dk_later = warpgroup_mma(u0, behind0.permute((1, 0)), zero_wide, use_acc=False, is_async=True)
        dk_later = warpgroup_mma(u1, behind1.permute((1, 0)), dk_later, is_async=True)
        da = warpgroup_mma_wait(2, deps=[da_later])
        if GATED:
            fade = gs.index(slot).permute((1, 0)).load(square) - gs.index(slot).load(square)
            da = da * (gl.exp2(gl.where(i[:, None] >= j[None, :], fade, float("-inf"))) * scale)
        else:
            da = gl.where(i[:, None] >= j[None, :], da * scale, 0.0)
        ps.store(da.to(dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(P_FULL))
        dk = warpgroup_mma_wait(0, deps=[dk_later])
        mbarrier.arrive(bars.index(D_FREE))
        if GATED:
            end = gl.sum(gl.where(j[None, :] == C - 1, gs.index(slot).load(square), 0.0), 1)
            end_wide = gl.expand_dims(gl.convert_layout(end, gl.SliceLayout(1, wide)), 1)
            dk = dk * gl.exp2(end_wide - gs.index(slot).permute((1, 0)).load(wide))
        dk_later = warpgroup_mma(ps.permute((1, 0)), q, dk, is_async=True)
        if CORRECTS:
            mbarrier.wait(bars.index(DV_FULL), turn)
            zu_later = warpgroup_mma(dv0, u0.permute((1, 0)), zero, use_acc=False, is_async=True)
            zu_later = warpgroup_mma(dv1, u1.permute((1, 0)), zu_later, is_async=True)
        dk = warpgroup_mma_wait(2 if CORRECTS else 0, deps=[dk_later])
        mbarrier.arrive(bars.index(Q_READ))
        if CORRECTS:
            zu = warpgroup_mma_wait(0, deps=[zu_later])
            mbarrier.arrive(bars.index(U_FREE))
            beta = gl.sum(betas.index(slot).permute((1, 0)).load(square), 1)
            dbeta = gl.sum(gl.where(i[:, None] == j[None, :], zu, 0.0), 1) / beta / beta
            gl.store(DBETA + tokens + i, dbeta, mask=i < kv_len - first)
            if GATED:
                fade = gs.index(slot).permute((1, 0)).load(square) - gs.index(slot).load(square)
                zu = zu * gl.exp2(gl.where(i[:, None] > j[None, :], fade, float("-inf")))
            else:
                zu = gl.where(i[:, None] > j[None, :], zu, 0.0)
            mbarrier.wait(bars.index(P_FREE), turn)
            ps.store((-zu).to(dtype))
            fence_async_shared()
            dk_later = warpgroup_mma(ps.permute((1, 0)), k, dk, is_async=True)
            left0, left1 = dv0.load(square).to(gl.float32), dv1.load(square).to(gl.float32)
            if GATED:
                rise = gl.exp2(gs.index(slot).permute((1, 0)).load(square))
                left0, left1 = left0 * rise, left1 * rise
            left0 = gl.convert_layout((-left0).to(dtype), operand)
            left1 = gl.convert_layout((-left1).to(dtype), operand)
            dk = warpgroup_mma_wait(0, deps=[dk_later])
            if DECAYS:
                own = -2 * gl.sum(k.load(wide).to(gl.float32) * dk, 1)
            dk_later = warpgroup_mma(left0, s0.permute((1, 0)), dk, is_async=True)
            dk_later = warpgroup_mma(left1, s1.permute((1, 0)), dk_later, is_async=True)
            dk_later = warpgroup_mma(ps, k, dk_later, is_async=True)
            mbarrier.wait(bars.index(WALKED), turn)
            dk = warpgroup_mma_wait(0, deps=[dk_later])
            mbarrier.arrive(bars.index(S_FREE))
            mbarrier.arrive(bars.index(DV_FREE))
            if DECAYS:
                own += gl.sum(k.load(wide).to(gl.float32) * dk, 1)
        else:
            mbarrier.arrive(bars.index(S_FREE))
            mbarrier.wait(bars.index(P_FREE), turn)
            mbarrier.wait(bars.index(WALKED), turn)
            mbarrier.arrive(bars.index(DV_FREE))
            mbarrier.arrive(bars.index(U_FREE))
            if DECAYS:
                own = -gl.sum(k.load(wide).to(gl.float32) * dk, 1)
        if DECAYS:
            common = gl.sum(kept0.index(turn).load(flat) + kept1.index(turn).load(flat), 0)
            gone = gl.sum(gone0.index(turn).load(across) + gone1.index(turn).load(across), 0)
            own = gl.convert_layout(own, across) + owns.index(turn).load(across)
            later = gl.where(i[:, None] <= j[None, :], own[None, :], 0.0)
            later = gl.sum(later, 1) + (gone + common * gl.exp2(gl.sum(gl.where(i == C - 1, end, 0.0), 0)))
            gl.store(DG + tokens + i, later, mask=i < kv_len - first)
        k.store(dk.to(dtype))
        fence_async_shared()
        tma_store(dk_desc, [b, h, first, 0], ks.index(slot))
    tma_store_wait(0)
