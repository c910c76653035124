"""Rows to the places where they are computed with, and what was computed back to them, in plain Triton. Strides are
specialised, as what is known to be a multiple of 16 is copied 16 bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "group", "heads", "places"])
def gather(
    out, x, rows, size, group, heads, places, x_b, x_h, x_n, dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """out [batch * kv_heads, places, dim]: the rows of x [batch, heads, size, dim] that `rows`, see ordering.place, has
    for its places, and in a tile's places that have none what its first one has; nothing in tiles without any.
    Grid: places / ROWS * kv_heads * batch."""
    tiles = places // ROWS
    key_head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * ROWS
    first = tl.load(rows + key_head * places + place // TILE * TILE)
    if first >= 0:
        at = key_head * places + place + tl.arange(0, ROWS)
        row = tl.load(rows + at)
        row = tl.where(row >= 0, row, first)  # not zeros, where a score's derivative may be infinite
        column = tl.arange(0, DIM)
        head = key_head * group + row // size
        source = head // heads * x_b + head % heads * x_h + (row % size).to(tl.int64) * x_n
        inside = (column < dim)[None, :]
        found = tl.load(x + source[:, None] + column[None, :], mask=inside, other=0.0)
        tl.store(out + at[:, None] * dim + column[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["width", "size", "group", "heads", "places", "lse_b", "lse_h"])
def merge(
    o, lse, own_o, own_lse, own, sink, part_o, part_lse, slots, width, size, group, heads, places, o_b, o_h, o_n,
    lse_b, lse_h, dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """o [batch, heads, size, dim] and lse [batch, heads, size] of all that a query saw: own_o and own_lse where `own`
    says so, contiguous, or None three times; and for each of its `width` slots the part at that place, [batch *
    kv_heads, places, dim]. sink: float32 [heads], one more score, or None. Grid: size / ROWS * heads * batch."""
    tiles = (size + ROWS - 1) // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    query = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    inside = query < size
    filled = (column < dim)[None, :]
    line = head * size + query
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, DIM], 0.0, tl.float32)
    if own is not None:
        listed = tl.load(own + line, mask=inside, other=0) != 0
        m = tl.load(own_lse + line, mask=listed, other=float("-inf"))
        l = tl.where(m == float("-inf"), 0.0, 1.0)
        there = listed[:, None] & filled
        acc = tl.load(own_o + line[:, None] * dim + column[None, :], mask=there, other=0.0).to(tl.float32)
    for c in range(0, width):
        slot = tl.load(slots + line * width + c, mask=inside, other=-1)
        at = head // group * places + slot
        part_m = tl.load(part_lse + at, mask=slot >= 0, other=float("-inf"))
        there = (slot >= 0)[:, None] & filled
        part = tl.load(part_o + at[:, None] * dim + column[None, :], mask=there, other=0.0).to(tl.float32)
        top = tl.maximum(m, part_m)
        safe = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp(m - safe)
        weight = tl.exp(part_m - safe)
        acc = acc * fade[:, None] + part * weight[:, None]
        l = l * fade + weight
        m = top
    if sink is not None:
        level = tl.load(sink + head % heads)
        top = tl.maximum(m, level)
        safe = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp(m - safe)
        acc = acc * fade[:, None]
        l = l * fade + tl.exp(level - safe)
        m = top
    divisor = tl.where(l > 0.0, l, 1.0)
    target = head // heads * o_b + head % heads * o_h + query.to(tl.int64) * o_n
    tl.store(o + target[:, None] + column[None, :], acc / divisor[:, None], mask=inside[:, None] & filled)
    value = tl.where(l > 0.0, m + tl.log(divisor), float("-inf"))
    tl.store(lse + (head // heads * lse_b + head % heads * lse_h) + query, value, mask=inside)


@triton.jit(do_not_specialize=["width", "size", "group", "heads", "places"])
def add(
    x, own, parts, slots, width, size, group, heads, places, x_b, x_h, x_n, dim: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x [batch, heads, size, dim]: own, contiguous or None, and the parts of each query, as `merge` has them, summed in
    the order of the slots. Grid: size / ROWS * heads * batch."""
    tiles = (size + ROWS - 1) // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    query = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    inside = query < size
    filled = (column < dim)[None, :]
    line = head * size + query
    acc = tl.full([ROWS, DIM], 0.0, tl.float32)
    if own is not None:
        there = inside[:, None] & filled
        acc = tl.load(own + line[:, None] * dim + column[None, :], mask=there, other=0.0).to(tl.float32)
    for c in range(0, width):
        slot = tl.load(slots + line * width + c, mask=inside, other=-1)
        at = head // group * places + slot
        there = (slot >= 0)[:, None] & filled
        acc += tl.load(parts + at[:, None] * dim + column[None, :], mask=there, other=0.0).to(tl.float32)
    target = head // heads * x_b + head % heads * x_h + query.to(tl.int64) * x_n
    tl.store(x + target[:, None] + column[None, :], acc, mask=inside[:, None] & filled)
