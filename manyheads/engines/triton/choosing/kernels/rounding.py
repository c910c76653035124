"""What products of 4-bit numbers are made of and compared with: rows in 15 steps, and what a weight must reach."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUND = tl.constexpr(12582912.0)  # 1.5 2^23: what is added to it is rounded, halves to even numbers


@triton.jit(do_not_specialize=["heads", "group", "n", "room", "block", "scale"])
def rounded(
    x, mean, out, sizes, middle, shared, heads, group, n, room, block, x_b, x_h, x_n, scale, D: tl.constexpr,
    PD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """x [batch, heads, n, D] less mean float32 [batch, heads, D] as out [batch, heads, room, PD] times sizes float32
    [batch, heads, room], and sizes times scale. With middle float32 [batch, heads group, D] also shared float32 [batch,
    heads group, room], scale times its products with x less mean. Blocks of x have KEYS places each, the last of which
    are 0, and so are those behind the last block. Grid: batch * heads * room / ROWS."""
    tiles = tl.cdiv(room, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row = place // KEYS * block + place % KEYS
    dims = tl.arange(0, PD)
    there = place < room
    given = ((place % KEYS < block) & (row < n))[:, None] & (dims < D)[None, :]
    at = x + head // heads * x_b + head % heads * x_h + row[:, None].to(tl.int64) * x_n + dims[None, :]
    own = tl.load(at, mask=given, other=0.0).to(tl.float32)
    own = tl.where(given, own - tl.load(mean + head * D + dims, mask=dims < D, other=0.0)[None, :], 0.0)
    size = tl.div_rn(tl.max(tl.abs(own), 1), tl.full([ROWS], 7.0, tl.float32))
    step = tl.div_rn(own, tl.where(size > 0, size, 1.0)[:, None] + tl.zeros([ROWS, PD], tl.float32))
    step = (step + ROUND) - ROUND
    to = head * room + place
    tl.store(out + to[:, None] * PD + dims[None, :], step.to(out.dtype.element_ty), mask=there[:, None])
    if middle is None:
        tl.store(sizes + to, size * scale, mask=there)
    else:
        tl.store(sizes + to, size, mask=there)
        for member in range(0, group):
            of = head * group + member
            weights = tl.load(middle + of * D + dims, mask=dims < D, other=0.0)
            tl.store(shared + of * room + place, tl.sum(own * weights[None, :], 1) * scale, mask=there)


@triton.jit(
    do_not_specialize=[
        "heads", "group", "queries", "n", "scale", "least", "ends", "near", "query_block", "key_block", "offset"
    ]
)  # fmt: skip
def limits(
    q, k, mean, out, heads, group, queries, n, q_b, q_h, q_m, k_b, k_h, k_n, scale, least, ends, near, query_block,
    key_block, offset, D: tl.constexpr, PD: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out float32 [batch, heads, queries]: least + the log of the sum of e^(scale q.(k - mean)) over the keys up to the
    query that are the first `ends` ones or among the last `near` of its block, in whole key blocks.
    Grid: batch * heads * queries / ROWS."""
    tiles = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    k_head = head // heads * (heads // group) + head % heads // group
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PD)
    at = q + head // heads * q_b + head % heads * q_h + row[:, None].to(tl.int64) * q_m + dims[None, :]
    x = tl.load(at, mask=(row < queries)[:, None] & (dims < D)[None, :], other=0.0)
    base = tl.sum(x.to(tl.float32) * tl.load(mean + k_head * D + dims, mask=dims < D, other=0.0)[None, :], 1)
    i = offset + row
    start = tl.maximum((i // query_block + 1) * query_block - near, 0) // key_block * key_block
    low = tl.min(start, 0)
    sinks = tl.minimum(ends, low)
    high = tl.minimum(tl.max(i, 0) + 1, n)
    parts = tl.cdiv(sinks, PART)
    k += head // heads * k_b + head % heads // group * k_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in range(0, parts + tl.cdiv(high - low, PART)):
        j = tl.where(part < parts, part * PART, low + (part - parts) * PART) + tl.arange(0, PART)
        inside = j < tl.where(part < parts, sinks, high)
        y = tl.load(
            k + j[:, None].to(tl.int64) * k_n + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0
        )
        s = (tl.dot(x, tl.trans(y), input_precision=PRECISION) - base[:, None]) * (scale * LOG2E)
        seen = inside[None, :] & (j[None, :] <= i[:, None]) & ((j < ends)[None, :] | (j[None, :] >= start[:, None]))
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = higher
    found = (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2 + least
    tl.store(out + head * queries + row, found, mask=row < queries)
