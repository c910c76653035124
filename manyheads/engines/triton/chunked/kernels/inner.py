"""The part of the gradients that is inside of a chunk, where each channel of the keys decays by itself.

    dq_i += sum_j dA_ij F_ij k_j,    dk_i += sum_j dB_ij F_ij k_j,    dk_j += sum_i F_ij (dA_ij q_i + dB_ij k_i)

with F_ij = e^(G_i - G_j), a number for each channel, and as kernels/pairs.py has it: a product of matrices where decays
are moderate, else, in a launch of its own, halves that meet. Channels do not mix, so a program has BK of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import LENGTHS, add_dot, dot, load, store
from manyheads.engines.triton.chunked.kernels.pairs import fade_to, halves, moderate


@triton.jit(do_not_specialize=LENGTHS)
def inner(
    Q, K, SUMS, DA, DB, DQ_PART, DK_PART, DG_PART, DQ, DK, DG, q_b, q_h, q_n, k_b, k_h, k_n, kv_len, ahead, heads,
    group, D: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, MODERATE: tl.constexpr, UNIT: tl.constexpr,
    SIMULATED: tl.constexpr,
):  # fmt: skip
    """One chunk, if its decays are moderate, or if they are not. Parts: float32, from `gradients`; DB may be absent.
    DG, float32 [batch, heads, kv_len, D], too."""
    TILES: tl.constexpr = (D + BK - 1) // BK
    chunks = tl.cdiv(kv_len, C)
    tile, c, bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES % chunks, tl.program_id(0) // TILES // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    wide = bh.to(tl.int64)
    first = c * C
    q_first, q_len = first - ahead, kv_len - ahead
    columns, tokens = tile * BK + tl.arange(0, BK), tl.arange(0, C)
    Q += (b * q_b + h * q_h) * UNIT
    K += (b * k_b + h // group * k_h) * UNIT
    chunk = wide * chunks + c
    dtype = K.dtype.element_ty
    SUMS += chunk * C * D
    there = (columns < D)[None, :]
    end = tl.load(SUMS + (C - 1) * D + columns[None, :], mask=there, other=0.0)
    if moderate(tl.min(tl.min(end, 1), 0), dtype == tl.float16) != MODERATE:
        return
    DA += chunk * C * C
    if DB is not None:
        DB += chunk * C * C
    q = load(Q, q_n * UNIT, q_first, q_len, columns, C, D)
    k = load(K, k_n * UNIT, first, kv_len, columns, C, D)
    sum_g = tl.load(SUMS + tokens[:, None] * D + columns[None, :], mask=there, other=0.0)
    if MODERATE:
        left, right = tl.math.exp2(sum_g - 0.5 * end), tl.math.exp2(0.5 * end - sum_g)
        keys, others = (k * right).to(dtype), tokens[None, :]
        # Not masked when they are loaded: that takes them number by number.
        square, earlier = tokens[:, None] * C + others, tokens[:, None] > others
        da = tl.where(earlier, tl.load(DA + square), 0.0)
        plus_q = dot(da, keys, SIMULATED) * left
        minus = dot(tl.trans(da), (q * left).to(dtype), SIMULATED)
        plus_k = tl.zeros([C, BK], tl.float32)
        if DB is not None:
            db = tl.where(earlier, tl.load(DB + square), 0.0)
            plus_k = dot(db, keys, SIMULATED) * left
            minus = add_dot(tl.trans(db), (k * left).to(dtype), minus, SIMULATED)
        minus *= right
    else:
        plus_q, plus_k, minus = _by_halves(q, k, sum_g, SUMS, DA, DB, columns, D, BK, C, SIMULATED)

    same = tl.load(DA + tokens * (C + 1)).to(tl.float32)[:, None]  # a token and itself: nothing decays
    dq = load(DQ_PART + wide * q_len * D, D, q_first, q_len, columns, C, D) + plus_q + same * k
    dk = load(DK_PART + wide * kv_len * D, D, first, kv_len, columns, C, D) + plus_k + minus + same * q
    store(DQ + wide * q_len * D, D, q_first, q_len, columns, dq, C, D)
    store(DK + wide * kv_len * D, D, first, kv_len, columns, dk, C, D)
    if DG is not None:
        own = tl.load(DG_PART + (chunk * C + tokens)[:, None] * D + columns[None, :], mask=there, other=0.0)
        own += q * plus_q + k * (plus_k - minus)
        store(DG + wide * kv_len * D, D, first, kv_len, columns, tl.cumsum(own, 0, reverse=True), C, D)


@triton.jit
def _by_halves(
    q, k, sum_g, SUMS, DA, DB, columns, D: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """The three sums, from halves that meet."""
    tokens = tl.arange(0, C)
    dtype = k.dtype
    plus_q = tl.zeros([C, BK], tl.float32)
    plus_k = tl.zeros([C, BK], tl.float32)
    minus = tl.zeros([C, BK], tl.float32)
    square = tokens[:, None] * C + tokens[None, :]
    for level in tl.range(0, 6 if C == 64 else 5):
        fade = fade_to(sum_g, SUMS, level, columns, D, C)
        keys = (k * fade).to(dtype)
        meet = halves(tokens, level)
        da = tl.where(meet, tl.load(DA + square), 0.0)
        plus_q += dot(da, keys, SIMULATED) * fade
        lost = dot(tl.trans(da), (q * fade).to(dtype), SIMULATED)
        if DB is not None:
            db = tl.where(meet, tl.load(DB + square), 0.0)
            plus_k += dot(db, keys, SIMULATED) * fade
            lost = add_dot(tl.trans(db), keys, lost, SIMULATED)
        minus += lost * fade
    return plus_q, plus_k, minus
