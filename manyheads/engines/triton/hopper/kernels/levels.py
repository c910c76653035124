"""A level for each query that depends on all of its scores: the tau of entmax (newton.py), or one that the k largest
scores reach (brackets.py).

One launch is one look at all keys. A tile of queries that has arrived is left alone. A producer warp group loads tiles
of keys, two consumers of 64 rows each compute, as in attend.py.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.brackets import counted, narrowed, nothing_counted
from manyheads.engines.triton.hopper.kernels.common import changed, positions_of, row_of, seen_of, tile_of
from manyheads.engines.triton.hopper.kernels.newton import moved, nothing_weighed, weighed
from manyheads.engines.triton.hopper.names import (
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _producer(
    q_desc, k_desc, q0, q1, q_full, ks, k_full, k_free, table, b, h, kv_head, row, n, lo, f0, f1, KIND: gl.constexpr
):
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q0.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    if n > 0:
        mbarrier.expect(q_full, 2 * ROWS * DIM * 2)
        tma_load(q_desc, [b, h, row, 0], q_full, q0)
        tma_load(q_desc, [b, h, row + ROWS, 0], q_full, q1)
    for step in range(n):
        slot = step % STAGES
        tile, _ = tile_of(table, step, lo, f0, f1, KIND)
        mbarrier.wait(k_free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), KEYS * DIM * 2)
        tma_load(k_desc, [b, kv_head, tile * KEYS, 0], k_full.index(slot), ks.index(slot))


@gluon.jit
def _consumer(
    levels, ends, ahead, powers, count, q, q_full, ks, k_full, k_free, table, b, h, row, n, lo, f0, f1, q_len, kv_len,
    q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, A,
    KIND: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr,
    FIRST: gl.constexpr, POWER: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    rows = row + lines
    there = rows < q_len
    i = positions_of(q_start, q_at, q_at_step, b, row, lines, q_len, 1, POSITIONS)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    level = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    end = level
    power = 1.0
    if not FIRST:
        level = gl.load(levels + rows, mask=there, other=float("inf"))
        if ends is not None:
            end = gl.load(ends + rows, mask=there, other=float("inf"))
        elif POWER == 0:
            power = gl.load(powers + h)
    if ends is not None:
        first, second, third = nothing_counted(ROWS, gl.SliceLayout(1, s_layout), FIRST)
    else:
        first, second, third = nothing_weighed(ROWS, gl.SliceLayout(1, s_layout))
    q2 = q.reshape([ROWS, DIM])
    if n > 0:
        mbarrier.wait(q_full, 0)
    for step in range(n):
        slot = step % STAGES
        tile, partial = tile_of(table, step, lo, f0, f1, KIND)
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        k = ks.index(slot).reshape([KEYS, DIM]).permute((1, 0))
        s_later = warpgroup_mma(q2, k, zero, use_acc=False, is_async=True)
        j = positions_of(kv_start, kv_at, kv_at_step, b, tile * KEYS, columns, kv_len, 0, POSITIONS)
        inside = seen_of(i, j, tile * KEYS + columns, kv_start, kv_len, POSITIONS)
        s = warpgroup_mma_wait(0, deps=[s_later])
        mbarrier.arrive(k_free.index(slot))
        z = changed(s, b, h, i, j, inside, partial, scale, A, SCORE, MASK, MASKED, 0)
        if ends is not None:
            first, second, third = counted(z, level, end, first, second, third, FIRST)
        else:
            first, second, third = weighed(z, level, first, second, third, power, FIRST, POWER)
    if ends is not None:
        level, end, waiting = narrowed(level, end, first, second, third, count, FIRST)
        gl.store(ends + rows, end, mask=there)
    else:
        level, waiting = moved(level, first, second, third, power, FIRST, POWER)
    gl.store(levels + rows, level, mask=there)
    gl.store(ahead, gl.max(gl.where(waiting & there, 1, 0), 0))


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "count",
    ]
)  # fmt: skip
def levels(
    q_desc, k_desc, level, ends, ahead, powers, q_at, kv_at, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, scale, count,
    STAGES: gl.constexpr, KIND: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr, FIRST: gl.constexpr,
    POWER: gl.constexpr, A, MASK: gl.constexpr, SCORE: gl.constexpr,
):  # fmt: skip
    """level, float32 [batch, heads, q_len], after one look at the keys of each query. Grid: tiles * heads * batch.

    ahead: int32 [programs, 2], which half tiles have not arrived. FIRST: level is not read, but begun.
    ends, count: where brackets end, like level, and how many scores shall reach it; None twice for entmax.
    powers: float32 [heads] if POWER is 0; else POWER is the power. SCORE gives z. Else as in attend.py.
    """
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2]
    DIM: gl.constexpr = k_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = (q_len + 2 * ROWS - 1) // (2 * ROWS)
    pid = gl.program_id(0)
    at = q_tiles - 1 - pid % q_tiles
    head_of_all = pid // q_tiles
    b = head_of_all // heads
    h = head_of_all % heads
    row = at * (2 * ROWS)
    table += b.to(gl.int64) * table_batch + h.to(gl.int64) * table_head + at.to(gl.int64) * table_row
    level += head_of_all.to(gl.int64) * q_len
    if ends is not None:
        ends += head_of_all.to(gl.int64) * q_len
    ahead += 2 * pid
    table, n, lo, f0, f1 = row_of(table, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
    if not FIRST:
        n = gl.where((gl.load(ahead) | gl.load(ahead + 1)) != 0, n, 0)

    q0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, DIM], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, DIM], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                level, ends, ahead, powers, count, q0, q_full, ks, k_full, k_free, table, b, h, row, n, lo, f0, f1,
                q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, A, KIND, SCORE, MASK,
                MASKED, POSITIONS, FIRST, POWER,
            )),
            (_consumer, (
                level, ends, ahead + 1, powers, count, q1, q_full, ks, k_full, k_free, table, b, h, row + ROWS, n,
                lo, f0, f1, q_len, kv_len, q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, A, KIND,
                SCORE, MASK, MASKED, POSITIONS, FIRST, POWER,
            )),
            (_producer, (
                q_desc, k_desc, q0, q1, q_full, ks, k_full, k_free, table, b, h, h // group, row, n, lo, f0, f1, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
