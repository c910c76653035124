"""The forward kernel: a tile of queries meets the tiles of keys that it needs, with a lazy softmax in base two.

Which tiles those are is listed, partial ones (the mask is applied) before full ones (it is not). Lengths need not be
multiples of tiles; head dimensions are padded to powers of two. A query that sees nothing gives o = 0, and lse = -inf
or the sink. Without a normaliser the scores themselves are the weights, and lse = 0. Steps from one row, head or batch
of a tensor to the next are in UNITs: if rows begin at multiples of 16 bytes, they are loaded in pieces of that size.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, c, SIMULATED: tl.constexpr):
    """a @ b + c in float32; float32 operands are not rounded. The interpreter cannot multiply bfloat16."""
    if SIMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def load_tile(at, step, rows, length, SIZE: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, PADDED] of a tensor [length, SIZE]; zeros outside of it. BOUNDED: rows may lie behind the end."""
    columns = tl.arange(0, PADDED)
    at = at + rows[:, None] * step + columns[None, :]
    if BOUNDED:
        if PADDED == SIZE:
            return tl.load(at, mask=(rows < length)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(rows < length)[:, None] & (columns < SIZE)[None, :], other=0.0)
    else:
        if PADDED == SIZE:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(at, step, rows, length, value, SIZE: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    at = at + rows[:, None] * step + columns[None, :]
    tl.store(at, value.to(at.dtype.element_ty), mask=(rows < length)[:, None] & (columns < SIZE)[None, :])


@triton.jit
def positions(AT, start, rows, length, GIVEN: tl.constexpr):
    """Where tokens stand: at start, start + 1, ..., or where a row of positions says, -1 for none."""
    if GIVEN:
        return tl.load(AT + rows, mask=rows < length, other=-1).to(tl.int32)
    else:
        return start + rows


@triton.jit
def allowed(b, h, i, j, x, y, q_len, kv_len, A, MASK: tl.constexpr, RAGGED: tl.constexpr):
    """Which pairs of a partial tile count: positions i and j, in places x and y."""
    seen = (x < q_len) & (y < kv_len)
    if RAGGED:
        seen = seen & (i >= 0) & (j >= 0)
    if MASK is not None:
        seen = seen & MASK(b, h, i, j, A)
    return seen


@triton.jit
def list_of(COUNTS, LISTS, row, width):
    """A row's list of tiles of the other side, and how many of them are partial and full."""
    return LISTS + row.to(tl.int64) * width, tl.load(COUNTS + 2 * row), tl.load(COUNTS + 2 * row + 1)


@triton.jit
def update(
    top, total, acc, q, k_base, v_base, k_n, v_n, tile, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, unit, A,
    MASK: tl.constexpr, SCORE: tl.constexpr, NORMALISER: tl.constexpr, FOLDED: tl.constexpr, PARTIAL: tl.constexpr,
    Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr,
    PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One tile of keys."""
    first = tile * BN
    rows = tl.arange(0, BN)
    y = first + rows
    k = load_tile(k_base + first.to(tl.int64) * k_n, k_n, rows, kv_len - first, D, PD, PARTIAL)
    s = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), SIMULATED)
    j = positions(KV_AT, kv_start, y, kv_len, KV_GIVEN)[None, :]
    if not FOLDED:
        s = s * scale
    if SCORE is not None:
        s = SCORE(s, b, h, i, j, A)
    if PARTIAL:
        seen = allowed(b, h, i, j, x[:, None], y[None, :], q_len, kv_len, A, MASK, Q_GIVEN or KV_GIVEN)
    if NORMALISER == "none":
        p = s
        if PARTIAL:
            p = tl.where(seen, s, 0.0)
    else:
        size = s
        if NORMALISER == "signed":
            size = tl.abs(s)
        if PARTIAL:
            size = tl.where(seen, size, float("-inf"))
        new = tl.maximum(top, tl.max(size, 1) * unit)
        safe = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        p = tl.math.exp2(size * unit - safe[:, None])
        shrink = tl.math.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        top = new
        if NORMALISER == "signed":
            p = tl.where(s > 0, p, tl.where(s < 0, -p, 0.0))
    v = load_tile(v_base + first.to(tl.int64) * v_n, v_n, rows, kv_len - first, DV, PV, PARTIAL)
    acc = dot(p.to(v.dtype), v, acc, SIMULATED)
    return top, total, acc


@triton.jit
def forward(
    Q, K, V, O, LSE, SINK, Q_AT, KV_AT, COUNTS, LISTS, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    qat_b, kvat_b, list_b, list_h, q_start, kv_start, q_len, kv_len, heads, group, scale, NORMALISER: tl.constexpr,
    FOLDED: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
    UNIT: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(q_len, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under causal masks the longest rows go first
    bh = tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    wide_b, wide_h, kv_h = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    q_n, k_n, v_n, o_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, o_n * UNIT
    first = tile * BM
    wide = first.to(tl.int64)
    rows = tl.arange(0, BM)
    x = first + rows
    q = load_tile(Q + (wide_b * q_b + wide_h * q_h) * UNIT + wide * q_n, q_n, rows, q_len - first, D, PD, True)
    i = positions(Q_AT + wide_b * qat_b, q_start, x, q_len, Q_GIVEN)[:, None]
    KV_AT += wide_b * kvat_b
    K += (wide_b * k_b + kv_h * k_h) * UNIT
    V += (wide_b * v_b + kv_h * v_h) * UNIT
    unit = LOG2E
    if FOLDED:
        unit = scale * LOG2E

    top = tl.full([BM], float("-inf") if SINK is None else 0.0, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK is not None:  # a score whose value is zero; of -inf, it is forgotten with the first score that is more
        top += tl.load(SINK + h) * LOG2E
        total += 1.0
    acc = tl.zeros([BM, PV], tl.float32)
    row = b * list_b + h * list_h + tile
    list_at, partial, full = list_of(COUNTS, LISTS, row, tl.cdiv(kv_len, BN))
    for n in tl.range(0, partial):
        other = tl.load(list_at + n)
        top, total, acc = update(
            top, total, acc, q, K, V, k_n, v_n, other, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, unit, A,
            MASK, SCORE, NORMALISER, FOLDED, True, Q_GIVEN, KV_GIVEN, D, DV, PD, PV, BM, BN, SIMULATED,
        )  # fmt: skip
    for n in tl.range(0, full):
        other = tl.load(list_at + partial + n)
        top, total, acc = update(
            top, total, acc, q, K, V, k_n, v_n, other, i, x, b, h, KV_AT, kv_start, q_len, kv_len, scale, unit, A,
            MASK, SCORE, NORMALISER, FOLDED, False, Q_GIVEN, KV_GIVEN, D, DV, PD, PV, BM, BN, SIMULATED,
        )  # fmt: skip

    if NORMALISER == "none":
        lse = tl.zeros([BM], tl.float32)
    else:
        seen = total > 0
        divisor = tl.where(seen, total, 1.0)
        acc = acc / divisor[:, None]
        lse = tl.where(seen, (top + tl.math.log2(divisor)) * LN2, float("-inf"))
    store_tile(O + (wide_b * o_b + wide_h * o_h) * UNIT + wide * o_n, o_n, rows, q_len - first, acc, DV, PV)
    tl.store(LSE + bh.to(tl.int64) * q_len + x, lse, mask=x < q_len)
