"""The gradient of the state, D, carried from the last chunk to the first.

    du = scale A^T dO + (k e^(G_end - G)) D,    which is dv; where writes correct z = T^T du, and dv = beta z
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
    dot,
    load,
    load_state,
    remembered_from,
    square,
    store,
    store_state,
    sums,
)


@triton.jit(do_not_specialize=LENGTHS)
def back(
    Q, K, K_OUT, DO, G, FADES, BETA, T, A, Z, DV_, START, END, TRANSITION, TOTALS, STATES, q_b, q_h, q_n, k_b, k_h, k_n,
    do_b, do_h, do_n, kv_len, ahead, heads, group, segments, per, scale, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks; segments count from the end. START: D at their ends, zero if absent. Z, DV_ and
    STATES, D behind each chunk, may be absent. END, TRANSITION, TOTALS, FADES and K_OUT: as in `walk`."""
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
        G += wide * chunks * C
    if K is not None:
        K += (b * k_b + (h if CHANNELS else h // group) * k_h) * UNIT
    if K_OUT is not None:
        K_OUT += (b * k_b + h * k_h) * UNIT
    if T is not None:
        BETA += wide * chunks * C
        T += wide * chunks * C * C
    if A is not None:
        A += wide * chunks * C * C
    dtype = Q.dtype.element_ty

    place = wide * segments + segment
    begin, stop = segment * per, tl.minimum((segment + 1) * per, chunks)
    if START is None:
        S = tl.zeros([PD, BV], tl.float32)
    else:
        S = load_state(START + place * (D * DV), rows, columns, D, DV).to(tl.float32)
    if TRANSITION is not None:
        S += tl.where(rows[:, None] == (columns - TILES * BV)[None, :], 1.0, 0.0)
    if TOTALS is not None:
        total = tl.zeros([1, PD if CHANNELS and TRANSITION is None else 1], tl.float32)
        if FADES is not None:
            begin, forgotten = remembered_from(FADES + wide * (chunks + 1), chunks, begin, stop, True)
            if TRANSITION is not None:
                begin = tl.where(forgotten & (tile >= TILES), stop, begin)
                total += tl.where(forgotten, float("-inf"), 0.0)
    limit = None if EVEN else kv_len
    q_limit = None if EVEN else kv_len - ahead
    for n in tl.range(begin, stop):
        c = chunks - 1 - n
        first = c * C
        if STATES is not None:
            store_state(STATES + (wide * chunks + c) * (D * DV), rows, columns, S, D, DV)
        q = load(Q, q_n * UNIT, first - ahead, q_limit, rows, C, D)
        do = load(DO, do_n * UNIT, first - ahead, q_limit, columns, C, DV)
        behind = S
        if CHANNELS:
            end = tl.load(G + c * D + rows, mask=rows < D, other=0.0)[:, None]
            S = add_dot(tl.trans((q.to(tl.float32) * scale).to(dtype)), do, S * tl.math.exp2(end), SIMULATED)
        else:
            sum_g, end = sums(None if G is None else G + first, C)
            rise = tl.math.exp2(sum_g)[:, None]
            S = add_dot(tl.trans(q), (do * (scale * rise)).to(dtype), S * tl.math.exp2(end), SIMULATED)
        if T is not None or DV_ is not None:
            if A is None:
                k = load(K, k_n * UNIT, first, limit, rows, C, D)
                inner = (dot(k, tl.trans(q), SIMULATED) * (scale * between_transposed(sum_g, C))).to(dtype)
                du = dot(k, behind.to(dtype), SIMULATED) * tl.math.exp2(end - sum_g)[:, None]
            else:
                inner = (tl.trans(square(A, first, C)).to(tl.float32) * scale).to(dtype)
                k_out = load(K_OUT, k_n * UNIT, first, limit, rows, C, D)
                du = dot(k_out, behind.to(dtype), SIMULATED)
            du = add_dot(inner, do, du, SIMULATED)
        if T is not None:
            beta = tl.load(BETA + first + tokens)[:, None]
            z = dot(tl.trans(square(T, first, C)), du.to(dtype), SIMULATED)
            if Z is not None:
                store(Z + wide * kv_len * DV, DV, first, limit, columns, z, C, DV)
            du = beta * z
            if CHANNELS:
                k = load(K, k_n * UNIT, first, limit, rows, C, D)
            S = add_dot(tl.trans(k), (-du if CHANNELS else -(rise * du)).to(dtype), S, SIMULATED)
        if DV_ is not None:
            store(DV_ + wide * kv_len * DV, DV, first, limit, columns, du, C, DV)
        if TOTALS is not None and TRANSITION is None:
            total += tl.trans(end) if CHANNELS else end

    if TOTALS is not None:
        store_state(END + place * (D * DV), rows, columns, S, D, DV)
        if TRANSITION is not None:
            store_state(TRANSITION + place * (D * D), rows, columns - TILES * BV, S, D, D)
        if tile == 0:
            if CHANNELS and TRANSITION is None:
                tl.store(TOTALS + place * D + rows[None, :], total, mask=(rows < D)[None, :])
            else:
                tl.store(TOTALS + place + tl.zeros([1, 1], tl.int32), total)
    elif END is not None:  # noqa: SIM102  known when it is compiled
        if segment == segments - 1:
            store_state(END + wide * (D * DV), rows, columns, S, D, DV)
