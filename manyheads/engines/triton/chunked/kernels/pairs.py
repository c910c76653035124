"""What the tokens of a chunk are to each other, and to what is before and behind it, where each channel of the keys
decays by itself.

    A_ij = q_i . (k_j e^(G_i - G_j)) where j <= i,    B_ij = k_i . (k_j e^(G_i - G_j)) where j < i

If the chunk's decays are of a size as models have them, both exponents count from half way, R: e^(G_i - R) e^(R - G_j)
are numbers that the dtype holds, and all is one product of matrices. Else a chunk is cut into halves, these into
halves, and so on to single tokens. Between the first half of a block and the second both exponents count from the end
of the first, and neither is above 0; so all blocks of a size are one product, of which what is between halves is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import (
    dot,
    end_of,
    fade_of,
    in_base_two,
    load,
    note_fade,
    store,
)

NARROW = tl.constexpr(32)  # channels at a time where halves meet: compiled sooner than all, and without spills
LEAST, LEAST_HALF = tl.constexpr(-120.0), tl.constexpr(-8.0)
AT_ONCE = 16  # chunks that a program of `rapid` looks at


@triton.jit
def moderate(least, HALF: tl.constexpr):
    """Whether half of a chunk's decays, which are `least` or more, leave the dtype, float16 if HALF, room for what 2 to
    their power multiplies."""
    return least >= (LEAST_HALF if HALF else LEAST)


@triton.jit(do_not_specialize=["kv_len", "ahead", "heads", "w_b", "w_h", "w_n"])
def pairs(
    Q, K, G, BETA, SUMS, A, B, Q_IN, K_IN, K_OUT, ENDS, FADES, q_b, q_h, q_n, k_b, k_h, k_n, g_b, g_h, g_n, w_b, w_h,
    w_n, kv_len, ahead, heads, group, D: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    KEEP: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One chunk, BK channels at a time. G: log decays [batch, heads, kv_len, D]; SUMS: G of the formulas, whole if
    KEEP. Q_IN and K_IN: q and k times e^G; K_OUT: k times e^(G_end - G); rows of D numbers, one for each token of each
    head. ENDS: G_end. FADES: how much longer, in bits, the chunk makes a state at most. B and K_IN are absent where
    nothing is corrected. Without Q_IN and K_OUT, for who makes them, A is only left behind of chunks whose decays are
    not moderate."""
    chunks = tl.cdiv(kv_len, C)
    c, bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first, wide = c * C, bh.to(tl.int64)
    q_first, q_len = first - ahead, kv_len - ahead
    Q += (b * q_b + h * q_h) * UNIT
    K += (b * k_b + h // group * k_h) * UNIT
    G += b * g_b + h * g_h
    chunk = wide * chunks + c
    SUMS += chunk * C * D
    dtype = K.dtype.element_ty
    tokens = tl.arange(0, C)
    place = chunk * C * C + tokens[:, None] * C + tokens[None, :]

    of_q = tl.zeros([C, C], tl.float32)
    of_k = tl.zeros([C, C], tl.float32)
    slowest = tl.full([C], float("-inf"), tl.float32)
    size = tl.zeros([C], tl.float32)
    least, most = 0.0, float("-inf")
    room = -0.5 * (LEAST_HALF if dtype == tl.float16 else LEAST)  # what is beyond it is not used
    for n in tl.range(0, PD // BK):
        columns = n * BK + tl.arange(0, BK)
        there = (columns < D)[None, :]
        g = in_base_two(load(G, g_n, first, kv_len, columns, C, D))
        sum_g = tl.cumsum(g, 0)
        end = end_of(sum_g, C)
        if KEEP:
            tl.store(SUMS + tokens[:, None] * D + columns[None, :], sum_g, mask=there)
        tl.store(ENDS + chunk * D + columns[None, :], end, mask=there)
        least = tl.minimum(least, tl.min(tl.min(end, 1), 0))
        most = tl.maximum(most, tl.max(tl.max(tl.where(there, end, float("-inf")), 1), 0))
        slowest = tl.maximum(slowest, tl.max(tl.where(there, g, float("-inf")), 1))
        if Q_IN is not None:
            q = load(Q, q_n * UNIT, q_first, q_len, columns, C, D)
        if B is not None or K_OUT is not None:
            k = load(K, k_n * UNIT, first, kv_len, columns, C, D)
            risen = sum_g - 0.5 * end
            left, right = tl.math.exp2(tl.minimum(risen, room)), tl.math.exp2(tl.minimum(-risen, room))
            others = tl.trans((k * right).to(dtype))
        if B is not None:
            size += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
            of_k += dot((k * left).to(dtype), others, SIMULATED)
        if Q_IN is not None:
            of_q += dot((q * left).to(dtype), others, SIMULATED)
            rise = tl.math.exp2(sum_g)
            store(Q_IN + wide * q_len * D, D, q_first, q_len, columns, q * rise, C, D)
            if K_IN is not None:
                store(K_IN + wide * kv_len * D, D, first, kv_len, columns, k * rise, C, D)
            store(K_OUT + wide * kv_len * D, D, first, kv_len, columns, k * tl.math.exp2(end - sum_g), C, D)
    if BETA is None:
        fade = tl.where(tl.max(slowest, 0) > 0.0, float("inf"), most)
    else:
        at = first + tokens
        beta = tl.load(BETA + b * w_b + h * w_h + at.to(tl.int64) * w_n, mask=at < kv_len, other=0.0).to(tl.float32)
        fade = fade_of(slowest, size, beta)
    note_fade(FADES + wide * (chunks + 1), chunks, c, fade)
    if moderate(least, dtype == tl.float16):
        if Q_IN is not None:
            tl.store(A + place, tl.where(tokens[:, None] >= tokens[None, :], of_q, 0.0).to(dtype))
        if B is not None:
            tl.store(B + place, tl.where(tokens[:, None] > tokens[None, :], of_k, 0.0).to(dtype))
    else:
        of_q, of_k = _by_halves(
            Q, K, G, SUMS, q_n, k_n, g_n, first, kv_len, ahead, D, PD, BK, C, B is not None, UNIT, SIMULATED
        )
        tl.store(A + place, of_q.to(dtype))
        if B is not None:
            tl.store(B + place, of_k.to(dtype))


@triton.jit(do_not_specialize=["total", "kv_len", "ahead", "heads", "scale"])
def rapid(
    Q, K, V, G, SUMS, A, O, ENDS, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, total,
    kv_len, ahead, heads, group, scale, D: tl.constexpr, PD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, AT_ONCE: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """AT_ONCE of all `total` chunks, of which ENDS are known: A and SUMS of those whose decays are not moderate; or,
    where there is O, scale A v is added to it, and SUMS have room for one chunk of each program."""
    chunks = tl.cdiv(kv_len, C)
    rows, tokens, each = tl.arange(0, PD), tl.arange(0, C), tl.arange(0, AT_ONCE)
    at = tl.program_id(0) + each * tl.num_programs(0)
    there = (at < total)[:, None] & (rows < D)[None, :]
    least = tl.min(tl.load(ENDS + at.to(tl.int64)[:, None] * D + rows[None, :], mask=there, other=0.0), 1)
    fast = (~moderate(least, K.dtype.element_ty == tl.float16)).to(tl.int32)
    if tl.max(fast, 0) == 0:
        return
    for n in tl.range(0, AT_ONCE):
        if tl.sum(tl.where(each == n, fast, 0), 0) > 0:
            chunk = (tl.program_id(0) + n * tl.num_programs(0)).to(tl.int64)
            c, bh = chunk % chunks, chunk // chunks
            b, h, first = bh // heads, bh % heads, c * C
            sums = SUMS + (chunk if O is None else tl.program_id(0)) * C * D
            tl.debug_barrier()  # what was read of the sums of the chunk before may be written to
            of_q, _ = _by_halves(
                Q + (b * q_b + h * q_h) * UNIT, K + (b * k_b + h // group * k_h) * UNIT, G + b * g_b + h * g_h,
                sums, q_n, k_n, g_n, first, kv_len, ahead, D, PD, BK, C, False, UNIT, SIMULATED,
            )  # fmt: skip
            if O is None:
                tl.store(A + chunk * C * C + tokens[:, None] * C + tokens[None, :], of_q.to(A.dtype.element_ty))
            else:
                v_at, o_at = V + (b * v_b + h // group * v_h) * UNIT, O + (b * o_b + h * o_h) * UNIT
                for part in tl.range(0, tl.cdiv(DV, BV)):
                    columns = part * BV + tl.arange(0, BV)
                    v = load(v_at, v_n * UNIT, first, kv_len, columns, C, DV)
                    o = load(o_at, o_n * UNIT, first - ahead, kv_len - ahead, columns, C, DV)
                    more = scale * dot(of_q.to(v.dtype), v, SIMULATED)
                    store(o_at, o_n * UNIT, first - ahead, kv_len - ahead, columns, o + more, C, DV)


@triton.jit
def _by_halves(
    Q, K, G, SUMS, q_n, k_n, g_n, first, kv_len, ahead, D: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, BOTH: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """A and, if BOTH, B of a chunk of any decays, from halves that meet."""
    PART: tl.constexpr = BK if BK < NARROW else NARROW
    tokens = tl.arange(0, C)
    dtype = K.dtype.element_ty
    of_q = tl.zeros([C, C], tl.float32)
    of_k = tl.zeros([C, C], tl.float32)
    for n in tl.range(0, PD // PART):
        columns = n * PART + tl.arange(0, PART)
        q = load(Q, q_n * UNIT, first - ahead, kv_len - ahead, columns, C, D)
        k = load(K, k_n * UNIT, first, kv_len, columns, C, D)
        sum_g = tl.cumsum(in_base_two(load(G, g_n, first, kv_len, columns, C, D)), 0)
        tl.store(SUMS + tokens[:, None] * D + columns[None, :], sum_g, mask=(columns < D)[None, :])
        tl.debug_barrier()  # what other threads wrote to SUMS is read
        same = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        of_q += tl.where(tokens[:, None] == tokens[None, :], same[:, None], 0.0)
        for level in tl.range(0, 6 if C == 64 else 5):
            fade = fade_to(sum_g, SUMS, level, columns, D, C)
            others = tl.trans((k * fade).to(dtype))
            meet = halves(tokens, level)
            of_q += tl.where(meet, dot((q * fade).to(dtype), others, SIMULATED), 0.0)
            if BOTH:
                of_k += tl.where(meet, dot((k * fade).to(dtype), others, SIMULATED), 0.0)
    return of_q, of_k


@triton.jit
def halves(tokens, level):
    """Which tokens of the second half of a block of 2^(level + 1) meet which of its first half."""
    block = tokens >> level
    return (block[:, None] == block[None, :] + 1) & ((block & 1) == 1)[:, None]


@triton.jit
def fade_to(sum_g, SUMS, level, columns, D: tl.constexpr, C: tl.constexpr):
    """What is left of each channel between a token and the end of the first half of its block of 2^(level + 1)."""
    tokens = tl.arange(0, C)
    turn = ((tokens >> level | 1) << level) - 1
    turn_g = tl.load(SUMS + turn[:, None] * D + columns[None, :], mask=(columns < D)[None, :], other=0.0)
    apart = sum_g - turn_g
    return tl.math.exp2(tl.where((tokens > turn)[:, None], apart, -apart))
