"""The forward pass in Gluon. One producer warp group loads tiles, two consumers of 64 rows each compute.

A consumer multiplies q with the next keys while it takes the softmax of the present ones; if DEEP, only while it takes
the exponentials, and multiplies weights with values while it looks for the next maximum. Keys and values wait in
STAGES slots each; a slot has a barrier that the copy completes (full) and one at which both consumers arrive (free).

Descriptors have four dimensions, so that the hardware stops at a head's last row: what is read beyond it is zero, what
is written beyond it is dropped.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import (
    LN2,
    LOG2E,
    NONE,
    SIGNED,
    changed,
    positions_of,
    row_of,
    seen_of,
    tile_of,
)
from manyheads.engines.triton.hopper.kernels.dropping import dropped, kept, key_of
from manyheads.engines.triton.hopper.kernels.listed import listed_of, pairs_of, words_of
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


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q0, q1, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, kv_head, row, n, lo, f0, f1, KIND: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q0.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    mbarrier.expect(q_full, 2 * ROWS * DIM * 2)
    tma_load(q_desc, [b, h, row, 0], q_full, q0)
    tma_load(q_desc, [b, h, row + ROWS, 0], q_full, q1)
    # In the order in which consumers ask: the next keys before the present values.
    tile, _ = tile_of(table, 0, lo, f0, f1, KIND)
    mbarrier.expect(k_full.index(0), KEYS * DIM * 2)
    tma_load(k_desc, [b, kv_head, tile * KEYS, 0], k_full.index(0), ks.index(0))
    for step in range(1, n):
        slot = step % STAGES
        following, _ = tile_of(table, step, lo, f0, f1, KIND)
        mbarrier.wait(k_free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), KEYS * DIM * 2)
        tma_load(k_desc, [b, kv_head, following * KEYS, 0], k_full.index(slot), ks.index(slot))
        before = (step - 1) % STAGES
        mbarrier.wait(v_free.index(before), (((step - 1) // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(before), KEYS * V_DIM * 2)
        tma_load(v_desc, [b, kv_head, tile * KEYS, 0], v_full.index(before), vs.index(before))
        tile = following
    last = (n - 1) % STAGES
    mbarrier.wait(v_free.index(last), (((n - 1) // STAGES) & 1) ^ 1)
    mbarrier.expect(v_full.index(last), KEYS * V_DIM * 2)
    tma_load(v_desc, [b, kv_head, tile * KEYS, 0], v_full.index(last), vs.index(last))


@gluon.jit
def _shifted(s, m, factor, NORMALISER: gl.constexpr):
    """What a weight is 2 to the power of, how the sum so far fades, and the largest score. A row that has seen nothing
    yet keeps m = -inf, and weights of 0, not NaN."""
    if NORMALISER == NONE:
        return s, m, m
    else:
        size = s
        if NORMALISER == SIGNED:
            size = gl.where(s == float("-inf"), s, gl.abs(s))
        top = gl.maximum(m, gl.max(size, 1) * factor)
        safe = gl.where(top == float("-inf"), 0.0, top)
        return size * factor - safe[:, None], gl.exp2(m - safe), top


@gluon.jit
def _weights(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER: gl.constexpr):
    """The weights after dropout, and the sum of their sizes before it so far."""
    p = power
    if NORMALISER != NONE:
        p = gl.exp2(power)
        l = l * fade + gl.sum(p, 1)
        if NORMALISER == SIGNED:
            p = gl.where(s > 0.0, p, gl.where(s < 0.0, -p, 0.0))
    if threshold is not None:
        p = dropped(p, kept(low, high, i, j, threshold), inflation)
    return p, l


@gluon.jit
def _faded(o, fade, NORMALISER: gl.constexpr):
    if NORMALISER == NONE:
        return o
    else:
        return o * gl.convert_layout(fade, gl.SliceLayout(1, o.type.layout))[:, None]


@gluon.jit
def _finished(o, m, l, sink, h, NORMALISER: gl.constexpr):
    """o divided by the sum of the weights, and the natural lse."""
    if NORMALISER == NONE:
        return o, gl.full(m.shape, 0.0, gl.float32, m.type.layout)
    else:
        kept = gl.full(m.shape, 1.0, gl.float32, m.type.layout)
        if sink is not None:  # one more score, whose value is zero
            level = gl.load(sink + h) * LOG2E
            top = gl.maximum(m, level)
            kept = gl.exp2(m - top)
            l = l * kept + gl.exp2(level - top)
            m = top
        inverse = gl.where(l > 0.0, kept / l, 0.0)
        lse = gl.where(l > 0.0, (m + gl.log2(l)) * LN2, float("-inf"))
        return o * gl.convert_layout(inverse, gl.SliceLayout(1, o.type.layout))[:, None], lse


@gluon.jit
def _consumer(
    o_desc, lse, sink, q, out, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, row, n, lo, f0, f1, q_len, kv_len, empty, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step,
    scale, seed, threshold, inflation, bits, A, KIND: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
    MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, DEEP: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = o_desc.dtype
    factor = LOG2E if SCORE is not None else scale * LOG2E
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    rows = row + lines
    i = positions_of(q_start, q_at, q_at_step, b, row, lines, q_len, 1, POSITIONS)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    o = gl.full([ROWS, V_DIM], 0.0, gl.float32, o_layout)
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    q2 = q.reshape([ROWS, DIM])
    low = 0
    high = 0
    if seed is not None:
        low, high = key_of(seed, b, h)

    mbarrier.wait(q_full, 0)
    tile, partial = tile_of(table, 0, lo, f0, f1, KIND)
    listed = listed_of(bits, lines, row, tile * KEYS, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
    mbarrier.wait(k_full.index(0), 0)
    k = ks.index(0).reshape([KEYS, DIM]).permute((1, 0))
    s_later = warpgroup_mma(q2, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_later])
    mbarrier.arrive(k_free.index(0))
    j = positions_of(kv_start, kv_at, kv_at_step, b, tile * KEYS, columns, kv_len, 0, POSITIONS)
    inside = seen_of(i, j, tile * KEYS + columns, kv_start, kv_len, POSITIONS)
    inside = pairs_of(
        inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
    )
    s = changed(s, b, h, i, j, inside, partial, scale, A, SCORE, MASK, MASKED, NORMALISER)
    power, fade, m = _shifted(s, m, factor, NORMALISER)
    if DEEP:
        ahead = gl.minimum(1, n - 1)
        mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1)
    else:
        p, l = _weights(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
    for step in range(1, n):
        slot = step % STAGES
        before = (step - 1) % STAGES
        tile, partial = tile_of(table, step, lo, f0, f1, KIND)
        listed = listed_of(bits, lines, row, tile * KEYS, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
        if not DEEP:
            mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([KEYS, DIM]).permute((1, 0))
        s_later = warpgroup_mma(q2, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        if DEEP:
            p, l = _weights(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
        o = _faded(o, fade, NORMALISER)
        o_later = warpgroup_mma(p16, vs.index(before).reshape([KEYS, V_DIM]), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_later])
        mbarrier.arrive(k_free.index(slot))
        j = positions_of(kv_start, kv_at, kv_at_step, b, tile * KEYS, columns, kv_len, 0, POSITIONS)
        inside = seen_of(i, j, tile * KEYS + columns, kv_start, kv_len, POSITIONS)
        inside = pairs_of(
            inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
        )
        s = changed(s, b, h, i, j, inside, partial, scale, A, SCORE, MASK, MASKED, NORMALISER)
        power, fade, m = _shifted(s, m, factor, NORMALISER)
        if DEEP:
            # For the next keys; after the last ones once more for these, whose slot is not filled again. It stands here
            # as a wait is a branch: the assembler does not move the wait for o over it, to before the maximum.
            ahead = gl.minimum(step + 1, n - 1)
            mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1)
        else:
            p, l = _weights(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
        o = warpgroup_mma_wait(0, deps=[o_later])
        mbarrier.arrive(v_free.index(before))
        if not DEEP:
            p16 = gl.convert_layout(p.to(dtype), p_layout)
    if DEEP:
        p, l = _weights(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
    last = (n - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
    o = _faded(o, fade, NORMALISER)
    o_later = warpgroup_mma(p16, vs.index(last).reshape([KEYS, V_DIM]), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o_later])

    o = gl.where(empty, 0.0, o)
    m = gl.where(empty, float("-inf"), m)
    o, own_lse = _finished(o, m, l, sink, h, NORMALISER)
    if seed is not None:
        o = o * inflation
    out.reshape([ROWS, V_DIM]).store(o.to(dtype))
    fence_async_shared()
    tma_store(o_desc, [b, h, row, 0], out)
    gl.store(lse + rows, own_lse, mask=rows < q_len)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "threshold",
    ]
)  # fmt: skip
def attend(
    q_desc, k_desc, v_desc, o_desc, lse, sink, q_at, kv_at, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, scale, seed, threshold, inflation,
    bits, STAGES: gl.constexpr, KIND: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr,
    NORMALISER: gl.constexpr, DEEP: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    A, MASK: gl.constexpr, SCORE: gl.constexpr,
):  # fmt: skip
    """o and lse [batch, heads, q_len] of one tile of queries of one head. Grid: tiles * heads * batch.

    table: int32, see RANGES and LISTS; table_batch, table_head, table_row: its strides, 0 where it is shared.
    q_at, kv_at: if POSITIONS, int32 positions [batch, len], -1 for an absent token.
    seed, threshold, inflation: of dropout, see core/dropout.py, or None three times.
    bits, QUERY_BLOCK, KEY_BLOCK: of blocks that are no tiles, see listed.py, or None, 0 and 0.
    A: what the functions score(s, b, h, i, j, A) and mask(b, h, i, j, A) read. MASKED: there are tiles to mask.
    """
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2]
    DIM: gl.constexpr = k_desc.block_shape[3]
    V_DIM: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = (q_len + 2 * ROWS - 1) // (2 * ROWS)
    pid = gl.program_id(0)
    at = q_tiles - 1 - pid % q_tiles  # the last queries see most in a causal mask: longest first
    head_of_all = pid // q_tiles
    b = head_of_all // heads
    h = head_of_all % heads
    row = at * (2 * ROWS)
    table += b.to(gl.int64) * table_batch + h.to(gl.int64) * table_head + at.to(gl.int64) * table_row
    lse += head_of_all.to(gl.int64) * q_len
    if bits is not None:
        bits += head_of_all.to(gl.int64) * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
    table, n, lo, f0, f1 = row_of(table, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
    if n < 0:  # nobody asks for these queries
        return
    empty = n == 0  # by all: one step is taken, and forgotten
    n = gl.maximum(n, 1)

    q0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, DIM], k_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, V_DIM], v_desc.layout)
    o0 = q0
    o1 = q1
    if V_DIM != DIM:
        o0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], o_desc.layout)
        o1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_free.index(slot), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                o_desc, lse, sink, q0, o0, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row, n, lo, f0, f1, q_len, kv_len, empty, q_start, kv_start, q_at, q_at_step, kv_at,
                kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE, MASK, MASKED, POSITIONS,
                NORMALISER, DEEP, QUERY_BLOCK, KEY_BLOCK,
            )),
            (_consumer, (
                o_desc, lse, sink, q1, o1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row + ROWS, n, lo, f0, f1, q_len, kv_len, empty, q_start, kv_start, q_at, q_at_step, kv_at,
                kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE, MASK, MASKED, POSITIONS,
                NORMALISER, DEEP, QUERY_BLOCK, KEY_BLOCK,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q0, q1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, h // group, row, n, lo, f0, f1, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
