"""Tokens by the signs of their products with a few directions, and to blocks of that order and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranks(
    x, g, out, tile, heads, length, x_b, x_h, x_n, SIGNS: tl.constexpr, PS: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, ROWS)
    head = (tile // tiles).to(tl.int64)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PD)
    sign = tl.arange(0, PS)
    at = x + head // heads * x_b + head % heads * x_h + row[:, None].to(tl.int64) * x_n + dims[None, :]
    a = tl.load(at, mask=(row < length)[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
    given = (dims < D)[:, None] & (sign < SIGNS)[None, :]
    b = tl.load(g + dims[:, None] * SIGNS + sign[None, :], mask=given, other=0.0)
    positive = tl.dot(a, b, input_precision=PRECISION) > 0
    rank = tl.sum(tl.where(positive, tl.full([1, PS], 1, tl.int32) << sign[None, :], 0), 1)
    for shift in tl.static_range(5):  # from Gray's code to the number
        rank = rank ^ (rank >> (1 << shift))
    tl.store(out + head * length + row, rank, mask=row < length)


@triton.jit(do_not_specialize=["of_q", "q_heads", "k_heads", "q_len", "k_len"])
def ranks(
    q, k, g, q_out, k_out, of_q, q_heads, k_heads, q_len, k_len, q_b, q_h, q_n, k_b, k_h, k_n, SIGNS: tl.constexpr,
    PS: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As core/sorting.py's hashed, of q and k [batch, heads, len, D] with these strides and g float32 [D, SIGNS].
    of_q: the programs that q has; grid: one for every ROWS tokens of each head, those of q first."""
    pid = tl.program_id(0)
    if pid < of_q:
        _ranks(q, g, q_out, pid, q_heads, q_len, q_b, q_h, q_n, SIGNS, PS, D, PD, ROWS, PRECISION)
    else:
        _ranks(k, g, k_out, pid - of_q, k_heads, k_len, k_b, k_h, k_n, SIGNS, PS, D, PD, ROWS, PRECISION)


@triton.jit
def _slot(head, place, blocks, size, group):
    """Where a place is in [batch * heads / group, blocks, group, size]."""
    return ((head // group * blocks + place // size) * group + head % group) * size + place % size


@triton.jit(do_not_specialize=["heads", "length", "blocks", "size", "group"])
def to_blocks(
    out, x, order, heads, length, blocks, size, group, x_b, x_h, x_n, D: tl.constexpr, PD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """As core/sorting.py has it; x with these strides. Grid: batch * heads * blocks * size / ROWS."""
    tiles = tl.cdiv(blocks * size, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PD)
    there = place < length
    token = tl.load(order + head * length + place, mask=there, other=0).to(tl.int64)
    at = x + head // heads * x_b + head % heads * x_h + token[:, None] * x_n + dims[None, :]
    found = tl.load(at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
    target = out + _slot(head, place, blocks, size, group)[:, None] * D + dims[None, :]
    tl.store(target, found, mask=(place < blocks * size)[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["length", "blocks", "size", "group"])
def from_blocks(out, x, places, length, blocks, size, group, D: tl.constexpr, PD: tl.constexpr, ROWS: tl.constexpr):
    """As core/sorting.py has it. Grid: batch * heads * length / ROWS."""
    tiles = tl.cdiv(length, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PD)
    there = (token < length)[:, None] & (dims < D)[None, :]
    place = tl.load(places + head * length + token, mask=token < length, other=0)
    found = tl.load(x + _slot(head, place, blocks, size, group)[:, None] * D + dims[None, :], mask=there, other=0.0)
    tl.store(out + (head * length + token)[:, None] * D + dims[None, :], found, mask=there)
