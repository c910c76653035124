"""Gradients of one chunk, from the state before it, S, and the gradient of the state behind it, D.

With F_ij = e^(G_i - G_j), dA = scale dO u^T where j <= i, and where writes correct dB = -(beta z) u^T where j < i:

    dq = scale e^G (dO S^T) + (dA F) k
    dk = e^(G_end - G) (u D^T) - e^G (beta z S^T) + (dA F)^T q + (dB F) k + (dB F)^T k
    dbeta_i = z_i.v_i - (k_i e^(G_i)).(z_i S^T) - sum_j (z u^T)_ij B_ij
    dG: e^G counts with a plus, e^-G with a minus, and e^(G_end) for the last token; dg_t = sum over i >= t of dG_i

Of the products inside a chunk dG takes the sums over rows and columns of dA F (q k^T) without the diagonal, which would
cancel. A product's transpose is computed as such: dots of transposed results go wrong on Hopper GPUs before Triton
3.7.1. Where channels decay by themselves, `inner` adds what is inside of the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import (
    LENGTHS,
    add_dot,
    between,
    between_transposed,
    dot,
    end_of,
    load,
    load_state,
    store,
    sums,
)


@triton.jit(do_not_specialize=LENGTHS)
def gradients(
    Q, K, V, G, BETA, B, U, Z, DO, STATES, D_STATES, DQ, DK, DG, DBETA, DA, DB, q_b, q_h, q_n, k_b, k_h, k_n, v_b,
    v_h, v_n, do_b, do_h, do_n, kv_len, ahead, heads, group, scale, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr,
    SIMULATED: tl.constexpr,
):  # fmt: skip
    """Results have a row for each head of the queries, one after the other. U and Z are absent where nothing is
    corrected. With CHANNELS dq, dk and dG are float32 and not yet whole; DA and DB, beside them, are for `inner`."""
    chunks = tl.cdiv(kv_len, C)
    c, bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    wide, kv_h = bh.to(tl.int64), h // group
    first = c * C
    q_first, q_len = first - ahead, kv_len - ahead
    rows, tokens = tl.arange(0, PD), tl.arange(0, C)
    at = first + tokens
    chunk = wide * chunks + c
    place = chunk * C * C + tokens[:, None] * C + tokens[None, :]
    K += (b * k_b + kv_h * k_h) * UNIT
    V += (b * v_b + kv_h * v_h) * UNIT
    Q += (b * q_b + h * q_h) * UNIT
    DO += (b * do_b + h * do_h) * UNIT
    STATES += chunk * (D * DV)
    D_STATES += chunk * (D * DV)
    dtype = K.dtype.element_ty

    if U is not None:
        beta = tl.load(BETA + chunk * C + tokens)[:, None]
        zs = tl.zeros([C, PD], tl.float32)
        zu = tl.zeros([C, C], tl.float32)
        zv = tl.zeros([C], tl.float32)
    dq = tl.zeros([C, PD], tl.float32)
    dk = tl.zeros([C, PD], tl.float32)
    da = tl.zeros([C, C], tl.float32)
    common = tl.zeros([PD], tl.float32)
    for tile in tl.range(0, (DV + BV - 1) // BV):
        columns = tile * BV + tl.arange(0, BV)
        do = load(DO, do_n * UNIT, q_first, q_len, columns, C, DV)
        s = load_state(STATES, rows, columns, D, DV)
        d = load_state(D_STATES, rows, columns, D, DV)
        dq = add_dot(do, tl.trans(s), dq, SIMULATED)
        if U is None:
            u = load(V, v_n * UNIT, first, kv_len, columns, C, DV)
        else:
            v = load(V, v_n * UNIT, first, kv_len, columns, C, DV)
            u = load(U + wide * kv_len * DV, DV, first, kv_len, columns, C, DV)
            z = load(Z + wide * kv_len * DV, DV, first, kv_len, columns, C, DV)
            zs = add_dot(z, tl.trans(s), zs, SIMULATED)
            zu = add_dot(z, tl.trans(u), zu, SIMULATED)
            zv += tl.sum(z.to(tl.float32) * v.to(tl.float32), 1)
        da = add_dot(do, tl.trans(u), da, SIMULATED)
        dk = add_dot(u, tl.trans(d), dk, SIMULATED)
        common += tl.sum(s.to(tl.float32) * d.to(tl.float32), 1)

    k = load(K, k_n * UNIT, first, kv_len, rows, C, D)
    q = load(Q, q_n * UNIT, q_first, q_len, rows, C, D)
    if CHANNELS:
        sum_g = tl.load(G + (chunk * C + tokens)[:, None] * D + rows[None, :], mask=(rows < D)[None, :], other=0.0)
        end = end_of(sum_g, C)
    else:
        by_token, end = sums(None if G is None else G + chunk * C, C)
        sum_g = by_token[:, None]
    rise = tl.math.exp2(sum_g)
    dq, dk = dq * (scale * rise), dk * tl.math.exp2(end - sum_g)
    within = tokens[:, None] >= tokens[None, :]
    strictly = tokens[:, None] > tokens[None, :]
    gone, own = k * dk, q * dq - k * dk
    if CHANNELS:
        tl.store(DA + place, tl.where(within, da * scale, 0.0).to(dtype))
    else:
        apart = between(by_token, C)
        da *= scale * apart
        met = tl.where(strictly, da * dot(q, tl.trans(k), SIMULATED), 0.0)
        dq = add_dot(da.to(dtype), k, dq, SIMULATED)
    store(DQ + wide * q_len * D, D, q_first, q_len, rows, dq, C, D)
    if U is not None:
        zs *= rise
        own -= beta * (k * zs)
        dk -= beta * zs
        if CHANNELS:
            pair = tl.load(B + place).to(tl.float32)
            tl.store(DB + place, tl.where(strictly, -beta * zu, 0.0).to(dtype))
        else:
            apart = tl.where(strictly, apart, 0.0)
            pair = dot(k, tl.trans(k), SIMULATED) * apart
            met -= beta * zu * pair
            dk = add_dot((-beta * zu * apart).to(dtype), k, dk, SIMULATED)
        dbeta = zv - tl.sum(k * zs, 1) - tl.sum(zu * pair, 1)
        tl.store(DBETA + wide * kv_len + at, dbeta, mask=at < kv_len)
    if CHANNELS:
        last = (tokens == C - 1)[:, None]
        own += tl.where(last, tl.sum(gone, 0)[None, :] + common[None, :] * tl.math.exp2(end), 0.0)
        tl.store(DG + (chunk * C + tokens)[:, None] * D + rows[None, :], own, mask=(rows < D)[None, :])
    else:
        if DG is not None:
            own_g = tl.sum(own, 1) + tl.sum(met, 1) - tl.sum(met, 0)
            later = tl.sum(common) * tl.math.exp2(end) + tl.sum(tl.sum(gone, 1))
            tl.store(DG + wide * kv_len + at, tl.cumsum(own_g, 0, reverse=True) + later, mask=at < kv_len)
        da_t = tl.zeros([C, C], tl.float32)
        zu_t = tl.zeros([C, C], tl.float32)
        for tile in tl.range(0, (DV + BV - 1) // BV):
            columns = tile * BV + tl.arange(0, BV)
            do = load(DO, do_n * UNIT, q_first, q_len, columns, C, DV)
            if U is None:
                u = load(V, v_n * UNIT, first, kv_len, columns, C, DV)
            else:
                u = load(U + wide * kv_len * DV, DV, first, kv_len, columns, C, DV)
                z = load(Z + wide * kv_len * DV, DV, first, kv_len, columns, C, DV)
                zu_t = add_dot(u, tl.trans(z), zu_t, SIMULATED)
            da_t = add_dot(u, tl.trans(do), da_t, SIMULATED)
        apart_t = between_transposed(by_token, C)
        dk = add_dot((da_t * (scale * apart_t)).to(dtype), q, dk, SIMULATED)
        if U is not None:
            apart_t = tl.where(tokens[:, None] < tokens[None, :], -tl.trans(beta) * apart_t, 0.0)
            dk = add_dot((zu_t * apart_t).to(dtype), k, dk, SIMULATED)
    store(DK + wide * kv_len * D, D, first, kv_len, rows, dk, C, D)
