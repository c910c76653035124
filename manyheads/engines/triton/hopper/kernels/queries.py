"""dQ of 128 queries: a producer warp group and two consumers of 64 queries. No atomics. The last product of a tile is
issued with the first ones of the next, which may be of the program's next row, see several.py. HELD: dO stays in
registers, and its place is free for the next row's once a product has read them: before that, they are on their way."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import RANGES, positions_of, row_of, seen_of
from manyheads.engines.triton.hopper.kernels.dropping import kept, key_of
from manyheads.engines.triton.hopper.kernels.gathered import keys_at, load_keys
from manyheads.engines.triton.hopper.kernels.listed import listed_of, pairs_of, words_of
from manyheads.engines.triton.hopper.kernels.several import place_of, share_of
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
    q_desc, do_desc, k_desc, v_desc, q0, q1, do0, do1, q_full, q_free, do_full, do_free, ks, vs, k_full, k_free,
    v_full, v_free, first, count, tiles, heads, group, table, table_batch, table_head, table_row,
    kv_len, PARTS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = q0.shape[0]
    K_STAGES: gl.constexpr = ks.shape[0]
    V_STAGES: gl.constexpr = vs.shape[0]
    ROWS: gl.constexpr = q0.shape[3]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    if Q_STAGES == 1:  # programs of one row
        count = 1
    done = 0
    for turn in range(count):
        b, h, _, at, line = place_of(first + turn, tiles, heads, table, table_batch, table_head, table_row)
        line, n, lo, _, _ = row_of(line, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
        row = at * (2 * ROWS)
        slot = turn % Q_STAGES
        mbarrier.wait(q_free.index(slot), ((turn // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), 2 * ROWS * DIM * 2)
        tma_load(q_desc, [b, h, row, 0], q_full.index(slot), q0.index(slot))
        tma_load(q_desc, [b, h, row + ROWS, 0], q_full.index(slot), q1.index(slot))
        mbarrier.wait(do_free, (turn & 1) ^ 1)
        mbarrier.expect(do_full, 2 * ROWS * V_DIM * 2)
        tma_load(do_desc, [b, h, row, 0], do_full, do0)
        tma_load(do_desc, [b, h, row + ROWS, 0], do_full, do1)
        for step in range(gl.maximum((n + PARTS - 1) // PARTS, 1)):
            a = done % K_STAGES
            load_keys(
                k_desc, b, h // group, line, step, lo, k_full.index(a), k_free.index(a), ((done // K_STAGES) & 1) ^ 1,
                ks.index(a), KEYS, DIM, PARTS, KIND,
            )  # fmt: skip
            c = done % V_STAGES
            load_keys(
                v_desc, b, h // group, line, step, lo, v_full.index(c), v_free.index(c), ((done // V_STAGES) & 1) ^ 1,
                vs.index(c), KEYS, V_DIM, PARTS, KIND,
            )  # fmt: skip
            done += 1


@gluon.jit
def _written(dq, dq_desc, out, b, h, row, scale, empty):
    """Sends dQ of a row of tiles on its way."""
    tma_store_wait(0)
    out.reshape([out.shape[2], out.shape[3]]).store((gl.where(empty, 0.0, dq) * scale).to(dq_desc.dtype))
    fence_async_shared()
    tma_store(dq_desc, [b, h, row, 0], out)


@gluon.jit
def _step(
    dq, ds16, q, do2, own_top, own_delta, ks, vs, k_full, k_free, v_full, v_free, line, step, lo, f0, f1, done, b, h,
    row, i, lines, columns, zero, kv_len, q_start, kv_start, kv_at, kv_at_step, scale, low, high, threshold, inflation,
    bits, A, KIND: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
    POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """One tile of keys: dq with the tile before it, and what this one adds."""
    K_STAGES: gl.constexpr = ks.shape[0]
    V_STAGES: gl.constexpr = vs.shape[0]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    key, partial = keys_at(line, step, lo, f0, f1, columns, KEYS, PARTS, KIND)
    listed = listed_of(bits, lines, row, key, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
    a = done % K_STAGES
    c = done % V_STAGES
    before = gl.maximum(done - 1, 0) % K_STAGES
    mbarrier.wait(k_full.index(a), (done // K_STAGES) & 1)
    k_turned = ks.index(a).reshape([KEYS, DIM]).permute((1, 0))
    s_later = warpgroup_mma(q, k_turned, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(c), (done // V_STAGES) & 1)
    v_turned = vs.index(c).reshape([KEYS, V_DIM]).permute((1, 0))
    dp_later = warpgroup_mma(do2, v_turned, zero, use_acc=False, is_async=True)
    dq_later = warpgroup_mma(ds16, ks.index(before).reshape([KEYS, DIM]), dq, is_async=True)
    s = warpgroup_mma_wait(2, deps=[s_later])
    j = positions_of(kv_start, kv_at, kv_at_step, b, key, columns, kv_len, 0, POSITIONS)
    inside = seen_of(i, j, key + columns, kv_start, kv_len, POSITIONS)
    inside = pairs_of(
        inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
    )
    weight, slope = weights(s, own_top, b, h, i, j, inside, partial, scale, A, SCORE, DSCORE, MASK, MASKED, NORMALISER)
    dp = warpgroup_mma_wait(1, deps=[dp_later])
    mbarrier.arrive(v_free.index(c))
    if threshold is not None:
        dp = gl.where(kept(low, high, i, j, threshold), dp, 0.0) * inflation
    ds = through(slope, weight, dp, own_delta, NORMALISER)
    dq = warpgroup_mma_wait(0, deps=[dq_later])
    mbarrier.arrive(k_free.index(before), pred=done > 0)
    return dq, gl.convert_layout(ds.to(q.dtype), ds16.type.layout)


@gluon.jit
def _consumer(
    dq_desc, top, delta, qs, do, out, q_full, q_free, do_full, do_free, ks, vs, k_full, k_free, v_full, v_free,
    first, count, tiles, heads, table, table_batch, table_head, table_row, below, q_len, kv_len,
    q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, padded, scale, seed, threshold, inflation, bits, A,
    KIND: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr,
    POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, HELD: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    KEY_BLOCK: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = qs.shape[0]
    K_STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = qs.shape[3]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    dq = gl.full([ROWS, DIM], 0.0, gl.float32, q_layout)
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    ds16 = gl.convert_layout(gl.full([ROWS, KEYS], 0.0, dtype, s_layout), ds_layout)
    if Q_STAGES == 1:  # programs of one row
        count = 1
    done = 0
    b, h, row, n = 0, 0, 0, 0
    own = bits
    for turn in range(count):
        # The first keys of a row, and the last product of the row before.
        b1, h1, head, at, line = place_of(first + turn, tiles, heads, table, table_batch, table_head, table_row)
        line, n1, lo, f0, f1 = row_of(line, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
        row1 = at * (2 * ROWS) + below
        own_top = gl.load(top + head.to(gl.int64) * padded + row1 + lines)[:, None]
        own_delta = gl.load(delta + head.to(gl.int64) * padded + row1 + lines)[:, None]
        mbarrier.wait(do_full, turn & 1)
        if HELD:  # in registers
            do2 = do.reshape([ROWS, V_DIM]).load(gl.DotOperandLayout(0, q_layout, 2))
        else:
            do2 = do.reshape([ROWS, V_DIM])
        q = qs.index(turn % Q_STAGES).reshape([ROWS, DIM])
        mbarrier.wait(q_full.index(turn % Q_STAGES), (turn // Q_STAGES) & 1)
        i = positions_of(q_start, q_at, q_at_step, b1, row1, lines, q_len, 1, POSITIONS)
        if bits is not None:
            own = bits + head.to(gl.int64) * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
        low = 0
        high = 0
        if seed is not None:
            low, high = key_of(seed, b1, h1)
        dq, ds16 = _step(
            dq, ds16, q, do2, own_top, own_delta, ks, vs, k_full, k_free, v_full, v_free, line, 0, lo, f0, f1, done, b1,
            h1, row1, i, lines, columns, zero, kv_len, q_start, kv_start, kv_at, kv_at_step, scale, low, high,
            threshold, inflation, own, A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS, NORMALISER, QUERY_BLOCK,
            KEY_BLOCK, PARTS,
        )  # fmt: skip
        if HELD:
            mbarrier.arrive(do_free)
        if turn > 0:
            _written(dq, dq_desc, out, b, h, row, scale, n <= 0)
        dq = gl.full([ROWS, DIM], 0.0, gl.float32, q_layout)
        b, h, row, n = b1, h1, row1, n1
        done += 1
        for step in range(1, (n1 + PARTS - 1) // PARTS):
            dq, ds16 = _step(
                dq, ds16, q, do2, own_top, own_delta, ks, vs, k_full, k_free, v_full, v_free, line, step, lo, f0, f1,
                done, b1, h1, row1, i, lines, columns, zero, kv_len, q_start, kv_start, kv_at, kv_at_step, scale,
                low, high, threshold, inflation, own, A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS, NORMALISER,
                QUERY_BLOCK, KEY_BLOCK, PARTS,
            )  # fmt: skip
            done += 1
        mbarrier.arrive(q_free.index(turn % Q_STAGES))
    last = (done - 1) % K_STAGES
    dq_later = warpgroup_mma(ds16, ks.index(last).reshape([KEYS, DIM]), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq_later])
    _written(dq, dq_desc, out, b, h, row, scale, n <= 0)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "padded", "threshold", "several", "halvings", "halved",
    ]
)  # fmt: skip
def queries(
    q_desc, do_desc, k_desc, v_desc, dq_desc, top, delta, q_at, kv_at, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, padded, scale,
    seed, threshold, inflation, bits, several, halvings, halved, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, KIND: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr,
    NORMALISER: gl.constexpr, HELD: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr, PARTS: gl.constexpr,
    A, MASK: gl.constexpr, SCORE: gl.constexpr, DSCORE: gl.constexpr,
):  # fmt: skip
    """dQ of tiles of queries of one head each. table, bits, several, halvings, halved, Q_STAGES, PARTS:
    as in the forward pass."""
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2] * PARTS
    DIM: gl.constexpr = q_desc.block_shape[3]
    V_DIM: gl.constexpr = do_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    tiles = (q_len + 2 * ROWS - 1) // (2 * ROWS)
    first = gl.program_id(0)
    count = 1
    if Q_STAGES > 1:
        first, count = share_of(first, several, halvings, halved)
    if KIND == RANGES and MASK is None:  # of queries in rounds; where a mask has ranges, reading them takes time
        _, _, _, _, line = place_of(first, tiles, heads, table, table_batch, table_head, table_row)
        _, n, _, _, _ = row_of(line, 0, 0, KIND)
        if n < 0:  # nobody asks for these queries
            return
    q0 = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, ROWS, DIM], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, ROWS, DIM], q_desc.layout)
    do0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], do_desc.layout)
    do1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], do_desc.layout)
    dq0 = q0.index(0)
    dq1 = q1.index(0)
    if Q_STAGES > 1:  # where q was is the next row's but one
        dq0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
        dq1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, KEYS, DIM], q_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, KEYS, V_DIM], do_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    do_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(do_full, count=1)
    mbarrier.init(do_free, count=2)
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=2)
    for slot in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
    for slot in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_free.index(slot), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                dq_desc, top, delta, q0, do0, dq0, q_full, q_free, do_full, do_free, ks, vs, k_full, k_free, v_full,
                v_free, first, count, tiles, heads, table, table_batch, table_head, table_row, 0, q_len, kv_len,
                q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, padded, scale, seed, threshold, inflation, bits,
                A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS, NORMALISER, HELD, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_consumer, (
                dq_desc, top, delta, q1, do1, dq1, q_full, q_free, do_full, do_free, ks, vs, k_full, k_free, v_full,
                v_free, first, count, tiles, heads, table, table_batch, table_head, table_row, ROWS, q_len, kv_len,
                q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, padded, scale, seed, threshold, inflation, bits,
                A, KIND, SCORE, DSCORE, MASK, MASKED, POSITIONS, NORMALISER, HELD, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_producer, (
                q_desc, do_desc, k_desc, v_desc, q0, q1, do0, do1, q_full, q_free, do_full, do_free, ks, vs, k_full,
                k_free, v_full, v_free, first, count, tiles, heads, group, table, table_batch, table_head, table_row,
                kv_len, PARTS, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
