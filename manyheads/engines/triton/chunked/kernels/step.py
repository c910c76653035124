"""One token: the state forgets, is written and is read, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import LENGTHS, LOG2E, load_state, store_state


@triton.jit(do_not_specialize=LENGTHS)
def step(
    Q, K, V, G, BETA, STATE, O, END, q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, w_b, w_h, heads, group, scale,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, BV: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """BV columns of a head's state. o is [batch, heads, 1, DV] without gaps."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    tile, bh = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, columns = tl.arange(0, PD), tile * BV + tl.arange(0, BV)
    k = tl.load(K + b * k_b + h // group * k_h + rows, mask=rows < D, other=0.0).to(tl.float32)[:, None]
    q = tl.load(Q + b * q_b + h * q_h + rows, mask=rows < D, other=0.0).to(tl.float32)[:, None]
    v = tl.load(V + b * v_b + h // group * v_h + columns, mask=columns < DV, other=0.0).to(tl.float32)[None, :]
    if STATE is None:
        S = tl.zeros([PD, BV], tl.float32)
    else:
        S = load_state(STATE + bh * (D * DV), rows, columns, D, DV).to(tl.float32)
    if CHANNELS:
        g = tl.load(G + b * g_b + h * g_h + rows, mask=rows < D, other=0.0).to(tl.float32)
        S *= tl.math.exp2(g * LOG2E)[:, None]
    elif G is not None:
        S *= tl.math.exp2(tl.load(G + b * g_b + h * g_h).to(tl.float32) * LOG2E)
    if BETA is not None:
        v = tl.load(BETA + b * w_b + h * w_h).to(tl.float32) * (v - tl.sum(S * k, 0, keep_dims=True))
    S += k * v
    store_state(END + bh * (D * DV), rows, columns, S, D, DV)
    o = tl.sum(S * q, 0) * scale
    tl.store(O + bh * DV + columns, o.to(O.dtype.element_ty), mask=columns < DV)
