"""The forward pass in Gluon. One producer warp group loads tiles, two consumers of 64 rows each compute.

A consumer multiplies q with the next keys while it takes the softmax of the present ones. Keys and values wait in
STAGES slots each; a slot has a barrier that the copy completes (full) and one at which both consumers arrive (free).

Descriptors have four dimensions, so that the hardware stops at a head's last row: what is read beyond it is zero, what
is written beyond it is dropped.
"""
# Gluon's functions are declared as they look inside of its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from manyheads.engines.triton.hopper_names import (
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

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

# What the table holds for each tile of queries. LISTS: the number of key tiles, then 2 * tile + partial for each.
# RANGES: the key tiles are lo to hi - 1, those of them from f0 to f1 - 1 are full. EVERY: there is no table.
EVERY = gl.constexpr(0)
RANGES = gl.constexpr(1)
LISTS = gl.constexpr(2)


@gluon.jit
def _key_tile(table, step, lo, f0, f1, KIND: gl.constexpr):
    """The key tile of a step, and whether the mask must look at it."""
    if KIND == LISTS:
        entry = gl.load(table + step)
        return entry >> 1, (entry & 1) == 1
    else:
        tile = lo + step
        return tile, (tile < f0) | (tile >= f1)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q0, q1, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, kv_head, row, n, lo, f0, f1, KIND: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q0.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    mbarrier.expect(q_full, 2 * ROWS * DIM * 2)
    tma_load(q_desc, [b, h, row, 0], q_full, q0)
    tma_load(q_desc, [b, h, row + ROWS, 0], q_full, q1)
    # In the order in which consumers ask: the next keys before the present values.
    tile, _ = _key_tile(table, 0, lo, f0, f1, KIND)
    mbarrier.expect(k_full.index(0), KEYS * DIM * 2)
    tma_load(k_desc, [b, kv_head, tile * KEYS, 0], k_full.index(0), ks.index(0))
    for step in range(1, n):
        slot = step % STAGES
        following, _ = _key_tile(table, step, lo, f0, f1, KIND)
        mbarrier.wait(k_free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), KEYS * DIM * 2)
        tma_load(k_desc, [b, kv_head, following * KEYS, 0], k_full.index(slot), ks.index(slot))
        before = (step - 1) % STAGES
        mbarrier.wait(v_free.index(before), (((step - 1) // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(before), KEYS * DIM * 2)
        tma_load(v_desc, [b, kv_head, tile * KEYS, 0], v_full.index(before), vs.index(before))
        tile = following
    last = (n - 1) % STAGES
    mbarrier.wait(v_free.index(last), (((n - 1) // STAGES) & 1) ^ 1)
    mbarrier.expect(v_full.index(last), KEYS * DIM * 2)
    tma_load(v_desc, [b, kv_head, tile * KEYS, 0], v_full.index(last), vs.index(last))


@gluon.jit
def _changed(
    s, b, h, i, j, end, partial, scale, A, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """The scores after the score function and, in partial tiles, the mask."""
    if SCORE is not None:
        s = SCORE(s * scale, b, h, i, j, A)
    if MASKED:  # noqa: SIM102
        if partial:
            seen = j < end
            if MASK is not None:
                seen = seen & MASK(b, h, i, j, A)
            s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, l, factor):
    """One step of the online softmax in base 2. A row that has seen nothing yet keeps m = -inf, and p = 0, not NaN."""
    top = gl.maximum(m, gl.max(s, 1) * factor)
    safe = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(s * factor - safe[:, None])
    fade = gl.exp2(m - safe)
    return p, fade, top, l * fade + gl.sum(p, 1)


@gluon.jit
def _consumer(
    o_desc, lse, q, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, row, n, lo, f0, f1, q_len, q_start, kv_start, end, scale, A,
    KIND: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = o_desc.dtype
    factor = LOG2E if SCORE is not None else scale * LOG2E
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    i = (rows + q_start)[:, None]
    keys = kv_start + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    o = gl.full([ROWS, DIM], 0.0, gl.float32, o_layout)
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    q2 = q.reshape([ROWS, DIM])

    mbarrier.wait(q_full, 0)
    tile, partial = _key_tile(table, 0, lo, f0, f1, KIND)
    mbarrier.wait(k_full.index(0), 0)
    k = ks.index(0).reshape([KEYS, DIM]).permute((1, 0))
    s_later = warpgroup_mma(q2, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_later])
    mbarrier.arrive(k_free.index(0))
    s = _changed(s, b, h, i, (tile * KEYS + keys)[None, :], end, partial, scale, A, SCORE, MASK, MASKED)
    p, fade, m, l = _softmax(s, m, l, factor)
    p16 = gl.convert_layout(p.to(dtype), p_layout)
    for step in range(1, n):
        slot = step % STAGES
        before = (step - 1) % STAGES
        tile, partial = _key_tile(table, step, lo, f0, f1, KIND)
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([KEYS, DIM]).permute((1, 0))
        s_later = warpgroup_mma(q2, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        o = o * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        o_later = warpgroup_mma(p16, vs.index(before).reshape([KEYS, DIM]), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_later])
        mbarrier.arrive(k_free.index(slot))
        s = _changed(s, b, h, i, (tile * KEYS + keys)[None, :], end, partial, scale, A, SCORE, MASK, MASKED)
        p, fade, m, l = _softmax(s, m, l, factor)
        o = warpgroup_mma_wait(0, deps=[o_later])
        mbarrier.arrive(v_free.index(before))
        p16 = gl.convert_layout(p.to(dtype), p_layout)
    last = (n - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
    o = o * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    o_later = warpgroup_mma(p16, vs.index(last).reshape([KEYS, DIM]), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o_later])

    inverse = gl.where(l > 0.0, 1.0 / l, 0.0)
    o = o * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
    q2.store(o.to(dtype))
    fence_async_shared()
    tma_store(o_desc, [b, h, row, 0], q)
    gl.store(lse + rows, gl.where(l > 0.0, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < q_len)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
    ]
)  # fmt: skip
def attend(
    q_desc, k_desc, v_desc, o_desc, lse, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, scale,
    STAGES: gl.constexpr, KIND: gl.constexpr, MASKED: gl.constexpr, A, MASK: gl.constexpr, SCORE: gl.constexpr,
):  # fmt: skip
    """o and lse [batch, heads, q_len] of one tile of queries of one head. Grid: tiles * heads * batch.

    table: int32, see RANGES and LISTS; table_batch, table_head, table_row: its strides, 0 where it is shared.
    A: what the functions score(s, b, h, i, j, A) and mask(b, h, i, j, A) read. MASKED: there are tiles to mask.
    """
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2]
    DIM: gl.constexpr = k_desc.block_shape[3]
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
    lo = 0
    f0 = 0
    f1 = kv_len // KEYS
    n = (kv_len + KEYS - 1) // KEYS
    if KIND == RANGES:
        lo = gl.load(table)
        n = gl.load(table + 1) - lo
        f0 = gl.load(table + 2)
        f1 = gl.load(table + 3)
    if KIND == LISTS:
        n = gl.load(table)
        table += 1
    # Who sees nothing takes one step over a tile that is masked as a whole.
    end = kv_start + gl.where(n > 0, kv_len, 0)
    n = gl.maximum(n, 1)

    q0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, DIM], k_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, DIM], v_desc.layout)
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
                o_desc, lse, q0, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row, n, lo, f0, f1, q_len, q_start, kv_start, end, scale, A, KIND, SCORE, MASK, MASKED,
            )),
            (_consumer, (
                o_desc, lse, q1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row + ROWS, n, lo, f0, f1, q_len, q_start, kv_start, end, scale, A,
                KIND, SCORE, MASK, MASKED,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q0, q1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, h // group, row, n, lo, f0, f1, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
