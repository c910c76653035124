"""Lists of the best past blocks by the weights of windows of keys, summed over heads that choose together.

A program has the heads of a few queries in the rows of one tile. It looks at all windows twice: for the divisors of the
softmax, then for the weights, of which it leaves each block's greatest in a place of its own, which the cache holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.choosing.kernels.rows import columns_of, heaviest, ordered, store_lists
from manyheads.engines.triton.choosing.kernels.scores import in_halves, products

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(
    q, k, low, begin, n, k_n, seen, SEEN: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q.k [R, PART] of the windows from `begin` on, -inf from `seen` int32 [R] on, unless SEEN says that there are none
    of these."""
    columns = begin + tl.arange(0, PART)
    s = products(q, k, low, columns, n, k_n, D, PD, PRECISION)
    if not SEEN:
        s = tl.where(columns[None, :] < seen[:, None], s, float("-inf"))
    return s


@triton.jit
def _more(top, total, s, factor):
    """The greatest of the scores factor s, and the sum of 2^(score - greatest), with those of another part."""
    higher = tl.maximum(top, tl.max(s, 1) * factor)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(top - safe) + tl.sum(tl.exp2(s * factor[:, None] - safe[:, None]), 1)


@triton.jit
def divisors(
    q, factor, k, low, seen, whole, limit, n, k_n, D: tl.constexpr, PD: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sums of 2^(factor q.k) over the first `seen` int32 [R] rows of k each, and 0 for none; factor is
    positive. whole: rows that all see."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    for begin in range(0, whole, PART):
        s = _scores(q, k, low, begin, n, k_n, seen, True, D, PD, PART, PRECISION)
        top, total = _more(top, total, s, factor)
    for begin in range(whole, limit, PART):
        s = _scores(q, k, low, begin, n, k_n, seen, False, D, PD, PART, PRECISION)
        top, total = _more(top, total, s, factor)
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def _leave(
    s, factor, divisor, place, later, HIGH: tl.constexpr, LOW: tl.constexpr, EACH: tl.constexpr, QUERIES: tl.constexpr,
    STEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """At `place` [QUERIES, PART / STEP] the greatest weight of STEP windows each, summed over members, and `later` on
    that of the last OVERLAP of them. Rows of s [R, PART] stand for [HIGH, QUERIES / EACH, LOW, EACH]: HIGH LOW members
    of queries, so that a thread of Hopper's matrix units has all members, up to 4, of a query."""
    PART: tl.constexpr = s.shape[1]
    p = tl.exp2(s * factor[:, None] - divisor[:, None])
    p = tl.reshape(p, [HIGH, QUERIES // EACH, LOW, EACH, PART])
    if LOW > 1:
        p = tl.sum(p, 2, keep_dims=True)
    if HIGH > 1:
        p = tl.sum(p, 0, keep_dims=True)
    p = tl.reshape(p, [QUERIES, PART // STEP, STEP])
    tl.store(place, tl.max(p, 2))
    last = tl.where(tl.arange(0, STEP)[None, None, :] >= STEP - OVERLAP, p, 0.0)
    tl.store(place + later, tl.max(last, 2))


@triton.jit(
    do_not_specialize=[
        "tiles", "heads", "group", "queries", "n", "width", "scale", "count", "kernel", "stride", "dense", "key_block",
        "offset", "first", "local",
    ]
)  # fmt: skip
def windows(
    q, k, low, sizes, space, halves, indices, counts, tiles, heads, group, queries, n, width, q_b, q_h, q_m, scale,
    count, kernel, stride, dense, key_block, offset, first, local, TOGETHER: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, QUERIES: tl.constexpr,
    SOME: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    LINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads / TOGETHER, queries, width] and counts int32 [batch, heads / TOGETHER, queries] for q
    [batch, heads, queries, D] with these strides and the n windows k [batch, heads / group, n, D], float32, or float16
    in two parts, of which sizes float32 [batch, heads / group] times are meant.

    HIGH LOW: a power of 2 that TOGETHER fits in; rows are ordered as `_leave` says. STEP windows begin in a block, and
    OVERLAP in the one before reach into it. space: float32 [programs, 2, QUERIES, COLUMNS]; halves: float16 [programs,
    rows, PD], None for float32. A program does every so many of the tiles, the longest first.
    """
    own = space + tl.program_id(0).to(tl.int64) * (2 * QUERIES * COLUMNS)
    per_head = tl.cdiv(queries, QUERIES)
    sets = heads // TOGETHER
    rows = tl.arange(0, QUERIES * HIGH * LOW)
    member = rows // (QUERIES * LOW) * LOW + rows // EACH % LOW
    of_query = rows // (LOW * EACH) % (QUERIES // EACH) * EACH + rows % EACH
    part = tl.arange(0, PART // STEP)
    columns = columns_of(COLUMNS // LINE, LINE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = tiles - 1 - number
        which = (tile % (tiles // per_head)).to(tl.int64)
        m = tile // (tiles // per_head) * QUERIES
        head = which // sets * heads + which % sets * TOGETHER
        k_head = head // group
        query = m + of_query
        there = (query < queries) & (member < TOGETHER)
        at = q + head // heads * q_b + (head % heads + member) * q_h + query.to(tl.int64) * q_m
        dims = tl.arange(0, PD)
        x = tl.load(at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        x = tl.where(scale < 0, -x, x)
        factor = tl.zeros([QUERIES * HIGH * LOW], tl.float32) + tl.abs(scale) * LOG2E
        if low is None:
            low_head = None
        else:
            x, size = in_halves(x)
            factor = factor * size * tl.load(sizes + k_head)
            low_head = low + k_head * n * D
            # By way of memory, or the compiler keeps queries in registers, for which there is no room.
            at = halves + (tl.program_id(0) * (QUERIES * HIGH * LOW) + rows)[:, None] * PD + dims[None, :]
            tl.store(at, x)
            tl.debug_barrier()
            x = tl.load(at)
        ended = offset + query + 1 - kernel
        asked = there & (offset + query >= dense)  # of others nothing is asked
        seen = tl.where(asked & (ended >= 0), ended // stride + 1, 0)
        limit = tl.minimum(tl.max(seen, 0), n)
        whole = tl.minimum(tl.min(tl.where(asked, seen, n), 0), n) // PART * PART
        k_own = k + k_head * n * D
        divisor = divisors(x, factor, k_own, low_head, seen, whole, limit, n, D, D, PD, PART, PRECISION)
        divisor = tl.where(there, divisor, float("inf"))
        place = own + tl.arange(0, QUERIES)[:, None] * COLUMNS + part[None, :]
        for begin in range(0, whole, PART):
            s = _scores(x, k_own, low_head, begin, n, D, seen, True, D, PD, PART, PRECISION)
            at_part = place + begin // STEP
            _leave(s, factor, divisor, at_part, QUERIES * COLUMNS, HIGH, LOW, EACH, QUERIES, STEP, OVERLAP)
        for begin in range(whole, limit, PART):
            s = _scores(x, k_own, low_head, begin, n, D, seen, False, D, PD, PART, PRECISION)
            at_part = place + begin // STEP
            _leave(s, factor, divisor, at_part, QUERIES * COLUMNS, HIGH, LOW, EACH, QUERIES, STEP, OVERLAP)
        tl.debug_barrier()
        written = tl.cdiv(limit, PART) * (PART // STEP)
        for some in range(0, QUERIES, SOME):
            row = some + tl.arange(0, SOME)
            i = offset + m + row
            given = m + row < queries
            end = tl.where(given & (i >= 0), tl.cdiv(i + 1, key_block), 0)[:, None, None]
            past = columns < end
            taken = past & ((columns >= (i // key_block - local)[:, None, None]) | (columns < first))
            at_row = own + row[:, None, None] * COLUMNS + columns
            likes = tl.load(at_row, mask=past & (columns < written), other=0.0)
            reached = past & (columns > 0) & (columns <= written)
            likes = tl.maximum(likes, tl.load(at_row + QUERIES * COLUMNS - 1, mask=reached, other=0.0))
            whole_row = (i < dense)[:, None, None]
            order = tl.where(taken, 0xFFFFFFFF, ordered(likes)).to(tl.uint32)
            order = tl.where(past & ~whole_row, order, 0).to(tl.uint32)
            kept = heaviest(order, likes, columns, 0.0, count, False, True, 32) | (past & whole_row)
            store_lists(kept, indices, counts, which * queries + m + row, given, columns, width)
        tl.debug_barrier()
