"""The backward kernels: first delta, then keys' and values' gradients, then queries'. No atomics: the same every run.

With p = softmax, dp = dO V^T and delta = rowsum(dO O) - dlse, the score's gradient is p (dp - delta), and dp without a
normaliser; times the derivative of the score function it is the product's. Keys walk the transposed lists with all
scores transposed: a product of a transposed result of another product is what Triton gets wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.forward import LOG2E, allowed, dot, list_of, load_tile, positions, store_tile


@triton.jit
def delta(
    O, DO, DLSE, DELTA, o_b, o_h, o_n, do_b, do_h, do_n, dlse_b, dlse_h, dlse_n, q_len, heads, HAS_DLSE: tl.constexpr,
    DV: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """rowsum(dO O) - dlse."""
    tiles = tl.cdiv(q_len, BM)
    bh = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BM
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows = tl.arange(0, BM)
    x, wide = first + rows, first.to(tl.int64)
    o_n, do_n = o_n * UNIT, do_n * UNIT
    o = load_tile(O + (b * o_b + h * o_h) * UNIT + wide * o_n, o_n, rows, q_len - first, DV, PV, True)
    do = load_tile(DO + (b * do_b + h * do_h) * UNIT + wide * do_n, do_n, rows, q_len - first, DV, PV, True)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        dlse = tl.load(DLSE + b * dlse_b + h * dlse_h + x.to(tl.int64) * dlse_n, mask=x < q_len, other=0.0)
        value -= dlse.to(tl.float32)
    tl.store(DELTA + bh.to(tl.int64) * q_len + x, value, mask=x < q_len)


@triton.jit
def load_row(AT, x, q_len, BOUNDED: tl.constexpr):
    """A number of each query."""
    if BOUNDED:
        return tl.load(AT + x, mask=x < q_len, other=0.0)
    else:
        return tl.load(AT + x)


@triton.jit
def base_two(LSE, x, q_len, BOUNDED: tl.constexpr):
    """lse in base two, 0 where nothing is seen."""
    lse = load_row(LSE, x, q_len, BOUNDED)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def weights(
    s, lse, b, h, i, j, x, y, q_len, kv_len, scale, A, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr,
    NORMALISER: tl.constexpr, FOLDED: tl.constexpr, PARTIAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """From products s (less lse, if FOLDED): what multiplies the values, but for the score's sign; the derivative of
    the score function, times the softmax if there is one; and the sign, where it is kept apart."""
    sign = 1.0
    if FOLDED:
        e = s * (scale * LOG2E)
    else:
        t = s * scale
        if SCORE is not None:
            t = SCORE(t, b, h, i, j, A)
        if NORMALISER == "signed":
            sign = tl.where(t > 0, 1.0, tl.where(t < 0, -1.0, 0.0))
            t = tl.abs(t)
        e = t * LOG2E - lse
    derivative = 1.0
    if DSCORE is not None:
        derivative = DSCORE(s * scale, b, h, i, j, A)
    seen = allowed(b, h, i, j, x, y, q_len, kv_len, A, MASK, RAGGED)
    if NORMALISER == "none":
        p, slope = t, tl.zeros_like(t) + derivative
        if PARTIAL:
            p = tl.where(seen, p, 0.0)
    else:
        if PARTIAL:
            e = tl.where(seen, e, float("-inf"))
        p = tl.math.exp2(e)
        slope = p * derivative
    if PARTIAL:  # what lies outside may have any derivative, NaN as well
        slope = tl.where(seen, slope, 0.0)
    return p, slope, sign


@triton.jit
def score_gradient(left, right, slope, sign, row_delta, NORMALISER: tl.constexpr, SIMULATED: tl.constexpr):
    """slope (dp - delta), where dp = left @ right; row_delta has a row or a column for each query."""
    dp = tl.zeros([left.shape[0], right.shape[1]], tl.float32)
    if NORMALISER == "softmax":
        dp = dp - row_delta
    dp = dot(left, right, dp, SIMULATED)
    if NORMALISER == "signed":
        dp = (dp * sign - row_delta) * sign
    return slope * dp


@triton.jit
def add_to_keys(
    dk, dv, k, v, Q, DO, LSE, DELTA, q_n, do_n, tile, j, y, b, h, Q_AT, q_start, q_len, kv_len, scale, A,
    MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, NORMALISER: tl.constexpr, FOLDED: tl.constexpr,
    PARTIAL: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One tile of queries, scores as [keys, queries]."""
    first = tile * BM
    rows = tl.arange(0, BM)
    x = first + rows
    q = load_tile(Q + first.to(tl.int64) * q_n, q_n, rows, q_len - first, D, PD, PARTIAL)
    lse = base_two(LSE, x, q_len, PARTIAL)[None, :]
    s = tl.zeros([BN, BM], tl.float32)
    if FOLDED:  # a sum that starts at what is to be subtracted needs no register for it later
        s = s - lse / (scale * LOG2E)
    s = dot(k, tl.trans(q), s, SIMULATED)
    i = positions(Q_AT, q_start, x, q_len, Q_GIVEN)[None, :]
    p, slope, sign = weights(
        s, lse, b, h, i, j, x[None, :], y, q_len, kv_len, scale, A, MASK, SCORE, DSCORE, NORMALISER, FOLDED, PARTIAL,
        Q_GIVEN or KV_GIVEN,
    )  # fmt: skip
    do = load_tile(DO + first.to(tl.int64) * do_n, do_n, rows, q_len - first, DV, PV, PARTIAL)
    dv = dot((p * sign).to(do.dtype), do, dv, SIMULATED)
    row_delta = load_row(DELTA, x, q_len, PARTIAL)[None, :]
    ds = score_gradient(v, tl.trans(do), slope, sign, row_delta, NORMALISER, SIMULATED)
    dk = dot(ds.to(q.dtype), q, dk, SIMULATED)
    return dk, dv


@triton.jit
def keys(
    Q, K, V, DO, LSE, DELTA, DK, DV_, Q_AT, KV_AT, COUNTS, LISTS, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b,
    do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, qat_b, kvat_b, list_b, list_h, q_start, kv_start, q_len, kv_len,
    heads, group, scale, NORMALISER: tl.constexpr, FOLDED: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIMULATED: tl.constexpr, UNIT: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over all query heads that share it."""
    tiles = tl.cdiv(kv_len, BN)
    tile = tl.program_id(0) % tiles  # under causal masks the first keys have the most queries
    bh = tl.program_id(0) // tiles
    kv_heads = heads // group
    b, kv_h = bh // kv_heads, bh % kv_heads
    wide_b, wide_h = b.to(tl.int64), kv_h.to(tl.int64)
    first = tile * BN
    wide = first.to(tl.int64)
    rows = tl.arange(0, BN)
    y = (first + rows)[:, None]
    q_n, k_n, v_n, do_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, do_n * UNIT
    k = load_tile(K + (wide_b * k_b + wide_h * k_h) * UNIT + wide * k_n, k_n, rows, kv_len - first, D, PD, True)
    v = load_tile(V + (wide_b * v_b + wide_h * v_h) * UNIT + wide * v_n, v_n, rows, kv_len - first, DV, PV, True)
    j = positions(KV_AT + wide_b * kvat_b, kv_start, first + rows, kv_len, KV_GIVEN)[:, None]
    Q_AT += wide_b * qat_b
    dk = tl.zeros([BN, PD], tl.float32)
    dv = tl.zeros([BN, PV], tl.float32)
    for member in tl.range(0, group):
        h = kv_h * group + member
        q_at = Q + (wide_b * q_b + h.to(tl.int64) * q_h) * UNIT
        do_at = DO + (wide_b * do_b + h.to(tl.int64) * do_h) * UNIT
        line = (b * heads + h).to(tl.int64) * q_len
        row = b * list_b + h * list_h + tile
        list_at, partial, full = list_of(COUNTS, LISTS, row, tl.cdiv(q_len, BM))
        for n in tl.range(0, partial):
            other = tl.load(list_at + n)
            dk, dv = add_to_keys(
                dk, dv, k, v, q_at, do_at, LSE + line, DELTA + line, q_n, do_n, other, j, y, b, h, Q_AT, q_start,
                q_len, kv_len, scale, A, MASK, SCORE, DSCORE, NORMALISER, FOLDED, True, Q_GIVEN, KV_GIVEN, D, DV, PD,
                PV, BM, BN, SIMULATED,
            )  # fmt: skip
        for n in tl.range(0, full):
            other = tl.load(list_at + partial + n)
            dk, dv = add_to_keys(
                dk, dv, k, v, q_at, do_at, LSE + line, DELTA + line, q_n, do_n, other, j, y, b, h, Q_AT, q_start,
                q_len, kv_len, scale, A, MASK, SCORE, DSCORE, NORMALISER, FOLDED, False, Q_GIVEN, KV_GIVEN, D, DV, PD,
                PV, BM, BN, SIMULATED,
            )  # fmt: skip
    dk = dk * scale
    dk_n, dv_n = dk_n * UNIT, dv_n * UNIT
    store_tile(DK + (wide_b * dk_b + wide_h * dk_h) * UNIT + wide * dk_n, dk_n, rows, kv_len - first, dk, D, PD)
    store_tile(DV_ + (wide_b * dv_b + wide_h * dv_h) * UNIT + wide * dv_n, dv_n, rows, kv_len - first, dv, DV, PV)


@triton.jit
def add_to_queries(
    dq, q, do, lse, row_delta, K, V, k_n, v_n, tile, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, A,
    MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr, NORMALISER: tl.constexpr, FOLDED: tl.constexpr,
    PARTIAL: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One tile of keys."""
    first = tile * BN
    rows = tl.arange(0, BN)
    y = first + rows
    k = load_tile(K + first.to(tl.int64) * k_n, k_n, rows, kv_len - first, D, PD, PARTIAL)
    v = load_tile(V + first.to(tl.int64) * v_n, v_n, rows, kv_len - first, DV, PV, PARTIAL)
    s = tl.zeros([BM, BN], tl.float32)
    if FOLDED:
        s = s - lse / (scale * LOG2E)
    s = dot(q, tl.trans(k), s, SIMULATED)
    j = positions(KV_AT, kv_start, y, kv_len, KV_GIVEN)[None, :]
    _, slope, sign = weights(
        s, lse, b, h, i, j, x, y[None, :], q_len, kv_len, scale, A, MASK, SCORE, DSCORE, NORMALISER, FOLDED, PARTIAL,
        Q_GIVEN or KV_GIVEN,
    )  # fmt: skip
    ds = score_gradient(do, tl.trans(v), slope, sign, row_delta, NORMALISER, SIMULATED)
    return dot(ds.to(k.dtype), k, dq, SIMULATED)


@triton.jit
def queries(
    Q, K, V, DO, LSE, DELTA, DQ, Q_AT, KV_AT, COUNTS, LISTS, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h,
    do_n, dq_b, dq_h, dq_n, qat_b, kvat_b, list_b, list_h, q_start, kv_start, q_len, kv_len, heads, group, scale,
    NORMALISER: tl.constexpr, FOLDED: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
    UNIT: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr, DSCORE: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries."""
    tiles = tl.cdiv(q_len, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    wide_b, wide_h, kv_h = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    first = tile * BM
    wide = first.to(tl.int64)
    rows = tl.arange(0, BM)
    places = first + rows
    x = places[:, None]
    q_n, k_n, v_n, do_n, dq_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, do_n * UNIT, dq_n * UNIT
    q = load_tile(Q + (wide_b * q_b + wide_h * q_h) * UNIT + wide * q_n, q_n, rows, q_len - first, D, PD, True)
    do = load_tile(DO + (wide_b * do_b + wide_h * do_h) * UNIT + wide * do_n, do_n, rows, q_len - first, DV, PV, True)
    line = bh.to(tl.int64) * q_len
    lse = base_two(LSE + line, places, q_len, True)[:, None]
    row_delta = load_row(DELTA + line, places, q_len, True)[:, None]
    i = positions(Q_AT + wide_b * qat_b, q_start, places, q_len, Q_GIVEN)[:, None]
    KV_AT += wide_b * kvat_b
    K += (wide_b * k_b + kv_h * k_h) * UNIT
    V += (wide_b * v_b + kv_h * v_h) * UNIT
    dq = tl.zeros([BM, PD], tl.float32)
    row = b * list_b + h * list_h + tile
    list_at, partial, full = list_of(COUNTS, LISTS, row, tl.cdiv(kv_len, BN))
    for n in tl.range(0, partial):
        other = tl.load(list_at + n)
        dq = add_to_queries(
            dq, q, do, lse, row_delta, K, V, k_n, v_n, other, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, A,
            MASK, SCORE, DSCORE, NORMALISER, FOLDED, True, Q_GIVEN, KV_GIVEN, D, DV, PD, PV, BM, BN, SIMULATED,
        )  # fmt: skip
    for n in tl.range(0, full):
        other = tl.load(list_at + partial + n)
        dq = add_to_queries(
            dq, q, do, lse, row_delta, K, V, k_n, v_n, other, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, A,
            MASK, SCORE, DSCORE, NORMALISER, FOLDED, False, Q_GIVEN, KV_GIVEN, D, DV, PD, PV, BM, BN, SIMULATED,
        )  # fmt: skip
    at = DQ + (wide_b * dq_b + wide_h * dq_h) * UNIT + wide * dq_n
    store_tile(at, dq_n, rows, q_len - first, dq * scale, D, PD)
