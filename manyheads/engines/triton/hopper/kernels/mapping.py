"""Which tiles of a mask are empty, partial or full, in plain Triton: a block of the map for each program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def side(at, start, tile, length, SIZE: tl.constexpr):
    """Of each tile of one side the least and the greatest position; the first and the last one, as if they were a run;
    whether they are one; whether it has no token; and whether one is absent."""
    place = tile * SIZE
    count = tl.minimum(length - place, SIZE)
    first = start + place
    low = first
    high = first + count - 1
    run = first == first
    void = ~run
    gap = void
    if at is not None:
        low = tl.full(tile.shape, 2**30, tl.int32)
        high = low * 0 - 1
        first = low * 0 - 2**30  # of the tokens, each less its place
        other = low
        for step in range(SIZE):
            found = tl.load(at + tl.minimum(place + step, length - 1)).to(tl.int32)
            present = (found >= 0) & (step < count)
            gap = gap | ((found < 0) & (step < count))
            low = tl.where(present, tl.minimum(low, found), low)
            high = tl.where(present, tl.maximum(high, found), high)
            first = tl.where(present, tl.maximum(first, found - step), first)
            other = tl.where(present, tl.minimum(other, found - step), other)
        void = high < 0
        run = void | (first == other)
        low = tl.where(void, 0, low)
        high = tl.where(void, 0, high)
        first = tl.where(void, 0, first)
    return low, high, first, first + count - 1, run, void, gap


@triton.jit
def mapping(
    out, q_at, kv_at, q_at_step, kv_at_step, heads, rows, columns, q_len, kv_len, q_start, kv_start,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, A, BOUNDS: tl.constexpr,
):  # fmt: skip
    """out: uint8 [batch, heads, rows, columns] of tiles of QUERIES x KEYS pairs, as Program.tiles gives it.

    q_at, kv_at: integers [batch, len], -1 for an absent token, or None for positions from q_start and kv_start on; and
    their steps from one batch to the next. Grid: blocks of BLOCK x BLOCK tiles * heads * batch.
    """
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0)
    head = pid // (down * across)
    b, h = head // heads, head % heads
    row = pid // across % down * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = pid % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    if q_at is not None:
        q_at += b.to(tl.int64) * q_at_step
    if kv_at is not None:
        kv_at += b.to(tl.int64) * kv_at_step
    i_low, i_high, i_first, i_last, i_run, i_void, i_gap = side(q_at, q_start, row, q_len, QUERIES)
    j_low, j_high, j_first, j_last, j_run, j_void, j_gap = side(kv_at, kv_start, column, kv_len, KEYS)
    states = tl.full([BLOCK, BLOCK], 2, tl.int32)  # FULL
    if BOUNDS is not None:
        run = i_run & j_run
        first = tl.where(run, i_first - j_last, i_low - j_high)
        last = tl.where(run, i_last - j_first, i_high - j_low)
        queries = q_at, q_start, row * QUERIES, q_len, i_high, i_low, i_high
        keys = kv_at, kv_start, column * KEYS, kv_len, j_high, j_low, j_high
        differences = None, first, 0, last - first + 1, 0, first, last
        sure, possible = BOUNDS(b, h, queries, keys, differences, run, QUERIES, KEYS, A)
        states = tl.zeros([BLOCK, BLOCK], tl.int32) + sure.to(tl.int32) + possible.to(tl.int32)
    states = tl.where(i_gap | j_gap, tl.minimum(states, 1), states)  # PARTIAL
    states = tl.where(i_void | j_void, 0, states)  # EMPTY
    at = out + (head.to(tl.int64) * rows + row) * columns + column
    tl.store(at, states.to(tl.uint8), mask=(row < rows) & (column < columns))
