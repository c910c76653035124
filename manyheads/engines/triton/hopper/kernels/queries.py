"""dQ of 128 queries: a producer warp group and two consumers of 64 queries. No atomics. The last product of a tile is
issued with the first ones of the next. HELD: dO stays in registers."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import positions_of, row_of, seen_of
from manyheads.engines.triton.hopper.kernels.dropping import kept, key_of
from manyheads.engines.triton.hopper.kernels.gathered import keys_at, load_keys
from manyheads.engines.triton.hopper.kernels.listed import listed_of, pairs_of, words_of
from manyheads.engines.triton.hopper.kernels.slopes import through, weights
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
    q_desc, do_desc, k_desc, v_desc, q0, q1, do0, do1, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, kv_head, row, n, lo, PARTS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    K_STAGES: gl.constexpr = ks.shape[0]
    V_STAGES: gl.constexpr = vs.shape[0]
    ROWS: gl.constexpr = q0.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    mbarrier.expect(q_full, 2 * ROWS * (DIM + V_DIM) * 2)
    tma_load(q_desc, [b, h, row, 0], q_full, q0)
    tma_load(q_desc, [b, h, row + ROWS, 0], q_full, q1)
    tma_load(do_desc, [b, h, row, 0], q_full, do0)
    tma_load(do_desc, [b, h, row + ROWS, 0], q_full, do1)
    for step in range(n):
        a = step % K_STAGES
        load_keys(
            k_desc, b, kv_head, table, step, lo, k_full.index(a), k_free.index(a), ((step // K_STAGES) & 1) ^ 1,
            ks.index(a), KEYS, DIM, PARTS, KIND,
        )  # fmt: skip
        c = step % V_STAGES
        load_keys(
            v_desc, b, kv_head, table, step, lo, v_full.index(c), v_free.index(c), ((step // V_STAGES) & 1) ^ 1,
            vs.index(c), KEYS, V_DIM, PARTS, KIND,
        )  # fmt: skip


@gluon.jit
def _consumer(
    dq_desc, top, delta, q, do, q_full, ks, vs, k_full, k_free, v_full, v_free,
    table, b, h, row, n, lo, f0, f1, q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, scale,
    seed, threshold, inflation, bits, A, KIND: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr,
    MASK: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, HELD: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    K_STAGES: gl.constexpr = ks.shape[0]
    V_STAGES: gl.constexpr = vs.shape[0]
    ROWS: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    rows = row + lines
    own_top = gl.load(top + rows)[:, None]
    own_delta = gl.load(delta + rows)[:, None]
    i = positions_of(q_start, q_at, q_at_step, b, row, lines, q_len, 1, POSITIONS)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    dq = gl.full([ROWS, DIM], 0.0, gl.float32, q_layout)
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    ds16 = gl.convert_layout(gl.full([ROWS, KEYS], 0.0, dtype, s_layout), ds_layout)
    q2 = q.reshape([ROWS, DIM])
    mbarrier.wait(q_full, 0)
    if HELD:  # in registers
        do2 = do.reshape([ROWS, V_DIM]).load(gl.DotOperandLayout(0, q_layout, 2))
    else:
        do2 = do.reshape([ROWS, V_DIM])
    if seed is not None:
        low, high = key_of(seed, b, h)
    for step in range(n):
        key, partial = keys_at(table, step, lo, f0, f1, columns, KEYS, PARTS, KIND)
        listed = listed_of(bits, lines, row, key, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
        a = step % K_STAGES
        c = step % V_STAGES
        before = gl.maximum(step - 1, 0) % K_STAGES
        mbarrier.wait(k_full.index(a), (step // K_STAGES) & 1)
        k_turned = ks.index(a).reshape([KEYS, DIM]).permute((1, 0))
        s_later = warpgroup_mma(q2, k_turned, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(c), (step // V_STAGES) & 1)
        v_turned = vs.index(c).reshape([KEYS, V_DIM]).permute((1, 0))
        dp_later = warpgroup_mma(do2, v_turned, zero, use_acc=False, is_async=True)
        dq_later = warpgroup_mma(ds16, ks.index(before).reshape([KEYS, DIM]), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s_later])
        j = positions_of(kv_start, kv_at, kv_at_step, b, key, columns, kv_len, 0, POSITIONS)
        inside = seen_of(i, j, key + columns, kv_start, kv_len, POSITIONS)
        inside = pairs_of(
            inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
        )
        weight, slope = weights(
            s, own_top, b, h, i, j, inside, partial, scale, A, SCORE, DSCORE, MASK, MASKED, NORMALISER
        )
        dp = warpgroup_mma_wait(1, deps=[dp_later])
        mbarrier.arrive(v_free.index(c))
        if seed is not None:
            dp = gl.where(kept(low, high, i, j, threshold), dp, 0.0) * inflation
        ds = through(slope, weight, dp, own_delta, NORMALISER)
        dq = warpgroup_mma_wait(0, deps=[dq_later])
        mbarrier.arrive(k_free.index(before), pred=step > 0)
        ds16 = gl.convert_layout(ds.to(dtype), ds_layout)
    if n > 0:
        dq_later = warpgroup_mma(ds16, ks.index((n - 1) % K_STAGES).reshape([KEYS, DIM]), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq_later])
    q2.store((dq * scale).to(dtype))
    fence_async_shared()
    tma_store(dq_desc, [b, h, row, 0], q)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "padded", "threshold",
    ]
)  # fmt: skip
def queries(
    q_desc, do_desc, k_desc, v_desc, dq_desc, top, delta, q_at, kv_at, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, padded, scale,
    seed, threshold, inflation, bits, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, KIND: gl.constexpr,
    MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, HELD: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr, PARTS: gl.constexpr,
    A, MASK: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries of one head. Grid: tiles * heads * batch. table, bits, PARTS: as in the forward pass."""
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2] * PARTS
    DIM: gl.constexpr = q_desc.block_shape[3]
    V_DIM: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    tiles = (q_len + 2 * ROWS - 1) // (2 * ROWS)
    pid = gl.program_id(0)
    at = tiles - 1 - pid % tiles
    head_of_all = pid // tiles
    b = head_of_all // heads
    h = head_of_all % heads
    row = at * (2 * ROWS)
    table += b.to(gl.int64) * table_batch + h.to(gl.int64) * table_head + at.to(gl.int64) * table_row
    table, n, lo, f0, f1 = row_of(table, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
    if n < 0:  # nobody asks for these queries
        return
    n = (n + PARTS - 1) // PARTS
    top += head_of_all.to(gl.int64) * padded
    delta += head_of_all.to(gl.int64) * padded
    if bits is not None:
        bits += head_of_all.to(gl.int64) * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
    q0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    do0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], do_desc.layout)
    do1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], do_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, KEYS, DIM], q_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, KEYS, V_DIM], do_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
    for slot in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_free.index(slot), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                dq_desc, top, delta, q0, do0, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row, n, lo, f0, f1, q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step,
                scale, seed, threshold, inflation, bits, A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS, NORMALISER,
                HELD, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_consumer, (
                dq_desc, top, delta, q1, do1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, row + ROWS, n, lo, f0, f1, q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at,
                kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS,
                NORMALISER, HELD, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_producer, (
                q_desc, do_desc, k_desc, v_desc, q0, q1, do0, do1, q_full, ks, vs, k_full, k_free, v_full, v_free,
                table, b, h, h // group, row, n, lo, PARTS, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
