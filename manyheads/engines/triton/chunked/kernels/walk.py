"""A state carried through a segment of chunks, and from segment to segment.

    u = T (beta (v - (k e^G) S))    or v itself, where nothing is corrected
    o = scale ((q e^G) S + A u),    A_ij = q_i.k_j e^(G_i - G_j) where j <= i
    S <- e^(G_end) S + (k e^(G_end - G))^T u

A program holds BV columns of S in float32. Where the segments of a row are walked side by side, each is walked twice:
first from S = 0 for what it adds, and then, once `carry` has put these together, from where it starts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import (
    LENGTHS,
    add_dot,
    between,
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
def walk(
    Q, K, K_OUT, V, G, FADES, BETA, T, A, O, U, START, END, TRANSITION, TOTALS, STATES, q_b, q_h, q_n, k_b, k_h, k_n,
    v_b, v_h, v_n, o_b, o_h, o_n, kv_len, ahead, heads, group, segments, per, scale, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    SIMULATED: tl.constexpr,
):  # fmt: skip
    """A segment of `per` chunks. The first query stands `ahead` tokens behind the first key. May be absent: START, the
    states at the beginning of segments, for zeros; O, U and STATES, the states before each chunk, where nobody asks.

    Where channels decay by themselves, Q, K and K_OUT are what `pairs` made of q and k, K only if writes correct, and G
    are its ENDS.

    With TOTALS, G over what is walked of it, END are the states behind each segment; without, behind the last one.
    TRANSITION: what a segment that corrects makes of a state before it, [D, D]; TOTALS are then -inf where that is
    nothing. Where FADES says that the end has forgotten a segment's beginning, that is left out.
    """
    TILES: tl.constexpr = (DV + BV - 1) // BV
    if TRANSITION is not None:
        tiles = TILES + (PD + BV - 1) // BV
    else:
        tiles = TILES
    tile = tl.program_id(0) % tiles
    segment = tl.program_id(0) // tiles % segments
    bh = tl.program_id(0) // tiles // segments
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    wide, kv_h = bh.to(tl.int64), h // group
    rows, columns, tokens = tl.arange(0, PD), tile * BV + tl.arange(0, BV), tl.arange(0, C)
    chunks = tl.cdiv(kv_len, C)
    if K is not None:
        K += (b * k_b + (h if CHANNELS else kv_h) * k_h) * UNIT
    V += (b * v_b + kv_h * v_h) * UNIT
    if CHANNELS:
        K_OUT += (b * k_b + h * k_h) * UNIT
        G += wide * chunks * D
    elif G is not None:
        G += wide * chunks * C
    if O is not None:
        Q += (b * q_b + h * q_h) * UNIT
        O += (b * o_b + h * o_h) * UNIT
    if T is not None:
        BETA += wide * chunks * C
        T += wide * chunks * C * C
    if A is not None:
        A += wide * chunks * C * C
    dtype = V.dtype.element_ty

    place = wide * segments + segment
    begin, stop = segment * per, tl.minimum((segment + 1) * per, chunks)
    if START is None:
        S = tl.zeros([PD, BV], tl.float32)
    else:
        S = load_state(START + place * (D * DV), rows, columns, D, DV).to(tl.float32)
    if TRANSITION is not None:  # where v = 0 and S = I at first, S is what the segment makes of the state before it
        S += tl.where(rows[:, None] == (columns - TILES * BV)[None, :], 1.0, 0.0)
    if TOTALS is not None:
        total = tl.zeros([1, PD if CHANNELS and TRANSITION is None else 1], tl.float32)
        if FADES is not None:
            begin, forgotten = remembered_from(FADES + wide * (chunks + 1), chunks, begin, stop, False)
            if TRANSITION is not None:
                begin = tl.where(forgotten & (tile >= TILES), stop, begin)
                total += tl.where(forgotten, float("-inf"), 0.0)
    limit = None if EVEN else kv_len
    q_limit = None if EVEN else kv_len - ahead
    for c in tl.range(begin, stop):
        first = c * C
        if STATES is not None:
            store_state(STATES + (wide * chunks + c) * (D * DV), rows, columns, S, D, DV)
        if K is not None:
            k = load(K, k_n * UNIT, first, limit, rows, C, D)
        v = load(V, v_n * UNIT, first, limit, columns, C, DV)
        if CHANNELS:
            end = tl.load(G + c * D + rows, mask=rows < D, other=0.0)[:, None]
            rise = 1.0
        else:
            sum_g, end = sums(None if G is None else G + first, C)
            rise = tl.math.exp2(sum_g)[:, None]
        u = v
        if T is not None:
            beta = tl.load(BETA + first + tokens)[:, None]
            missing = beta * (v - dot(k, S.to(dtype), SIMULATED) * rise)
            u = dot(square(T, first, C), missing.to(dtype), SIMULATED)
        if U is not None:
            store(U + wide * kv_len * DV, DV, first, limit, columns, u, C, DV)
        if O is not None:
            q = load(Q, q_n * UNIT, first - ahead, q_limit, rows, C, D)
            if A is None:
                inner = (dot(q, tl.trans(k), SIMULATED) * between(sum_g, C)).to(dtype)
            else:
                inner = square(A, first, C)
            o = add_dot(inner, u.to(dtype), dot(q, S.to(dtype), SIMULATED) * rise, SIMULATED) * scale
            store(O, o_n * UNIT, first - ahead, q_limit, columns, o, C, DV)
        S *= tl.math.exp2(end)
        if CHANNELS:
            k_out = load(K_OUT, k_n * UNIT, first, limit, rows, C, D)
            S = add_dot(tl.trans(k_out), u.to(dtype), S, SIMULATED)
        else:
            S = add_dot(tl.trans(k), (u * tl.math.exp2(end - sum_g)[:, None]).to(dtype), S, SIMULATED)
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


@triton.jit
def _made_of(TRANSITION, total, place, rows, D: tl.constexpr):
    """What a segment makes of a state before it, where that is something."""
    there = (rows < tl.where(total == 0.0, D, 0))[:, None] & (rows < D)[None, :]
    return tl.load(TRANSITION + place * (D * D) + rows[:, None] * D + rows[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def carry(
    ADDED, TRANSITION, TOTALS, STATE, START, segments, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr,
    BV: tl.constexpr, CHANNELS: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """Where each segment starts, from STATE (zero if absent) and what all but the last one make of a state."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, bh = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    rows, columns = tl.arange(0, PD), tile * BV + tl.arange(0, BV)
    if STATE is None:
        S = tl.zeros([PD, BV], tl.float32)
    else:
        S = load_state(STATE + bh * (D * DV), rows, columns, D, DV).to(tl.float32)
    store_state(START + bh * segments * (D * DV), rows, columns, S, D, DV)
    place, last = bh * (segments - 1), (bh + 1) * (segments - 1) - 1
    next_added = load_state(ADDED + place * (D * DV), rows, columns, D, DV)
    if TRANSITION is not None:
        next_total = tl.load(TOTALS + place)
        next_made = _made_of(TRANSITION, next_total, place, rows, D)
    for n in tl.range(0, segments - 1):
        added = next_added  # the next one's is loaded while this one's is used
        next_added = load_state(ADDED + tl.minimum(place + 1, last) * (D * DV), rows, columns, D, DV)
        if TRANSITION is not None:
            total, made = next_total, next_made
            next_total = tl.load(TOTALS + tl.minimum(place + 1, last))
            next_made = _made_of(TRANSITION, next_total, tl.minimum(place + 1, last), rows, D)
            if total == 0.0:
                added = add_dot(made, S, added, SIMULATED)
            S = added
        elif CHANNELS:
            S = S * tl.math.exp2(tl.load(TOTALS + place * D + rows, mask=rows < D, other=0.0))[:, None] + added
        else:
            S = S * tl.math.exp2(tl.load(TOTALS + place)) + added
        store_state(START + (bh * segments + n + 1) * (D * DV), rows, columns, S, D, DV)
        place += 1
