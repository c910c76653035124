"""`back` and `gradients` in one, for Hopper GPUs: the gradient of the state behind a chunk stays on the chip.

Two warp groups walk from the end (fused_walker.py) and leave D, the gradient of the state behind a chunk, and dv in
shared memory; another one makes of them the rest (fused_chunks.py), while they walk on; a fourth one fetches. With
P = scale F (dO u^T) where j <= i, and where writes correct N = F (dv u^T) where j < i:

    dq = scale e^G (dO S^T) + P k,   dk = e^(G_end - G) (u D^T) + P^T q - e^G (dv S^T) - (N + N^T) k
    dbeta_i = z_i.u_i / beta_i = dv_i.u_i / beta_i^2, as u_i / beta_i is what v_i differs by from what is read
    dG_i = q_i.dq_i + k_i.(what reading adds to dk_i: - e^G dv S^T - N k) - k_i.(what writing adds to it)

and e^(G_end) counts for the last token; dg_t = sum over i >= t of dG_i. What tokens of a chunk are to each other
cancels where it has to: dq and dk have it of the same rounded P and N, and it is added up in float32.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.fused_chunks import chunks_of
from manyheads.engines.triton.chunked.hopper.kernels.fused_walker import (
    BARRIERS,
    BOTH,
    S_FREE,
    S_FULL,
    T_FREE,
    T_FULL,
    U_FREE,
    U_FULL,
    walker,
)
from manyheads.engines.triton.chunked.hopper.kernels.parts import barriers, numbers, room, rooms, squares, work_of
from manyheads.engines.triton.hopper.names import (
    gl,
    gluon,
    mbarrier,
    tma_load,
)


@gluon.jit
def _fetch_tokens(given, tokens, step, n, GATED: gl.constexpr, CORRECTS: gl.constexpr):
    q_desc, k_desc, do_desc, g_desc, beta_desc, b, h, kv_head, line, chunks = given
    qs, ks, do0s, do1s, gs, betas, full, free = tokens
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = do0s.shape[4]
    BYTES: gl.constexpr = C * ((2 * D + 2 * HALF) * 2 + (4 if GATED else 0) + (4 if CORRECTS else 0))
    c = chunks - 1 - n
    slot = step % STAGES
    here = full.index(slot)
    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(here, BYTES)
    tma_load(k_desc, [b, kv_head, c * C, 0], here, ks.index(slot))
    tma_load(q_desc, [b, h, c * C, 0], here, qs.index(slot))
    tma_load(do_desc, [b, h, c * C, 0], here, do0s.index(slot))
    tma_load(do_desc, [b, h, c * C, HALF], here, do1s.index(slot))
    if CORRECTS:
        tma_load(beta_desc, [line + c, 0], here, betas.index(slot))
    if GATED:
        tma_load(g_desc, [line + c, 0], here, gs.index(slot))


@gluon.jit
def _producer(given, of_chunk, tokens, single, bars, begin, stop, GATED: gl.constexpr, CORRECTS: gl.constexpr):
    t_desc, u_desc, states_desc, u_head = of_chunk
    s0, s1, u0, u1, ts = single
    _, _, _, _, _, b, _, _, line, chunks = given
    C: gl.constexpr = u0.shape[3]
    HALF: gl.constexpr = u0.shape[4]
    D: gl.constexpr = s0.shape[2]
    _fetch_tokens(given, tokens, 0, begin, GATED, CORRECTS)
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n
        turn = (step & 1) ^ 1
        if CORRECTS:
            mbarrier.wait(bars.index(T_FREE), turn)
            mbarrier.expect(bars.index(T_FULL), C * C * 2)
            tma_load(t_desc, [(line + c) * C, 0], bars.index(T_FULL), ts.index(0))
        mbarrier.wait(bars.index(S_FREE), turn)
        mbarrier.expect(bars.index(S_FULL), D * HALF * 4)
        tma_load(states_desc, [line + c, 0, 0], bars.index(S_FULL), s0.index(0))
        tma_load(states_desc, [line + c, 0, HALF], bars.index(S_FULL), s1.index(0))
        mbarrier.wait(bars.index(U_FREE), turn)
        mbarrier.expect(bars.index(U_FULL), C * HALF * 4)
        tma_load(u_desc, [b, u_head, c * C, 0], bars.index(U_FULL), u0.index(0))
        tma_load(u_desc, [b, u_head, c * C, HALF], bars.index(U_FULL), u1.index(0))
        if n + 1 < stop:
            _fetch_tokens(given, tokens, step + 1, n + 1, GATED, CORRECTS)


@gluon.jit(do_not_specialize=["heads", "group", "segments", "per", "chunks", "kv_len"])
def fused(
    q_desc, k_desc, do_desc, t_desc, g_desc, beta_desc, u_desc, states_desc, dv_desc, dq_desc, dk_desc, START, END, DG,
    DBETA, heads, group, segments, per, chunks, kv_len, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, CORRECTS: gl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks; segments count from the end. Keys and values of 128 numbers. Where nothing is
    corrected u is v. DG may be absent. Descriptors of what is not there may be any."""
    C: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    HALF: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = k_desc.dtype
    DECAYS: gl.constexpr = DG is not None
    _, bh, b, h, segment, begin, stop = work_of(heads, segments, per, chunks, 1)
    line = bh * chunks
    kept_end = segment == segments - 1
    if START is not None:
        START += (bh * segments + segment).to(gl.int64) * (D * DV)
    END += bh.to(gl.int64) * (D * DV)
    qs, ks = room(q_desc, STAGES), room(k_desc, STAGES)
    do0s, do1s = rooms(do_desc, STAGES, 2)
    s0, s1 = rooms(states_desc, 1, 2)
    u0, u1 = rooms(u_desc, 1, 2)
    behind0, behind1 = rooms(states_desc, 1, 2)
    dv0, dv1 = rooms(dv_desc, 1, 2)
    inners, ps = squares(1, C, dtype), squares(1, C, dtype)
    kept0, kept1 = numbers(2, 32), numbers(2, 32)
    gone0, gone1, owns = numbers(2, HALF), numbers(2, HALF), numbers(2, C)
    ts = ps
    gs = ks
    betas = ks
    if CORRECTS:
        ts, betas = room(t_desc, 1), room(beta_desc, STAGES)
    if GATED:
        gs = room(g_desc, STAGES)
    full, free = barriers(STAGES, 1), barriers(STAGES, 2)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(BARRIERS):
        if place == S_FREE or (place == U_FREE and DECAYS):  # read by all three
            mbarrier.init(bars.index(place), count=3)
        else:
            mbarrier.init(bars.index(place), count=2 if place >= BOTH else 1)
    slots = (qs, ks, do0s, do1s, gs, betas, full, free)
    single = (s0, s1, u0, u1, ts)
    given = (dv_desc, START, END, slots, ts, inners, bars, (begin, stop, chunks), b, h, kept_end, scale)
    of_dq = (dq_desc, s0, s1, ps, owns)
    half0 = (do0s, dv0, behind0, s0, u0, kept0, gone0)
    half1 = (do1s, dv1, behind1, s1, u1, kept1, gone1)
    kv_head = h // group
    loaded = (q_desc, k_desc, do_desc, g_desc, beta_desc, b, h, kv_head, line, chunks)
    u_head = h if CORRECTS else kv_head
    gl.warp_specialize(
        [
            (chunks_of, (
                (dk_desc, DG, DBETA, kept0, kept1, gone0, gone1, owns), slots, single, (behind0, behind1), (dv0, dv1),
                ps, bars, (begin, stop, chunks), bh, b, h, kv_len, scale, GATED, CORRECTS, DECAYS,
            )),
            (walker, (given, half0, of_dq, 0, DV, GATED, CORRECTS, DECAYS, 0)),
            (walker, (given, half1, of_dq, HALF, DV, GATED, CORRECTS, DECAYS, 1)),
            (_producer, (
                loaded, (t_desc, u_desc, states_desc, u_head), slots, single, bars, begin, stop, GATED, CORRECTS,
            )),
        ],
        [4, 4, 4],
        [160, 160, 24],
    )  # fmt: skip
