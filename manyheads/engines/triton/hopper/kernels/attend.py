"""The forward pass in Gluon. One producer warp group loads tiles, two consumers of 64 rows each compute. A program has
several rows of tiles, see several.py; a consumer multiplies the first keys of one while it ends the row before.

A consumer multiplies q with the next keys while it takes the softmax of the present ones; if DEEP, only while it takes
the exponentials, and multiplies weights with values while it looks for the next maximum. Keys and values wait in
STAGES slots each; a slot has a barrier that the copy completes (full) and one at which both consumers arrive (free).
q has a second slot for the next row, and o goes where q was.

Descriptors have four dimensions, so that the hardware stops at a head's last row: what is read beyond it is zero, what
is written beyond it is dropped.
"""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import LOG2E, RANGES, changed, positions_of, row_of, seen_of
from manyheads.engines.triton.hopper.kernels.dropping import key_of
from manyheads.engines.triton.hopper.kernels.gathered import keys_at, load_keys
from manyheads.engines.triton.hopper.kernels.listed import listed_of, pairs_of, words_of
from manyheads.engines.triton.hopper.kernels.several import place_of, share_of
from manyheads.engines.triton.hopper.kernels.softmax import faded, finished, shifted, weighed
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
    q_desc, k_desc, v_desc, q0, q1, q_full, q_free, ks, vs, k_full, k_free, v_full, v_free,
    first, count, tiles, heads, group, table, table_batch, table_head, table_row, kv_len,
    PARTS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = q0.shape[0]
    STAGES: gl.constexpr = ks.shape[0]
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
        slot = turn % Q_STAGES
        mbarrier.wait(q_free.index(slot), ((turn // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), 2 * ROWS * DIM * 2)
        tma_load(q_desc, [b, h, at * (2 * ROWS), 0], q_full.index(slot), q0.index(slot))
        tma_load(q_desc, [b, h, at * (2 * ROWS) + ROWS, 0], q_full.index(slot), q1.index(slot))
        for step in range(gl.maximum((n + PARTS - 1) // PARTS, 1)):
            slot = done % STAGES
            free = ((done // STAGES) & 1) ^ 1
            load_keys(
                k_desc, b, h // group, line, step, lo, k_full.index(slot), k_free.index(slot), free, ks.index(slot),
                KEYS, DIM, PARTS, KIND,
            )  # fmt: skip
            load_keys(
                v_desc, b, h // group, line, step, lo, v_full.index(slot), v_free.index(slot), free, vs.index(slot),
                KEYS, V_DIM, PARTS, KIND,
            )  # fmt: skip
            done += 1


@gluon.jit
def _consumer(
    o_desc, lse, sink, qs, os, q_full, q_free, ks, vs, k_full, k_free, v_full, v_free,
    first, count, tiles, heads, table, table_batch, table_head, table_row, below, q_len, kv_len,
    q_start, kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, seed, threshold, inflation, bits, A,
    KIND: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, POSITIONS: gl.constexpr,
    NORMALISER: gl.constexpr, DEEP: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    Q_STAGES: gl.constexpr = qs.shape[0]
    STAGES: gl.constexpr = ks.shape[0]
    ROWS: gl.constexpr = qs.shape[3]
    KEYS: gl.constexpr = ks.shape[3]
    DIM: gl.constexpr = ks.shape[4]
    V_DIM: gl.constexpr = vs.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = o_desc.dtype
    factor = LOG2E if SCORE is not None else scale * LOG2E
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    own = bits
    if Q_STAGES == 1:  # programs of one row
        count = 1
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = ks.index(0).reshape([KEYS, DIM]).permute((1, 0))
    s_later = warpgroup_mma(qs.index(0).reshape([ROWS, DIM]), k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_later])
    mbarrier.arrive(k_free.index(0))
    for turn in range(count):
        b, h, head, at, line = place_of(first + turn, tiles, heads, table, table_batch, table_head, table_row)
        line, n, lo, f0, f1 = row_of(line, kv_len // KEYS, (kv_len + KEYS - 1) // KEYS, KIND)
        row = at * (2 * ROWS) + below
        empty = n <= 0  # by all: one step is taken, and forgotten
        n = gl.maximum((n + PARTS - 1) // PARTS, 1)
        i = positions_of(q_start, q_at, q_at_step, b, row, lines, q_len, 1, POSITIONS)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
        o = gl.full([ROWS, V_DIM], 0.0, gl.float32, o_layout)
        if bits is not None:
            own = bits + head.to(gl.int64) * words_of(q_len, q_start, kv_len, QUERY_BLOCK, KEY_BLOCK)
        low = 0
        high = 0
        if seed is not None:
            low, high = key_of(seed, b, h)
        q = qs.index(turn % Q_STAGES).reshape([ROWS, DIM])
        key, partial = keys_at(line, 0, lo, f0, f1, columns, KEYS, PARTS, KIND)
        listed = listed_of(own, lines, row, key, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
        if V_DIM == DIM and Q_STAGES > 1:
            tma_store_wait(0)
            mbarrier.arrive(q_free.index((turn + 1) % Q_STAGES), pred=turn > 0)
        j = positions_of(kv_start, kv_at, kv_at_step, b, key, columns, kv_len, 0, POSITIONS)
        inside = seen_of(i, j, key + columns, kv_start, kv_len, POSITIONS)
        inside = pairs_of(
            inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
        )
        s = changed(s, b, h, i, j, inside, partial, scale, A, SCORE, MASK, MASKED, NORMALISER)
        power, fade, m = shifted(s, m, factor, NORMALISER)
        if DEEP:
            ahead = done + gl.where((n > 1) | (turn < count - 1), 1, 0)
            mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1)
        else:
            p, l = weighed(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
        for step in range(1, n):
            slot = (done + step) % STAGES
            before = (done + step - 1) % STAGES
            key, partial = keys_at(line, step, lo, f0, f1, columns, KEYS, PARTS, KIND)
            listed = listed_of(own, lines, row, key, q_start, kv_len, KEYS, QUERY_BLOCK, KEY_BLOCK)
            if not DEEP:
                mbarrier.wait(k_full.index(slot), ((done + step) // STAGES) & 1)
            k = ks.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            s_later = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((done + step - 1) // STAGES) & 1)
            if DEEP:
                p, l = weighed(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
                p16 = gl.convert_layout(p.to(dtype), p_layout)
            o = faded(o, fade, NORMALISER)
            o_later = warpgroup_mma(p16, vs.index(before).reshape([KEYS, V_DIM]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_later])
            mbarrier.arrive(k_free.index(slot))
            j = positions_of(kv_start, kv_at, kv_at_step, b, key, columns, kv_len, 0, POSITIONS)
            inside = seen_of(i, j, key + columns, kv_start, kv_len, POSITIONS)
            inside = pairs_of(
                inside, listed[:, None], lines[:, None], columns[None, :], row, q_start, KEYS, QUERY_BLOCK, KEY_BLOCK
            )
            s = changed(s, b, h, i, j, inside, partial, scale, A, SCORE, MASK, MASKED, NORMALISER)
            power, fade, m = shifted(s, m, factor, NORMALISER)
            if DEEP:
                # For the next keys; after the last ones once more for these, whose slot is not filled again. It stands
                # here as a wait is a branch: the assembler does not move the wait for o over it, to before the maximum.
                ahead = done + step + gl.where((step < n - 1) | (turn < count - 1), 1, 0)
                mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1)
            else:
                p, l = weighed(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
            o = warpgroup_mma_wait(0, deps=[o_later])
            mbarrier.arrive(v_free.index(before))
            if not DEEP:
                p16 = gl.convert_layout(p.to(dtype), p_layout)
        if DEEP:
            p, l = weighed(power, s, fade, l, i, j, low, high, threshold, inflation, NORMALISER)
            p16 = gl.convert_layout(p.to(dtype), p_layout)
        done += n
        last = (done - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((done - 1) // STAGES) & 1)
        o = faded(o, fade, NORMALISER)
        o_later = warpgroup_mma(p16, vs.index(last).reshape([KEYS, V_DIM]), o, is_async=True)
        if Q_STAGES > 1:
            # The next row's first product, or after the last row one that nobody asks for, under the end of this row.
            slot = done % STAGES
            following = (turn + 1) % Q_STAGES
            if turn < count - 1:
                mbarrier.wait(q_full.index(following), ((turn + 1) // Q_STAGES) & 1)
                mbarrier.wait(k_full.index(slot), (done // STAGES) & 1)
            k = ks.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            s_later = warpgroup_mma(qs.index(following).reshape([ROWS, DIM]), k, zero, use_acc=False, is_async=True)
            o = warpgroup_mma_wait(1, deps=[o_later])
        else:
            o = warpgroup_mma_wait(0, deps=[o_later])
        mbarrier.arrive(v_free.index(last))
        o = gl.where(empty, 0.0, o)
        m = gl.where(empty, float("-inf"), m)
        o, own_lse = finished(o, m, l, sink, h, NORMALISER)
        if seed is not None:
            o = o * inflation
        if V_DIM == DIM and Q_STAGES > 1:
            out = qs.index(turn % Q_STAGES)
        else:
            out = os
            mbarrier.arrive(q_free.index(turn % Q_STAGES))
            tma_store_wait(0)
        out.reshape([ROWS, V_DIM]).store(o.to(dtype))
        fence_async_shared()
        tma_store(o_desc, [b, h, row, 0], out)
        gl.store(lse + head.to(gl.int64) * q_len + row + lines, own_lse, mask=row + lines < q_len)
        if Q_STAGES > 1:
            s = warpgroup_mma_wait(0, deps=[s_later])
            mbarrier.arrive(k_free.index(slot), pred=turn < count - 1)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
        "q_at_step", "kv_at_step", "threshold", "several", "halvings", "halved",
    ]
)  # fmt: skip
def attend(
    q_desc, k_desc, v_desc, o_desc, lse, sink, q_at, kv_at, table, table_batch, table_head, table_row,
    heads, group, q_len, kv_len, q_start, kv_start, q_at_step, kv_at_step, scale, seed, threshold, inflation,
    bits, several, halvings, halved, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
    MASKED: gl.constexpr, POSITIONS: gl.constexpr, NORMALISER: gl.constexpr, DEEP: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr, PARTS: gl.constexpr, A, MASK: gl.constexpr, SCORE: gl.constexpr,
):  # fmt: skip
    """o and lse [batch, heads, q_len] of tiles of queries of one head each.

    table: int32, see RANGES and LISTS; table_batch, table_head, table_row: its strides, 0 where it is shared.
    q_at, kv_at: if POSITIONS, int32 positions [batch, len], -1 for an absent token.
    seed, threshold, inflation: of dropout, see core/dropout.py, or None three times.
    bits, QUERY_BLOCK, KEY_BLOCK: of blocks that are no tiles, see listed.py, or None, 0 and 0.
    several, halvings, halved: which rows a program has; Q_STAGES: 1 if all have one row, else 2.
    PARTS: entries of a list that are one tile of keys, see gathered.py.
    A: what the functions score(s, b, h, i, j, A) and mask(b, h, i, j, A) read. MASKED: there are tiles to mask.
    """
    ROWS: gl.constexpr = q_desc.block_shape[2]
    KEYS: gl.constexpr = k_desc.block_shape[2] * PARTS
    DIM: gl.constexpr = q_desc.block_shape[3]
    V_DIM: gl.constexpr = o_desc.block_shape[3]
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
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, DIM], q_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, V_DIM], o_desc.layout)
    o0 = q0.index(0)
    o1 = q1.index(0)
    if V_DIM != DIM:
        o0 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], o_desc.layout)
        o1 = gl.allocate_shared_memory(dtype, [1, 1, ROWS, V_DIM], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=2)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_free.index(slot), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                o_desc, lse, sink, q0, o0, q_full, q_free, ks, vs, k_full, k_free, v_full, v_free,
                first, count, tiles, heads, table, table_batch, table_head, table_row, 0, q_len, kv_len, q_start,
                kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE,
                MASK, MASKED, POSITIONS, NORMALISER, DEEP, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_consumer, (
                o_desc, lse, sink, q1, o1, q_full, q_free, ks, vs, k_full, k_free, v_full, v_free,
                first, count, tiles, heads, table, table_batch, table_head, table_row, ROWS, q_len, kv_len, q_start,
                kv_start, q_at, q_at_step, kv_at, kv_at_step, scale, seed, threshold, inflation, bits, A, KIND, SCORE,
                MASK, MASKED, POSITIONS, NORMALISER, DEEP, QUERY_BLOCK, KEY_BLOCK, PARTS,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q0, q1, q_full, q_free, ks, vs, k_full, k_free, v_full, v_free,
                first, count, tiles, heads, group, table, table_batch, table_head, table_row, kv_len, PARTS, KIND,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
