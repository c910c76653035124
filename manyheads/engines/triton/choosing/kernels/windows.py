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
def divisors(
    q, factor, k, low, seen, limit, n, k_n, D: tl.constexpr, PD: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sums of 2^(factor q.k) over the first `seen` int32 [R] rows of k each, and 0 for none."""
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    for first in range(0, limit, PART):
        columns = first + tl.arange(0, PART)
        s = products(q, k, low, columns, n, k_n, D, PD, PRECISION) * factor[:, None]
        s = tl.where(columns[None, :] < seen[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = higher
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit(
    do_not_specialize=[
        "tiles", "heads", "group", "queries", "n", "width", "scale", "count", "kernel", "stride", "dense", "key_block",
        "offset", "first", "local",
    ]
)  # fmt: skip
def windows(
    q, k, low, sizes, space, indices, counts, tiles, heads, group, queries, n, width, q_b, q_h, q_m, scale, count,
    kernel, stride, dense, key_block, offset, first, local, TOGETHER: tl.constexpr, MEMBERS: tl.constexpr,
    D: tl.constexpr, PD: tl.constexpr, QUERIES: tl.constexpr, SOME: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, LINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """indices int32 [batch, heads / TOGETHER, queries, width] and counts int32 [batch, heads / TOGETHER, queries] for q
    [batch, heads, queries, D] with these strides and the n windows k [batch, heads / group, n, D], float32, or float16
    in two parts, of which sizes float32 [batch, heads / group] times are meant.

    MEMBERS: a power of 2 that TOGETHER fits in. STEP windows begin in a block, and OVERLAP in the one before reach into
    it. space: float32 [programs, 2, QUERIES, COLUMNS]. A program does every so many of the tiles, the longest first.
    """
    own = space + tl.program_id(0).to(tl.int64) * (2 * QUERIES * COLUMNS)
    per_head = tl.cdiv(queries, QUERIES)
    sets = heads // TOGETHER
    rows = tl.arange(0, QUERIES * MEMBERS)
    part = tl.arange(0, PART // STEP)
    columns = columns_of(COLUMNS // LINE, LINE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = tiles - 1 - number
        which = (tile % (tiles // per_head)).to(tl.int64)
        m = tile // (tiles // per_head) * QUERIES
        head = which // sets * heads + which % sets * TOGETHER
        k_head = head // group
        member = rows % MEMBERS
        query = m + rows // MEMBERS
        there = (query < queries) & (member < TOGETHER)
        at = q + head // heads * q_b + (head % heads + member) * q_h + query.to(tl.int64) * q_m
        dims = tl.arange(0, PD)
        x = tl.load(at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
        factor = tl.zeros([QUERIES * MEMBERS], tl.float32) + scale * LOG2E
        if low is None:
            x = x.to(tl.float32)
            low_head = None
        else:
            x, size = in_halves(x)
            factor = factor * size * tl.load(sizes + k_head)
            low_head = low + k_head * n * D
        ended = offset + query + 1 - kernel
        seen = tl.where(there & (ended >= 0), ended // stride + 1, 0)
        limit = tl.minimum(tl.max(seen, 0), n)
        divisor = divisors(x, factor, k + k_head * n * D, low_head, seen, limit, n, D, D, PD, PART, PRECISION)
        for begin in range(0, limit, PART):
            window = begin + tl.arange(0, PART)
            s = products(x, k + k_head * n * D, low_head, window, n, D, D, PD, PRECISION) * factor[:, None]
            p = tl.where(window[None, :] < seen[:, None], tl.exp2(s - divisor[:, None]), 0.0)
            p = tl.sum(tl.reshape(p, [QUERIES, MEMBERS, PART]), 1)
            p = tl.reshape(p, [QUERIES, PART // STEP, STEP])
            place = own + tl.arange(0, QUERIES)[:, None] * COLUMNS + (begin // STEP + part)[None, :]
            tl.store(place, tl.max(p, 2))
            last = tl.where(tl.arange(0, STEP)[None, None, :] >= STEP - OVERLAP, p, 0.0)
            tl.store(place + QUERIES * COLUMNS, tl.max(last, 2))
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
            order = tl.where(past, ordered(likes), 0).to(tl.uint32)
            order = tl.where(taken, 0xFFFFFFFF, order).to(tl.uint32)
            kept = heaviest(order, likes, columns, 0.0, count, False, True, 32) | (past & (i < dense)[:, None, None])
            store_lists(kept, indices, counts, which * queries + m + row, given, columns, width)
        tl.debug_barrier()
