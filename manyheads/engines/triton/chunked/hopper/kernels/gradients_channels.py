"""Gradients of chunks where each channel of the keys decays by itself: what kernels/gradients.py and kernels/inner.py
of chunked/ have, in one.

A program has 64 channels of a chunk; two fit a multiprocessor, so that one reads while the other one computes. With
left = e^(G - G_end/2), right = e^(G_end/2 - G), and what is before and behind the chunk halfway, too,

    dq = left x,      x = scale e^(G_end/2) (dO S^T) + dA (k right)
    dk = left y + right w,    y = -e^(G_end/2) (beta z S^T) + dB (k right)
                              w = e^(G_end/2) (u D^T) + dA^T (q left) + dB^T (k left)
    dG = q left x + k left y - k right w

Where decays are not moderate, as kernels/pairs.py has it, what is inside is found from halves that meet. As u is beta
times what a write finds missing, dbeta = z.u / beta.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.parts import add
from manyheads.engines.triton.chunked.kernels import common, pairs
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E, LEAST_DECAY = gl.constexpr(common.LOG2E.value), gl.constexpr(common.LEAST_DECAY.value)
LEAST = gl.constexpr(pairs.LEAST.value)
C = gl.constexpr(64)  # tokens of a chunk, and channels and values of a tile
LEVELS = gl.constexpr(6)  # of halves in a chunk
# Tiles, of [64, 64]: S, D, dO, u and z have one for each 64 values. Those of states are free for other things later.
S, D = gl.constexpr(0), gl.constexpr(2)
DO, U, Z, Q, K = (gl.constexpr(place) for place in (0, 2, 4, 6, 7))


@gluon.jit
def _fetch(desc, b, h, row, column, tiles, full, AT: gl.constexpr, PARTS: gl.constexpr, BARRIER: gl.constexpr):
    here = full.index(BARRIER)
    for part in gl.static_range(PARTS):
        tma_load(desc, [b, h, row, column + part * C], here, tiles.index(AT + part))


@gluon.jit
def _tile(tiles, at):
    return tiles.index(at).reshape([C, C])


@gluon.jit
def _product(left, LEFT: gl.constexpr, right, RIGHT: gl.constexpr, zero, PARTS: gl.constexpr):
    """left right^T, of tiles."""
    a, b = _tile(left, LEFT), _tile(right, RIGHT).permute((1, 0))
    later = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
    if PARTS == 2:
        a, b = _tile(left, LEFT + 1), _tile(right, RIGHT + 1).permute((1, 0))
        later = warpgroup_mma(a, b, later, is_async=True)
    return later


@gluon.jit
def _put(desc, b, h, row, column, by, value):
    by.reshape([C, C]).store(value)
    fence_async_shared()
    tma_store(desc, [b, h, row, column], by)


@gluon.jit
def _at_once(
    tiles, work, sums, strengths, x, y, w, scale, end, PARTS: gl.constexpr, CORRECTS: gl.constexpr,
    square: gl.constexpr,
):  # fmt: skip
    """dq, dk and dG, and what the last token's dG has beside it."""
    operand: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    dtype: gl.constexpr = tiles.dtype
    zero = gl.full([C, C], 0.0, gl.float32, square)
    i, j = gl.arange(0, C, gl.SliceLayout(1, square))[:, None], gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    one, two, three = _tile(work, 0), _tile(work, 1), _tile(work, 2)
    half = 0.5 * end[None, :]
    risen = sums.load(square) - half
    keys = _tile(tiles, K).load(square).to(gl.float32)
    right = (keys * gl.exp2(-risen)).to(dtype)
    two.store(right)
    left = gl.exp2(risen)
    one.store((_tile(tiles, Q).load(square).to(gl.float32) * left).to(dtype))
    if CORRECTS:
        three.store((keys * left).to(dtype))
    fence_async_shared()
    da_later, turned_later = _product(tiles, DO, tiles, U, zero, PARTS), _product(tiles, U, tiles, DO, zero, PARTS)
    whole = gl.exp2(half)
    x, w = x * whole, w * whole
    gone = gl.sum(right.to(gl.float32) * w, 0)
    da, turned = warpgroup_mma_wait(0, deps=[da_later, turned_later])
    da = gl.convert_layout(gl.where(j <= i, da * scale, 0.0).to(dtype), operand)
    turned = gl.convert_layout(gl.where(i <= j, turned * scale, 0.0).to(dtype), operand)
    x_later = warpgroup_mma(da, two, x, is_async=True)
    w_later = warpgroup_mma(turned, one, w, is_async=True)
    if CORRECTS:
        turned_later = _product(tiles, U, tiles, Z, zero, PARTS)
        x, w, turned = warpgroup_mma_wait(0, deps=[x_later, w_later, turned_later])
        turned = gl.where(i < j, -gl.load(strengths + j) * turned, 0.0)
        turned = gl.convert_layout(turned.to(dtype), operand)
        w_later = warpgroup_mma(turned, three, w, is_async=True)
        db_later = _product(tiles, Z, tiles, U, zero, PARTS)
    else:
        x, w = warpgroup_mma_wait(0, deps=[x_later, w_later])
    left = gl.exp2(sums.load(square) - half)
    dq, own = (left * x).to(dtype), one.load(square).to(gl.float32) * x
    if CORRECTS:
        w, db = warpgroup_mma_wait(0, deps=[w_later, db_later])
        db = gl.where(j < i, -gl.load(strengths + i) * db, 0.0)
        db = gl.convert_layout(db.to(dtype), operand)
        y_later = warpgroup_mma(db, two, y * gl.exp2(half), is_async=True)
    own -= two.load(square).to(gl.float32) * w
    dk = gl.exp2(half - sums.load(square)) * w
    if CORRECTS:
        y = warpgroup_mma_wait(0, deps=[y_later])
        own += three.load(square).to(gl.float32) * y
        dk += gl.exp2(sums.load(square) - half) * y
    return dq, dk, own, gone


@gluon.jit
def _halves(
    tiles, work, SUMS, strengths, x, y, w, scale, end, DIM: gl.constexpr, PARTS: gl.constexpr, CORRECTS: gl.constexpr,
    square: gl.constexpr,
):  # fmt: skip
    """The same where decays are not moderate. SUMS: of this chunk and these channels."""
    operand: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    dtype: gl.constexpr = tiles.dtype
    lines: gl.constexpr = gl.SliceLayout(1, square)
    zero = gl.full([C, C], 0.0, gl.float32, square)
    t = gl.arange(0, C, lines)
    i, j = t[:, None], gl.arange(0, C, gl.SliceLayout(0, square))[None, :]
    one, two, q, k = _tile(work, 0), _tile(work, 1), _tile(tiles, Q), _tile(tiles, K)
    sum_g = gl.load(SUMS + i * DIM + j)
    dq, plus, minus = x * gl.exp2(sum_g), y, w * gl.exp2(end[None, :] - sum_g)
    gone = gl.sum(k.load(square).to(gl.float32) * minus, 0)
    if CORRECTS:
        plus = plus * gl.exp2(sum_g)
    same = gl.full([C], 0.0, gl.float32, lines)
    for level in range(LEVELS):
        turn = (((t >> level) | 1) << level) - 1
        apart = gl.load(SUMS + i * DIM + j) - gl.load(SUMS + turn[:, None] * DIM + j)
        fade = gl.exp2(gl.where((t > turn)[:, None], apart, -apart))
        one.store((q.load(square).to(gl.float32) * fade).to(dtype))
        two.store((k.load(square).to(gl.float32) * fade).to(dtype))
        fence_async_shared()
        a, b = i >> level, j >> level
        lower = (a == b + 1) & ((a & 1) == 1)
        upper = (b == a + 1) & ((b & 1) == 1)
        da = warpgroup_mma_wait(0, deps=[_product(tiles, DO, tiles, U, zero, PARTS)]) * scale
        same = gl.sum(gl.where(i == j, da, 0.0), 1)
        da = gl.convert_layout(gl.where(lower, da, 0.0).to(dtype), operand)
        more = warpgroup_mma_wait(0, deps=[warpgroup_mma(da, two, zero, use_acc=False, is_async=True)])
        dq += more * fade
        da = warpgroup_mma_wait(0, deps=[_product(tiles, U, tiles, DO, zero, PARTS)]) * scale
        da = gl.convert_layout(gl.where(upper, da, 0.0).to(dtype), operand)
        more = warpgroup_mma_wait(0, deps=[warpgroup_mma(da, one, zero, use_acc=False, is_async=True)])
        if CORRECTS:
            db = warpgroup_mma_wait(0, deps=[_product(tiles, U, tiles, Z, zero, PARTS)])
            db = gl.convert_layout(gl.where(upper, -gl.load(strengths + j) * db, 0.0).to(dtype), operand)
            more = warpgroup_mma_wait(0, deps=[warpgroup_mma(db, two, more, is_async=True)])
        minus += more * fade
        if CORRECTS:
            db = warpgroup_mma_wait(0, deps=[_product(tiles, Z, tiles, U, zero, PARTS)])
            db = gl.convert_layout(gl.where(lower, -gl.load(strengths + i) * db, 0.0).to(dtype), operand)
            more = warpgroup_mma_wait(0, deps=[warpgroup_mma(db, two, zero, use_acc=False, is_async=True)])
            plus += more * fade
    queries, keys = q.load(square).to(gl.float32), k.load(square).to(gl.float32)
    own = queries * dq + keys * (plus - minus)
    return (dq + same[:, None] * keys).to(dtype), plus + minus + same[:, None] * queries, own, gone


@gluon.jit(do_not_specialize=["g_b", "g_h", "chunks", "kv_len", "heads", "group"])
def gradients_channels(
    s_desc, d_desc, do_desc, u_desc, z_desc, q_desc, k_desc, dq_desc, dk_desc, G, ENDS, SUMS, BETA, DG, DBETA,
    g_b, g_h, g_n, chunks, kv_len, heads, group, scale, DIM: gl.constexpr, V_DIM: gl.constexpr,
    CORRECTS: gl.constexpr,
):  # fmt: skip
    """Boxes: [1, 1, C, C]; dk may be of float32. G: log decays, ENDS: their sums, [rows * chunks, DIM]; SUMS: of
    chunks whose decays are not moderate, [rows * chunks, C, DIM]. BETA and DBETA are absent where nothing is
    corrected; u is v there, and z any."""
    PARTS: gl.constexpr = V_DIM // C
    dtype: gl.constexpr = q_desc.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    across: gl.constexpr = gl.SliceLayout(0, square)
    tall: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [2, 2], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    zero = gl.full([C, C], 0.0, gl.float32, square)
    n, column = gl.program_id(0) // (DIM // C), gl.program_id(0) % (DIM // C) * C
    row, c = n // chunks, n % chunks
    b, h, first = row // heads, row % heads, c * C
    wide = n.to(gl.int64)

    tiles = gl.allocate_shared_memory(dtype, [8, 1, 1, C, C], q_desc.layout)
    states = gl.allocate_shared_memory(dtype, [4, 1, 1, C, C], q_desc.layout)
    sums_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, C, C], gl.float32)
    sums = gl.allocate_shared_memory(gl.float32, [1, 1, C, C], sums_layout)
    line = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(4):
        mbarrier.init(full.index(place), count=1)
    BYTES: gl.constexpr = C * C * 2
    mbarrier.expect(full.index(0), 2 * PARTS * BYTES)
    _fetch(do_desc, b, h, first, 0, tiles, full, DO, PARTS, 0)
    _fetch(s_desc, row, c, column, 0, states, full, S, PARTS, 0)
    mbarrier.expect(full.index(1), 2 * PARTS * BYTES)
    _fetch(u_desc, b, h if CORRECTS else h // group, first, 0, tiles, full, U, PARTS, 1)
    _fetch(d_desc, row, c, column, 0, states, full, D, PARTS, 1)
    if CORRECTS:
        mbarrier.expect(full.index(2), PARTS * BYTES)
        _fetch(z_desc, b, h, first, 0, tiles, full, Z, PARTS, 2)
    mbarrier.expect(full.index(3), 2 * BYTES)
    _fetch(q_desc, b, h, first, column, tiles, full, Q, 1, 3)
    _fetch(k_desc, b, h // group, first, column, tiles, full, K, 1, 3)

    tokens, channels = (
        gl.arange(0, C, gl.SliceLayout(1, tall))[:, None],
        gl.arange(0, C, gl.SliceLayout(0, tall))[None, :],
    )
    G += b.to(gl.int64) * g_b + h.to(gl.int64) * g_h + first.to(gl.int64) * g_n + column
    g = gl.load(G + tokens * g_n + channels, mask=tokens < kv_len - first, other=0.0).to(gl.float32) * LOG2E
    sums.reshape([C, C]).store(gl.associative_scan(gl.where(g < LEAST_DECAY, LEAST_DECAY, g), 0, add))
    end = gl.load(ENDS + wide * DIM + column + gl.arange(0, C, across))

    mbarrier.wait(full.index(0), 0)
    x_later = _product(tiles, DO, states, S, zero, PARTS)
    mbarrier.wait(full.index(1), 0)
    w_later = _product(tiles, U, states, D, zero, PARTS)
    strengths = BETA
    if CORRECTS:
        strengths = BETA + wide * C
        mbarrier.wait(full.index(2), 0)
        y_later = _product(tiles, Z, states, S, zero, PARTS)
    both = gl.full([C, C], 0.0, gl.float32, flat)
    for part in gl.static_range(PARTS):
        before = _tile(states, S + part).load(flat).to(gl.float32)
        both += before * _tile(states, D + part).load(flat).to(gl.float32)
    line.store(gl.sum(both, 1))
    if CORRECTS:
        if column == 0:
            met = gl.full([C, C], 0.0, gl.float32, flat)
            for part in gl.static_range(PARTS):
                gradient = _tile(tiles, Z + part).load(flat).to(gl.float32)
                met += gradient * _tile(tiles, U + part).load(flat).to(gl.float32)
            t = gl.arange(0, C, gl.SliceLayout(1, flat))
            there = t < kv_len - first
            gl.store(DBETA + row.to(gl.int64) * kv_len + first + t, gl.sum(met, 1) / gl.load(strengths + t), mask=there)
        x, w, y = warpgroup_mma_wait(0, deps=[x_later, w_later, y_later])
        y = y * -gl.load(strengths + gl.arange(0, C, gl.SliceLayout(1, square)))[:, None]
    else:
        x, w = warpgroup_mma_wait(0, deps=[x_later, w_later])
        y = zero
    x = x * scale
    mbarrier.wait(full.index(3), 0)
    work = gl.allocate_shared_memory(dtype, [3, 1, 1, C, C], q_desc.layout)  # where states were
    if gl.min(end, 0) >= LEAST:
        dq, dk, own, gone = _at_once(
            tiles, work, sums.reshape([C, C]), strengths, x, y, w, scale, end, PARTS, CORRECTS, square
        )
    else:
        SUMS += wide * (C * DIM) + column
        dq, dk, own, gone = _halves(tiles, work, SUMS, strengths, x, y, w, scale, end, DIM, PARTS, CORRECTS, square)

    _put(dq_desc, b, h, first, column, tiles.index(DO), dq)
    if dk_desc.dtype == gl.float32:
        _put(dk_desc, b, h, first, column, sums, dk)
    else:
        _put(dk_desc, b, h, first, column, tiles.index(U), dk.to(dtype))
    tma_store_wait(0)  # the sums to come may be made where what is written lies: nothing else would keep that room
    line.store(gone + line.load(across) * gl.exp2(end))
    sums.reshape([C, C]).store(own)
    own = sums.reshape([C, C]).load(tall)
    later = gl.sum(own, 0) + line.load(gl.SliceLayout(0, tall))
    dg = own - gl.associative_scan(own, 0, add) + later[None, :]  # a scan from the end moves numbers between threads
    DG += (row.to(gl.int64) * kv_len + first) * DIM + column
    gl.store(DG + tokens * DIM + channels, dg, mask=tokens < kv_len - first)
