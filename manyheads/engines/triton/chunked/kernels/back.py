"""The gradient of the state, D, carried from the last chunk to the first.

    z = T^T du,    du = scale A^T dO + (k e^(G_end - G)) D    where writes correct
    D <- e^(G_end) D + scale (q e^G)^T dO - (k e^G)^T (beta z)

A program holds BV columns of D, as `walk` does of S, and walks each segment twice where they are walked side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import (
    LENGTHS,
    add_dot,
    between_transposed,
    decays,
    dot,
    end_of,
    load,
    load_state,
    remembered_from,
    store,
    store_state,
)


@triton.jit(do_not_specialize=LENGTHS)
def back(
    Q, K, K_OUT, DO, G, FADES, BETA, T, A, Z, START, END, TRANSITION, TOTALS, STATES, q_b, q_h, q_n, k_b, k_h, k_n,
    do_b, do_h, do_n, g_b, g_h, g_n, w_b, w_h, w_n, kv_len, ahead, heads, group, segments, per, scale, D: tl.constexpr,
    DV: tl.constexpr, PD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr,
    UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks; segments count from the end. START: D at their ends, zero if absent. Z and STATES, D
    behind each chunk, may be absent. END, TRANSITION and TOTALS, and K_OUT: as in `walk`."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    if TRANSITION is not None:
        tiles = TILES + (PD + BV - 1) // BV
    else:
        tiles = TILES
    tile = tl.program_id(0) % tiles
    segment = tl.program_id(0) // tiles % segments
    bh = tl.program_id(0) // tiles // segments
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    wide = bh.to(tl.int64)
    rows, columns, tokens = tl.arange(0, PD), tile * BV + tl.arange(0, BV), tl.arange(0, C)
    chunks = tl.cdiv(kv_len, C)
    Q += (b * q_b + h * q_h) * UNIT
    DO += (b * do_b + h * do_h) * UNIT
    if CHANNELS:
        G += wide * chunks * D
    elif G is not None:
        G += b * g_b + h * g_h
    if T is not None:
        K += (b * k_b + (h if CHANNELS else h // group) * k_h) * UNIT
        if CHANNELS:
            K_OUT += (b * k_b + h * k_h) * UNIT
        BETA += b * w_b + h * w_h
        T += wide * chunks * C * C
    if FADES is not None:
        FADES += wide * chunks
    if A is not None:
        A += wide * chunks * C * C
    dtype = Q.dtype.element_ty

    place = wide * segments + segment
    if START is None:
        S = tl.zeros([PD, BV], tl.float32)
    else:
        S = load_state(START + place * (D * DV), rows, columns, D, DV).to(tl.float32)
    begin, stop = segment * per, tl.minimum((segment + 1) * per, chunks)
    if TOTALS is not None:
        total = tl.zeros([1, PD if CHANNELS else 1], tl.float32)
        own = 1.0
        if G is not None:
            begin, forgotten = remembered_from(G, FADES, g_n, begin, stop, chunks, kv_len, C, D, PD, CHANNELS, True)
            total = tl.where(forgotten, float("-inf"), total)
            own = tl.where(forgotten, 0.0, 1.0)
            begin = tl.where(forgotten & (tile >= TILES), stop, begin)
        if TRANSITION is not None:  # where v = 0 and S = I at first, S is what the segment makes of the state before it
            S += tl.where(rows[:, None] == (columns - TILES * BV)[None, :], own, 0.0)
    for n in tl.range(begin, stop):
        c = chunks - 1 - n
        first = c * C
        if STATES is not None:
            store_state(STATES + (wide * chunks + c) * (D * DV), rows, columns, S, D, DV)
        q = load(Q, q_n * UNIT, first - ahead, kv_len - ahead, rows, C, D)
        do = load(DO, do_n * UNIT, first - ahead, kv_len - ahead, columns, C, DV)
        behind = S
        if CHANNELS:
            end = tl.load(G + c * D + rows, mask=rows < D, other=0.0)[None, :]
            S = add_dot(tl.trans((q.to(tl.float32) * scale).to(dtype)), do, S * tl.math.exp2(tl.trans(end)), SIMULATED)
        else:
            sum_g = decays(G, g_n, first, kv_len, C)
            end = end_of(sum_g, C)
            rise = tl.math.exp2(sum_g)
            S = add_dot(tl.trans(q), (do * (scale * rise)).to(dtype), S * tl.math.exp2(tl.trans(end)), SIMULATED)
        if T is not None:
            k = load(K, k_n * UNIT, first, kv_len, rows, C, D)
            at = first + tokens
            beta = tl.load(BETA + at.to(tl.int64) * w_n, mask=at < kv_len, other=0.0).to(tl.float32)[:, None]
            if A is None:
                inner = (dot(k, tl.trans(q), SIMULATED) * (scale * between_transposed(sum_g, C))).to(dtype)
            else:
                inner = (tl.trans(load(A, C, first, first + C, tokens, C, C)).to(tl.float32) * scale).to(dtype)
            if CHANNELS:
                k_out = load(K_OUT, k_n * UNIT, first, kv_len, rows, C, D)
                du = dot(k_out, behind.to(dtype), SIMULATED)
            else:
                du = dot(k, behind.to(dtype), SIMULATED) * tl.math.exp2(end - sum_g)
            du = add_dot(inner, do, du, SIMULATED)
            z = dot(tl.trans(load(T, C, first, first + C, tokens, C, C)), du.to(dtype), SIMULATED)
            if Z is not None:
                store(Z + wide * kv_len * DV, DV, first, kv_len, columns, z, C, DV)
            z *= -beta if CHANNELS else -(beta * rise)
            S = add_dot(tl.trans(k), z.to(dtype), S, SIMULATED)
        if TOTALS is not None:
            total += end

    if TOTALS is not None:
        store_state(END + place * (D * DV), rows, columns, S, D, DV)
        if TRANSITION is not None:
            store_state(TRANSITION + place * (D * D), rows, columns - TILES * BV, S, D, D)
        if tile == 0:
            if CHANNELS:
                tl.store(TOTALS + place * D + rows[None, :], total, mask=(rows < D)[None, :])
            else:
                tl.store(TOTALS + place + tl.zeros([1, 1], tl.int32), total)
    elif END is not None:  # noqa: SIM102  known when it is compiled
        if segment == segments - 1:
            store_state(END + wide * (D * DV), rows, columns, S, D, DV)
