"""Gradients of chunks, as chunked/kernels/gradients.py has them.

One program on each multiprocessor goes through chunks. A producer fetches what they need into shared memory, ahead of
two consumers of a warp group each, which multiply what lies there: `_queries` finds dq, `_keys` dk and dbeta. The
gradient of a chunk's decays is made of what both find: the first leaves its share in `mail`. Between tokens F and its
transpose are one matrix, and so are dB + dB^T, which meet the same keys.
"""

from __future__ import annotations

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

C = gl.constexpr(64)  # tokens of a chunk
# Barriers of each part of a chunk: K and Q, which are read until its end, have two.
S, D, Z, V, U, DO, K, Q = (gl.constexpr(place) for place in (0, 1, 2, 3, 4, 5, 6, 8))
BARRIERS = gl.constexpr(10)


@gluon.jit
def turns_of(total):
    """Chunks that a program has."""
    return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def nought_of(n, total):
    """0, which is not known to the compiler: what depends on it is not computed before a loop, and kept for all of it
    in registers that are wanted for other things."""
    return n // total


@gluon.jit
def fetch(desc, at, buffers, full, free, step, PART: gl.constexpr):
    STAGES: gl.constexpr = buffers.shape[0]
    place = PART + step % STAGES
    mbarrier.wait(free.index(place), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(place), buffers.shape[3] * buffers.shape[4] * 2)
    tma_load(desc, at, full.index(place), buffers.index(step % STAGES))


@gluon.jit
def arrived(buffers, full, step, nought, PART: gl.constexpr):
    STAGES: gl.constexpr = buffers.shape[0]
    mbarrier.wait(full.index(PART + step % STAGES), (step // STAGES) & 1)
    return buffers.index(step % STAGES + nought).reshape([buffers.shape[3], buffers.shape[4]])


@gluon.jit
def leave(buffers, free, step, PART: gl.constexpr):
    mbarrier.arrive(free.index(PART + step % buffers.shape[0]))


@gluon.jit
def put(desc, at, by, value):
    """By way of shared memory, from which what was put before has to be gone."""
    tma_store_wait(0)
    by.reshape([by.shape[2], by.shape[3]]).store(value)
    fence_async_shared()
    tma_store(desc, at, by)


@gluon.jit
def store(out, first, length, value, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Rows `first` to first + C - 1 of a tensor [length, WIDTH], as far as they are in it."""
    rows = gl.arange(0, C, gl.SliceLayout(1, layout))
    columns = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    there = (first + rows >= 0) & (first + rows < length)
    out += first.to(gl.int64) * WIDTH
    gl.store(out + rows[:, None] * WIDTH + columns[None, :], value, mask=there[:, None] & (columns < WIDTH)[None, :])


@gluon.jit
def _producer(
    s_desc, d_desc, z_desc, v_desc, u_desc, do_desc, k_desc, q_desc, ss, ds, zs, vs, us, dos, ks, qs, full, free,
    total, chunks, ahead, heads, group, CORRECTS: gl.constexpr,
):  # fmt: skip
    for step in range(turns_of(total)):
        n = gl.program_id(0) + step * gl.num_programs(0)
        row, c = n // chunks, n % chunks
        b, h = row // heads, row % heads
        first = c * C
        fetch(s_desc, [row, c, 0, 0], ss, full, free, step, S)
        fetch(d_desc, [row, c, 0, 0], ds, full, free, step, D)
        if CORRECTS:
            fetch(z_desc, [b, h, first, 0], zs, full, free, step, Z)
            fetch(u_desc, [b, h, first, 0], us, full, free, step, U)
        else:
            fetch(u_desc, [b, h // group, first, 0], us, full, free, step, U)
        fetch(do_desc, [b, h, first - ahead, 0], dos, full, free, step, DO)
        fetch(k_desc, [b, h // group, first, 0], ks, full, free, step, K)
        fetch(q_desc, [b, h, first - ahead, 0], qs, full, free, step, Q)
        if CORRECTS:
            fetch(v_desc, [b, h // group, first, 0], vs, full, free, step, V)


@gluon.jit
def _queries(
    dq_desc, by, DQ, G, BETA, mail, mail_full, mail_free, ss, ds, zs, vs, us, dos, ks, qs, full, free, total, chunks,
    kv_len, ahead, heads, scale, HEAD_DIM: gl.constexpr, CORRECTS: gl.constexpr, DECAYS: gl.constexpr,
):  # fmt: skip
    DIM: gl.constexpr = ss.shape[3]
    V_DIM: gl.constexpr = ss.shape[4]
    dtype: gl.constexpr = ss.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    zero_wide = gl.full([C, DIM], 0.0, gl.float32, wide)
    zero = gl.full([C, C], 0.0, gl.float32, square)
    i = gl.arange(0, C, gl.SliceLayout(1, square))
    j = gl.arange(0, C, gl.SliceLayout(0, square))
    for step in range(turns_of(total)):
        n = gl.program_id(0) + step * gl.num_programs(0)
        row, c = n // chunks, n % chunks
        nought = nought_of(n, total)
        if G is not None:
            sums = G + n.to(gl.int64) * C
            g_i, end = gl.load(sums + i), gl.load(sums + (C - 1))
        if CORRECTS:
            beta = gl.load(BETA + n.to(gl.int64) * C + i)
        s = arrived(ss, full, step, nought, S)
        do = arrived(dos, full, step, nought, DO)
        dq_later = warpgroup_mma(do, s.permute((1, 0)), zero_wide, use_acc=False, is_async=True)
        u = arrived(us, full, step, nought, U)
        k = arrived(ks, full, step, nought, K)
        if CORRECTS:
            z = arrived(zs, full, step, nought, Z)
            zu_later = warpgroup_mma(z, u.permute((1, 0)), zero, use_acc=False, is_async=True)
            pair_later = warpgroup_mma(k, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if DECAYS:
            d = arrived(ds, full, step, nought, D)
            both = gl.full([32, V_DIM], 0.0, gl.float32, flat)
            for part in gl.static_range(DIM // 32):
                left = s.slice(part * 32, 32).load(flat).to(gl.float32)
                both += left * d.slice(part * 32, 32).load(flat).to(gl.float32)
            leave(ds, free, step, D)
            common = gl.sum(gl.sum(both, 1), 0)
        if G is not None:
            apart = gl.where(i[:, None] >= j[None, :], g_i[:, None] - gl.load(sums + j)[None, :], float("-inf"))
            apart = gl.exp2(apart)
        if CORRECTS:
            dq, zu, pair = warpgroup_mma_wait(0, deps=[dq_later, zu_later, pair_later])
            if G is not None:
                pair = pair * apart
            pair = gl.where(i[:, None] > j[None, :], zu * pair, 0.0)
            seen = gl.sum(pair, 1)
        else:
            dq = warpgroup_mma_wait(0, deps=[dq_later])
        leave(ss, free, step, S)
        q = arrived(qs, full, step, nought, Q)
        da_later = warpgroup_mma(do, u.permute((1, 0)), zero, use_acc=False, is_async=True)
        if DECAYS:
            met_later = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if G is None:
            dq = dq * scale
        else:
            rise = gl.convert_layout(scale * gl.exp2(g_i), gl.SliceLayout(1, wide))
            dq = dq * rise[:, None]
        if DECAYS:
            own = gl.convert_layout(gl.sum(q.load(wide).to(gl.float32) * dq, 1), gl.SliceLayout(1, square))
            da, met = warpgroup_mma_wait(0, deps=[da_later, met_later])
        else:
            da = warpgroup_mma_wait(0, deps=[da_later])
        leave(us, free, step, U)
        leave(dos, free, step, DO)
        leave(qs, free, step, Q)
        if G is None:
            da = gl.where(i[:, None] >= j[None, :], da * scale, 0.0)
        else:
            da = da * (scale * apart)
        dq_later = warpgroup_mma(gl.convert_layout(da.to(dtype), operand), k, dq, is_async=True)
        if DECAYS:
            met = gl.where(i[:, None] > j[None, :], da * met, 0.0)
            if CORRECTS:
                met -= beta[:, None] * pair
            own += gl.sum(met, 1) + gl.where(i == C - 1, common * gl.exp2(end), 0.0)
            lost = gl.sum(met, 0)
        if CORRECTS or DECAYS:
            mbarrier.wait(mail_free, (step & 1) ^ 1)
        if CORRECTS:
            mail.index(3).store(seen)
            v = arrived(vs, full, step, nought, V)
            for part in gl.static_range(C // 32):
                left = z.slice(part * 32, 32).load(flat).to(gl.float32)
                read = left * v.slice(part * 32, 32).load(flat).to(gl.float32)
                mail.index(2).slice(part * 32, 32).store(gl.sum(read, 1))
            leave(zs, free, step, Z)
            leave(vs, free, step, V)
        if DECAYS:
            mail.index(0).store(own)
            mail.index(1).store(lost)
        if CORRECTS or DECAYS:
            mbarrier.arrive(mail_full)
        dq = warpgroup_mma_wait(0, deps=[dq_later])
        leave(ks, free, step, K)
        first, q_len = c * C - ahead, kv_len - ahead
        if first >= 0:
            put(dq_desc, [row // heads, row % heads, first, 0], by, dq.to(dtype))
        else:  # an H100 takes a box that begins before the first row for an illegal instruction
            store(DQ + row.to(gl.int64) * q_len * HEAD_DIM, first, q_len, dq, HEAD_DIM, wide)
    tma_store_wait(0)


@gluon.jit
def _keys(
    dk_desc, by, DK, DG, DBETA, G, BETA, mail, mail_full, mail_free, ss, ds, zs, us, dos, ks, qs, full, free, total,
    chunks, kv_len, heads, scale, HEAD_DIM: gl.constexpr, CORRECTS: gl.constexpr, DECAYS: gl.constexpr,
):  # fmt: skip
    DIM: gl.constexpr = ss.shape[3]
    dtype: gl.constexpr = ss.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    of_wide: gl.constexpr = gl.SliceLayout(1, wide)
    lines: gl.constexpr = gl.SliceLayout(1, square)
    across: gl.constexpr = gl.SliceLayout(0, square)
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    zero_wide = gl.full([C, DIM], 0.0, gl.float32, wide)
    zero = gl.full([C, C], 0.0, gl.float32, square)
    i, j = gl.arange(0, C, lines), gl.arange(0, C, across)
    for step in range(turns_of(total)):
        n = gl.program_id(0) + step * gl.num_programs(0)
        row, c = n // chunks, n % chunks
        first = c * C
        nought = nought_of(n, total)
        tokens = row.to(gl.int64) * kv_len + first
        there = i < kv_len - first
        if G is not None:
            sums = G + n.to(gl.int64) * C
            g_i, end = gl.load(sums + i), gl.load(sums + (C - 1))
        if CORRECTS:
            strengths = BETA + n.to(gl.int64) * C
            beta = gl.load(strengths + i)
            s = arrived(ss, full, step, nought, S)
            z = arrived(zs, full, step, nought, Z)
            zs_later = warpgroup_mma(z, s.permute((1, 0)), zero_wide, use_acc=False, is_async=True)
        d = arrived(ds, full, step, nought, D)
        u = arrived(us, full, step, nought, U)
        dk_later = warpgroup_mma(u, d.permute((1, 0)), zero_wide, use_acc=False, is_async=True)
        k = arrived(ks, full, step, nought, K)
        keys = k.load(wide)
        if CORRECTS:
            through = warpgroup_mma_wait(1, deps=[zs_later])
            leave(ss, free, step, S)
            if G is not None:
                through = through * gl.convert_layout(gl.exp2(g_i), of_wide)[:, None]
            foreseen = gl.convert_layout(gl.sum(keys.to(gl.float32) * through, 1), lines)
        dk = warpgroup_mma_wait(0, deps=[dk_later])
        leave(ds, free, step, D)
        if G is not None:
            dk = dk * gl.convert_layout(gl.exp2(end - g_i), of_wide)[:, None]
        if DECAYS:
            gone = gl.convert_layout(gl.sum(keys.to(gl.float32) * dk, 1), lines)
        if CORRECTS:
            dk -= through * gl.convert_layout(beta, of_wide)[:, None]
            zu_later = warpgroup_mma(z, u.permute((1, 0)), zero, use_acc=False, is_async=True)
            uz_later = warpgroup_mma(u, z.permute((1, 0)), zero, use_acc=False, is_async=True)
        if G is not None:
            g_j = gl.load(sums + j)
            apart = gl.where(i[:, None] >= j[None, :], g_i[:, None] - g_j[None, :], g_j[None, :] - g_i[:, None])
            apart = gl.exp2(apart)
        if CORRECTS:
            zu, uz = warpgroup_mma_wait(0, deps=[zu_later, uz_later])
            leave(zs, free, step, Z)
            db = gl.where(i[:, None] > j[None, :], -beta[:, None] * zu, -gl.load(strengths + j)[None, :] * uz)
            db = gl.where(i[:, None] == j[None, :], 0.0, db)
            if G is not None:
                db = db * apart
            dk_later = warpgroup_mma(gl.convert_layout(db.to(dtype), operand), k, dk, is_async=True)
        do = arrived(dos, full, step, nought, DO)
        da_later = warpgroup_mma(u, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        if CORRECTS:
            da, dk = warpgroup_mma_wait(0, deps=[da_later, dk_later])
        else:
            da = warpgroup_mma_wait(0, deps=[da_later])
        leave(us, free, step, U)
        leave(dos, free, step, DO)
        da = gl.where(i[:, None] <= j[None, :], da * scale, 0.0)
        if G is not None:
            da = da * apart
        q = arrived(qs, full, step, nought, Q)
        dk_later = warpgroup_mma(gl.convert_layout(da.to(dtype), operand), q, dk, is_async=True)
        if CORRECTS or DECAYS:
            mbarrier.wait(mail_full, step & 1)
        if CORRECTS:
            gl.store(DBETA + tokens + i, mail.index(2).load(lines) - mail.index(3).load(lines) - foreseen, mask=there)
        if DECAYS:
            own = mail.index(0).load(across) - mail.index(1).load(across)
            if CORRECTS:
                own -= gl.convert_layout(beta * foreseen, across)
            own = gl.where(i[:, None] <= j[None, :], own[None, :], gl.convert_layout(gone, across)[None, :])
            gl.store(DG + tokens + i, gl.sum(own, 1), mask=there)
        if CORRECTS or DECAYS:
            mbarrier.arrive(mail_free)
        dk = warpgroup_mma_wait(0, deps=[dk_later])
        leave(ks, free, step, K)
        leave(qs, free, step, Q)
        if DK is None:
            put(dk_desc, [row // heads, row % heads, first, 0], by, dk.to(dtype))
        else:
            store(DK + row.to(gl.int64) * kv_len * HEAD_DIM, first, kv_len, dk, HEAD_DIM, wide)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["total", "chunks", "kv_len", "ahead", "heads", "group"])
def gradients(
    s_desc, d_desc, z_desc, v_desc, u_desc, do_desc, k_desc, q_desc, dq_desc, dk_desc, G, BETA, DQ, DK, DG, DBETA,
    total, chunks, kv_len, ahead, heads, group, scale, HEAD_DIM: gl.constexpr, CORRECTS: gl.constexpr,
    DECAYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Boxes: states [1, 1, DIM, V_DIM], the rest [1, 1, C, DIM or V_DIM]; of what is not there, any. DIM and V_DIM are
    64 or 128. DQ: what dq_desc is of. DK, float32, stands in for dk_desc where there is one. G, BETA: sums of log
    decays, and strengths, [total, C]. DG may be absent. STAGES: of k and q."""
    DIM: gl.constexpr = s_desc.block_shape[2]
    V_DIM: gl.constexpr = s_desc.block_shape[3]
    dtype: gl.constexpr = s_desc.dtype
    ss = gl.allocate_shared_memory(dtype, [1, 1, 1, DIM, V_DIM], s_desc.layout)
    ds = gl.allocate_shared_memory(dtype, [1, 1, 1, DIM, V_DIM], d_desc.layout)
    us = gl.allocate_shared_memory(dtype, [1, 1, 1, C, V_DIM], u_desc.layout)
    dos = gl.allocate_shared_memory(dtype, [1, 1, 1, C, V_DIM], do_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, DIM], k_desc.layout)
    qs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, C, DIM], q_desc.layout)
    by_dq = gl.allocate_shared_memory(dtype, [1, 1, C, DIM], dq_desc.layout)
    by_dk = by_dq
    if DK is None:
        by_dk = gl.allocate_shared_memory(dtype, [1, 1, C, DIM], dk_desc.layout)
    zs, vs = us, us
    if CORRECTS:
        zs = gl.allocate_shared_memory(dtype, [1, 1, 1, C, V_DIM], z_desc.layout)
        vs = gl.allocate_shared_memory(dtype, [1, 1, 1, C, V_DIM], v_desc.layout)
    mail = gl.allocate_shared_memory(gl.float32, [4, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    mail_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mail_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(mail_full, count=1)
    mbarrier.init(mail_free, count=1)
    for place in gl.static_range(BARRIERS):
        mbarrier.init(full.index(place), count=1)
    mbarrier.init(free.index(S), count=1 + CORRECTS)
    mbarrier.init(free.index(D), count=1 + DECAYS)
    mbarrier.init(free.index(Z), count=2)
    mbarrier.init(free.index(V), count=1)
    for place in gl.static_range(U, BARRIERS):
        mbarrier.init(free.index(place), count=2)
    gl.warp_specialize(
        [
            (_queries, (
                dq_desc, by_dq, DQ, G, BETA, mail, mail_full, mail_free, ss, ds, zs, vs, us, dos, ks, qs, full, free,
                total, chunks, kv_len, ahead, heads, scale, HEAD_DIM, CORRECTS, DECAYS,
            )),
            (_keys, (
                dk_desc, by_dk, DK, DG, DBETA, G, BETA, mail, mail_full, mail_free, ss, ds, zs, us, dos, ks, qs, full,
                free, total, chunks, kv_len, heads, scale, HEAD_DIM, CORRECTS, DECAYS,
            )),
            (_producer, (
                s_desc, d_desc, z_desc, v_desc, u_desc, do_desc, k_desc, q_desc, ss, ds, zs, vs, us, dos, ks, qs, full,
                free, total, chunks, ahead, heads, group, CORRECTS,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
