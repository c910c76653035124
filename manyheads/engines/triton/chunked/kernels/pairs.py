"""What the tokens of a chunk are to each other, and to what is before and behind it, where each channel of the keys
decays by itself.

    A_ij = q_i . (k_j e^(G_i - G_j)) where j <= i,    B_ij = k_i . (k_j e^(G_i - G_j)) where j < i

If the chunk's decays are of a size as models have them, both exponents count from half way, R: e^(G_i - R) e^(R - G_j)
are numbers that the dtype holds, and all is one product of matrices. Else a chunk is cut into blocks of 16. Between a
block of keys and what comes behind it both exponents count from the block's end, neither above 0; inside a block there
is no such point that would not overflow, and the differences are taken pair by pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import LOG2E, dot, end_of, fade_of, load, note_fade, store

SUB = tl.constexpr(16)


@triton.jit
def moderate(end, HALF: tl.constexpr):
    """Whether half of a chunk's decays leave the dtype, float16 if HALF, room for what 2 to their power multiplies."""
    return tl.min(tl.min(end, 1), 0) >= (-8.0 if HALF else -120.0)


@triton.jit(do_not_specialize=["kv_len", "ahead", "heads", "w_b", "w_h", "w_n"])
def pairs(
    Q, K, G, BETA, SUMS, A, B, Q_IN, K_IN, K_OUT, ENDS, FADES, q_b, q_h, q_n, k_b, k_h, k_n, g_b, g_h, g_n, w_b, w_h,
    w_n, kv_len, ahead, heads, group, D: tl.constexpr, PD: tl.constexpr, C: tl.constexpr, KEEP: tl.constexpr,
    UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One chunk. G: log decays [batch, heads, kv_len, D]; SUMS: G of the formulas, whole if KEEP. Q_IN and K_IN: q and
    k times e^G; K_OUT: k times e^(G_end - G); rows of D numbers, one for each token of each head. ENDS: G_end. FADES:
    how much longer, in bits, the chunk makes a state at most. B and K_IN are absent where nothing is corrected."""
    chunks = tl.cdiv(kv_len, C)
    c, bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first, wide = c * C, bh.to(tl.int64)
    Q += (b * q_b + h * q_h) * UNIT
    K += (b * k_b + h // group * k_h) * UNIT
    G += b * g_b + h * g_h
    chunk = wide * chunks + c
    SUMS += chunk * C * D
    A += chunk * C * C
    if B is not None:
        B += chunk * C * C
    dtype = K.dtype.element_ty
    columns, tokens = tl.arange(0, PD), tl.arange(0, C)

    g = load(G, g_n, first, kv_len, columns, C, D).to(tl.float32)
    sum_g = tl.cumsum(g * LOG2E, 0)
    end = end_of(sum_g, C)
    slow = not moderate(end, dtype == tl.float16)
    if KEEP or slow:
        tl.store(SUMS + tokens[:, None] * D + columns[None, :], sum_g, mask=(columns < D)[None, :])
    tl.store(ENDS + chunk * D + columns[None, :], end, mask=(columns < D)[None, :])
    q = load(Q, q_n * UNIT, first - ahead, kv_len - ahead, columns, C, D)
    k = load(K, k_n * UNIT, first, kv_len, columns, C, D)
    if BETA is None:
        longest = tl.max(tl.max(tl.where((columns < D)[None, :], end, float("-inf")), 1), 0)
        fade = tl.where(tl.max(tl.max(g, 1), 0) > 0.0, float("inf"), longest)
    else:
        at = first + tokens
        beta = tl.load(BETA + b * w_b + h * w_h + at.to(tl.int64) * w_n, mask=at < kv_len, other=0.0).to(tl.float32)
        slowest = tl.max(tl.where((columns < D)[None, :], g * LOG2E, float("-inf")), 1)
        fade = fade_of(slowest, tl.sum(k.to(tl.float32) * k.to(tl.float32), 1), beta)
    note_fade(FADES + wide * (chunks + 1), chunks, c, fade)
    rise = tl.math.exp2(sum_g)
    store(Q_IN + wide * (kv_len - ahead) * D, D, first - ahead, kv_len - ahead, columns, q * rise, C, D)
    if K_IN is not None:
        store(K_IN + wide * kv_len * D, D, first, kv_len, columns, k * rise, C, D)
    store(K_OUT + wide * kv_len * D, D, first, kv_len, columns, k * tl.math.exp2(end - sum_g), C, D)
    if not slow:
        left, right = tl.math.exp2(sum_g - 0.5 * end), tl.math.exp2(0.5 * end - sum_g)
        others = tl.trans((k * right).to(dtype))
        place = tokens[:, None] * C + tokens[None, :]
        a = dot((q * left).to(dtype), others, SIMULATED)
        tl.store(A + place, tl.where(tokens[:, None] >= tokens[None, :], a, 0.0).to(dtype))
        if B is not None:
            b_ = dot((k * left).to(dtype), others, SIMULATED)
            tl.store(B + place, tl.where(tokens[:, None] > tokens[None, :], b_, 0.0).to(dtype))
    else:
        _in_blocks(q, k, sum_g, Q, K, G, SUMS, A, B, q_n, k_n, g_n, first, kv_len, ahead, D, PD, C, UNIT, SIMULATED)


@triton.jit
def _in_blocks(
    q, k, sum_g, Q, K, G, SUMS, A, B, q_n, k_n, g_n, first, kv_len, ahead, D: tl.constexpr, PD: tl.constexpr,
    C: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """A and B in blocks of 16."""
    dtype = K.dtype.element_ty
    columns, tokens, within = tl.arange(0, PD), tl.arange(0, C), tl.arange(0, SUB)
    for block in tl.static_range(C // SUB - 1):  # type: ignore[misc]  (its types are for Python)
        behind = (tokens >= (block + 1) * SUB)[:, None]
        turn = tl.sum(tl.where((tokens == block * SUB + SUB - 1)[:, None], sum_g, 0.0), 0, keep_dims=True)
        own = load(K, k_n * UNIT, first + block * SUB, kv_len, columns, SUB, D)
        own_g = load(G, g_n, first + block * SUB, kv_len, columns, SUB, D).to(tl.float32) * LOG2E
        own = own * tl.math.exp2(tl.cumsum(own_g, 0, reverse=True) - own_g)  # what comes behind it in its block
        own = tl.trans(own.to(dtype))
        left = tl.math.exp2(tl.where(behind, sum_g - turn, float("-inf")))
        place = tokens[:, None] * C + (within + block * SUB)[None, :]
        tl.store(A + place, dot((q * left).to(dtype), own, SIMULATED).to(dtype), mask=behind)
        if B is not None:
            tl.store(B + place, dot((k * left).to(dtype), own, SIMULATED).to(dtype), mask=behind)

    # Inside of blocks: each token of a block meets number n of it, in all blocks at once.
    tl.debug_barrier()  # what other threads wrote to SUMS is read
    of_q = tl.zeros([C, SUB], tl.float32)
    of_k = tl.zeros([C, SUB], tl.float32)
    number = tokens % SUB
    for n in tl.range(0, SUB):
        at = first + tokens - number + n
        there = (at < kv_len)[:, None] & (columns < D)[None, :]
        other = tl.load(K + at.to(tl.int64)[:, None] * (k_n * UNIT) + columns[None, :], mask=there, other=0.0)
        g_at = (tokens - number + n)[:, None] * D + columns[None, :]
        other_g = tl.load(SUMS + g_at, mask=(columns < D)[None, :], other=0.0)
        apart = tl.where((number >= n)[:, None], sum_g - other_g, float("-inf"))
        faded = other.to(tl.float32) * tl.math.exp2(apart)
        of_q = tl.where((within == n)[None, :], tl.sum(q * faded, 1, keep_dims=True), of_q)
        of_k = tl.where((within == n)[None, :], tl.sum(k * faded, 1, keep_dims=True), of_k)
    for block in tl.static_range(C // SUB):  # and what is ahead of a block is zero
        ahead_of = (tokens < block * SUB)[:, None]
        place = tokens[:, None] * C + (within + block * SUB)[None, :]
        tl.store(A + place, tl.zeros([C, SUB], tl.float32).to(dtype), mask=ahead_of)
        if B is not None:
            tl.store(B + place, tl.zeros([C, SUB], tl.float32).to(dtype), mask=ahead_of)
    place = tokens[:, None] * C + (tokens - number)[:, None] + within[None, :]
    tl.store(A + place, of_q.to(dtype))
    if B is not None:
        tl.store(B + place, tl.where(number[:, None] > within[None, :], of_k, 0.0).to(dtype))
