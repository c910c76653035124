"""dK and dV of 128 keys. A producer warp group and two consumers of 64 keys; all scores are transposed, [keys,
queries], so that what one product gives is an operand of the next without leaving the registers. No atomics.

LATE: the last product of a tile is issued with the first ones of the next. DK, DV: which of the two are wanted.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import positions_of, row_of, seen_of, tile_of
from manyheads.engines.triton.hopper.kernels.dropping import dropped, kept, key_of
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
def _load(
    q_desc, do_desc, top_desc, delta_desc, qs, dos, tops, deltas, q_full, q_free, do_full, do_free,
    b, h, tile, lines, step,
):  # fmt: skip
    """A tile of q and dO and the numbers of its rows."""
    Q_STAGES: gl.constexpr = qs.shape[0]
    DO_STAGES: gl.constexpr = dos.shape[0]
    QUERIES: gl.constexpr = qs.shape[3]
    a = step % Q_STAGES
    mbarrier.wait(q_free.index(a), ((step // Q_STAGES) & 1) ^ 1)
    mbarrier.expect(q_full.index(a), QUERIES * qs.shape[4] * 2 + QUERIES * 4)
    tma_load(q_desc, [b, h, tile * QUERIES, 0], q_full.index(a), qs.index(a))
    tma_load(top_desc, [lines + tile, 0], q_full.index(a), tops.index(a))
    c = step % DO_STAGES
    mbarrier.wait(do_free.index(c), ((step // DO_STAGES) & 1) ^ 1)
    mbarrier.expect(do_full.index(c), QUERIES * dos.shape[4] * 2 + QUERIES * 4)
    tma_load(do_desc, [b, h, tile * QUERIES, 0], do_full.index(c), dos.index(c))
    tma_load(delta_desc, [lines + tile, 0], do_full.index(c), deltas.index(c))


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, top_desc, delta_desc, k0, k1, v0, v1, kv_full, qs, dos, tops, deltas,
    q_full, q_free, do_full, do_free, qs1, dos1, tops1, deltas1, q_full1, q_free1, do_full1, do_free1,
    table, table1, table_head, b, heads, kv_head, group, key, q_len, padded,
    KIND: gl.constexpr, DK: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = qs.shape[3]
    DIM: gl.constexpr = qs.shape[4]
    V_DIM: gl.constexpr = dos.shape[4]
    ROWS: gl.constexpr = k0.shape[2]
    tiles = (q_len + QUERIES - 1) // QUERIES
    mbarrier.expect(kv_full, 2 * ROWS * (DIM + (V_DIM if DK else 0)) * 2)
    tma_load(k_desc, [b, kv_head, key, 0], kv_full, k0)
    tma_load(k_desc, [b, kv_head, key + ROWS, 0], kv_full, k1)
    if DK:
        tma_load(v_desc, [b, kv_head, key, 0], kv_full, v0)
        tma_load(v_desc, [b, kv_head, key + ROWS, 0], kv_full, v1)
    step = 0
    step1 = 0
    for member in range(group):
        h = kv_head * group + member
        lines = (b * heads + h) * (padded // QUERIES)
        line, n, lo, f0, f1 = row_of(table + h.to(gl.int64) * table_head, q_len // QUERIES, tiles, KIND)
        if HALVES:
            line1, n1, lo, f0, f1 = row_of(table1 + h.to(gl.int64) * table_head, q_len // QUERIES, tiles, KIND)
            for turn in range(gl.maximum(n, n1)):
                if turn < n:
                    tile, _ = tile_of(line, turn, lo, f0, f1, KIND)
                    _load(
                        q_desc, do_desc, top_desc, delta_desc, qs, dos, tops, deltas, q_full, q_free, do_full, do_free,
                        b, h, tile, lines, step,
                    )  # fmt: skip
                    step += 1
                if turn < n1:
                    tile1, _ = tile_of(line1, turn, lo, f0, f1, KIND)
                    _load(
                        q_desc, do_desc, top_desc, delta_desc, qs1, dos1, tops1, deltas1, q_full1, q_free1, do_full1,
                        do_free1, b, h, tile1, lines, step1,
                    )  # fmt: skip
                    step1 += 1
        else:
            for turn in range(n):
                tile, _ = tile_of(line, turn, lo, f0, f1, KIND)
                _load(
                    q_desc, do_desc, top_desc, delta_desc, qs, dos, tops, deltas, q_full, q_free, do_full, do_free,
                    b, h, tile, lines, step,
                )  # fmt: skip
                step += 1


@gluon.jit
def _consumer(
    dk_desc, dv_desc, k, v, kv_full, qs, dos, tops, deltas, q_full, q_free, do_full, do_free,
    table, table_head, b, kv_head, group, key, q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step,
    scale, seed, threshold, inflation, bits, A, KIND: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr,
    MASK: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, LATE: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = qs.shape[0]
    DO_STAGES: gl.constexpr = dos.shape[0]
    QUERIES: gl.constexpr = qs.shape[3]
    DIM: gl.constexpr = qs.shape[4]
    V_DIM: gl.constexpr = dos.shape[4]
    ROWS: gl.constexpr = k.shape[2]
    dtype: gl.constexpr = dk_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, k_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, v_layout, 2)
    zero = gl.full([ROWS, QUERIES], 0.0, gl.float32, s_layout)
    if DK:
        dk = gl.full([ROWS, DIM], 0.0, gl.float32, k_layout)
        if LATE:  # as integers: pairs of 16-bit floats that a loop carries are turned round twice in each step
            held = gl.convert_layout(gl.full([ROWS, QUERIES], 0, gl.int16, s_layout), ds_layout)
    if DV:
        dv = gl.full([ROWS, V_DIM], 0.0, gl.float32, v_layout)
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    j = positions_of(kv_start, kv_at, kv_at_step, b, key, lines, kv_len, 1, POSITIONS)
    columns = gl.arange(0, QUERIES, gl.SliceLayout(0, s_layout))
    k2 = k.reshape([ROWS, DIM])
    v2 = v.reshape([ROWS, V_DIM])
    mbarrier.wait(kv_full, 0)
    step = 0
    for member in range(group):
        h = kv_head * group + member
        line, n, lo, f0, f1 = row_of(
            table + h.to(gl.int64) * table_head, q_len // QUERIES, (q_len + QUERIES - 1) // QUERIES, KIND
        )
        if seed is not None:
            low, high = key_of(seed, b, h)
        own = bits
        if bits is not None:
            own += h.to(gl.int64) * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
        for turn in range(n):
            tile, partial = tile_of(line, turn, lo, f0, f1, KIND)
            listed = listed_of(own, columns, tile * QUERIES, key, q_start, kv_len, ROWS, QUERY_BLOCK, KEY_BLOCK)
            a = step % Q_STAGES
            c = step % DO_STAGES
            before = gl.maximum(step - 1, 0) % Q_STAGES
            mbarrier.wait(q_full.index(a), (step // Q_STAGES) & 1)
            q_turned = qs.index(a).reshape([QUERIES, DIM]).permute((1, 0))
            s_later = warpgroup_mma(k2, q_turned, zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(c), (step // DO_STAGES) & 1)
            do = dos.index(c).reshape([QUERIES, V_DIM])
            if DK:
                dp_later = warpgroup_mma(v2, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                if LATE:
                    q_before = qs.index(before).reshape([QUERIES, DIM])
                    dk_later = warpgroup_mma(held.to(dtype, bitcast=True), q_before, dk, is_async=True)
            s = warpgroup_mma_wait((2 if LATE else 1) if DK else 0, deps=[s_later])
            i = positions_of(q_start, q_at, q_at_step, b, tile * QUERIES, columns, q_len, 0, POSITIONS)
            inside = seen_of(j, i, tile * QUERIES + columns, q_start, q_len, POSITIONS)
            inside = pairs_of(
                inside, listed[None, :], columns[None, :], lines[:, None], tile * QUERIES, q_start, ROWS, QUERY_BLOCK,
                KEY_BLOCK,
            )  # fmt: skip
            weight, slope = weights(
                s, tops.index(a).load(s_layout), b, h, i, j, inside, partial, scale, A,
                SCORE, DSCORE, MASK, MASKED, NORMALISER,
            )  # fmt: skip
            product = weight
            if seed is not None:
                keep = kept(low, high, i, j, threshold)
                product = dropped(weight, keep, inflation)
            if DV:
                p16 = gl.convert_layout(product.to(dtype), p_layout)
                dv_later = warpgroup_mma(p16, do, dv, is_async=True)
            if DK:
                if LATE:
                    dp, dk = warpgroup_mma_wait(1 if DV else 0, deps=[dp_later, dk_later])
                    mbarrier.arrive(q_free.index(before), pred=step > 0)
                else:
                    dp = warpgroup_mma_wait(1 if DV else 0, deps=[dp_later])
                if seed is not None:
                    dp = gl.where(keep, dp, 0.0) * inflation
                ds = through(slope, weight, dp, deltas.index(c).load(s_layout), NORMALISER)
                ds16 = gl.convert_layout(ds.to(dtype), ds_layout)
                if LATE:
                    held = ds16.to(gl.int16, bitcast=True)
                else:
                    dk_later = warpgroup_mma(ds16, qs.index(a).reshape([QUERIES, DIM]), dk, is_async=True)
            if DV:
                dv = warpgroup_mma_wait(0 if LATE or not DK else 1, deps=[dv_later])
            mbarrier.arrive(do_free.index(c))
            if DK and not LATE:
                dk = warpgroup_mma_wait(0, deps=[dk_later])
            if not (DK and LATE):
                mbarrier.arrive(q_free.index(a))
            step += 1
    if DK:
        if LATE:  # noqa: SIM102  one is known to the compiler, the other is not
            if step > 0:
                last = qs.index((step - 1) % Q_STAGES).reshape([QUERIES, DIM])
                dk_later = warpgroup_mma(held.to(dtype, bitcast=True), last, dk, is_async=True)
                dk = warpgroup_mma_wait(0, deps=[dk_later])
        k2.store((dk * scale).to(dtype))
    if DV:
        if seed is not None:
            dv = dv * inflation
        if DK:
            v2.store(dv.to(dtype))
        else:
            v.reshape([ROWS, V_DIM]).store(dv.to(dtype))
    fence_async_shared()
    if DK:
        tma_store(dk_desc, [b, kv_head, key, 0], k)
    if DV:
        tma_store(dv_desc, [b, kv_head, key, 0], v)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "padded", "threshold",
    ]
)  # fmt: skip
def keys(
    q_desc, do_desc, k_desc, v_desc, top_desc, delta_desc, dk_desc, dv_desc, q_at, kv_at, table, table_batch,
    table_head, table_row, heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, padded, scale,
    seed, threshold, inflation, bits, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, KIND: gl.constexpr,
    MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    LATE: gl.constexpr, HALVES: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    A, MASK: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr,
):  # fmt: skip
    """dK (if DK) and dV (if DV) of a tile of keys, over the query heads that share it, in their order. Grid: tiles *
    kv_heads * batch. table: as in the forward pass, with the sides exchanged; bits: as there. HALVES: the table
    has a row for every 64 keys, and each consumer its own q and dO."""
    ROWS: gl.constexpr = k_desc.block_shape[2]
    QUERIES: gl.constexpr = q_desc.block_shape[2]
    DIM: gl.constexpr = q_desc.block_shape[3]
    V_DIM: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    tiles = (kv_len + 2 * ROWS - 1) // (2 * ROWS)
    pid = gl.program_id(0)
    at = pid % tiles  # the first keys are seen by most in a causal mask: longest first
    kv_heads = heads // group
    b = pid // tiles // kv_heads
    kv_head = pid // tiles % kv_heads
    key = at * (2 * ROWS)
    table += b.to(gl.int64) * table_batch + at.to(gl.int64) * (table_row * (2 if HALVES else 1))
    table1 = table
    if bits is not None:
        bits += b.to(gl.int64) * heads * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
    k0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], k_desc.layout)
    k1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], k_desc.layout)
    v0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], v_desc.layout)
    v1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], v_desc.layout)
    qs = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, QUERIES, DIM], q_desc.layout)
    dos = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, 1, QUERIES, V_DIM], do_desc.layout)
    tops = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 1, QUERIES], top_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 1, QUERIES], delta_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    do_free = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    qs1, dos1, tops1, deltas1 = qs, dos, tops, deltas
    q_full1, q_free1, do_full1, do_free1 = q_full, q_free, do_full, do_free
    if HALVES:
        table1 += table_row
        qs1 = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, QUERIES, DIM], q_desc.layout)
        dos1 = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, 1, QUERIES, V_DIM], do_desc.layout)
        tops1 = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 1, QUERIES], top_desc.layout)
        deltas1 = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 1, QUERIES], delta_desc.layout)
        q_full1 = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
        q_free1 = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
        do_full1 = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
        do_free1 = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(Q_STAGES):
            mbarrier.init(q_full1.index(slot), count=1)
            mbarrier.init(q_free1.index(slot), count=1)
        for slot in gl.static_range(DO_STAGES):
            mbarrier.init(do_full1.index(slot), count=1)
            mbarrier.init(do_free1.index(slot), count=1)
    mbarrier.init(kv_full, count=1)
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=1 if HALVES else 2)
    for slot in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(slot), count=1)
        mbarrier.init(do_free.index(slot), count=1 if HALVES else 2)
    gl.warp_specialize(
        [
            (_consumer, (
                dk_desc, dv_desc, k0, v0, kv_full, qs, dos, tops, deltas, q_full, q_free, do_full, do_free,
                table, table_head, b, kv_head, group, key, q_len, kv_len, q_start, kv_start, q_at, q_at_step,
                kv_at, kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE, DSCORE, MASK, MASKED,
                POSITIONS, NORMALISER, DK, DV, LATE, QUERY_BLOCK, KEY_BLOCK,
            )),
            (_consumer, (
                dk_desc, dv_desc, k1, v1, kv_full, qs1, dos1, tops1, deltas1, q_full1, q_free1, do_full1, do_free1,
                table1, table_head, b, kv_head, group, key + ROWS, q_len, kv_len, q_start, kv_start, q_at, q_at_step,
                kv_at, kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE, DSCORE, MASK, MASKED,
                POSITIONS, NORMALISER, DK, DV, LATE, QUERY_BLOCK, KEY_BLOCK,
            )),
            (_producer, (
                q_desc, do_desc, k_desc, v_desc, top_desc, delta_desc, k0, k1, v0, v1, kv_full, qs, dos, tops, deltas,
                q_full, q_free, do_full, do_free, qs1, dos1, tops1, deltas1, q_full1, q_free1, do_full1, do_free1,
                table, table1, table_head, b, heads, kv_head, group, key, q_len, padded, KIND, DK, HALVES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
