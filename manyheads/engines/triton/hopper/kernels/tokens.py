"""Attention over lists of key blocks that a token has for itself, in plain Triton. All query heads of a key head have
the same list, and are the rows of a tile. Strides are specialised, as in moving.py.

indices [batch, kv_heads, q_len, width] and counts [batch, kv_heads, q_len] are contiguous, and of each list the first
`counts` are meant. Positions of queries begin at `start`, those of keys at 0. A block has KEY_BLOCK keys, KEYS of which
are in a tile."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(x, x_b, x_h, x_n, b, head, token):
    """Where a token's rows begin, one for each head."""
    return x + b * x_b + token.to(tl.int64) * x_n + (head * x_h)[:, None]


@triton.jit
def tile_of(x, step, first, key, inside, column, size):
    """Keys, or values, from `first` on; 0 for those that are not inside."""
    at = x + first.to(tl.int64) * step + (key * step)[:, None] + column
    return tl.load(at, mask=inside[:, None] & (column < size), other=0.0)


@triton.jit(do_not_specialize=["width", "q_len", "kv_len", "start", "kv_heads", "group"])
def attend(
    o, lse, q, k, v, indices, counts, width, q_len, kv_len, start, kv_heads, group, scale, q_b, q_h, q_n, k_b, k_h, k_n,
    v_b, v_h, v_n, o_b, o_h, o_n, dim: tl.constexpr, v_dim: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEY_BLOCK: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """o and lse, natural, float32 [batch, heads, q_len]. Grid: q_len * kv_heads * batch."""
    parts: tl.constexpr = KEY_BLOCK // KEYS
    token = tl.program_id(0) % q_len
    line = (tl.program_id(0) // q_len).to(tl.int64)
    b = line // kv_heads
    h = line % kv_heads
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    column = tl.arange(0, DIM)[None, :]
    v_column = tl.arange(0, V_DIM)[None, :]
    head = h * group + row
    there = row < group
    q_at = rows_of(q, q_b, q_h, q_n, b, head, token) + column
    q_tile = tl.load(q_at, mask=there[:, None] & (column < dim), other=0.0)
    k_at = k + b * k_b + h * k_h
    v_at = v + b * v_b + h * v_h
    listed = indices + (line * q_len + token) * width
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, V_DIM], 0.0, tl.float32)
    for c in range(0, tl.load(counts + line * q_len + token) * parts):
        first = tl.load(listed + c // parts) * KEY_BLOCK + c % parts * KEYS
        inside = first + key < kv_len
        k_tile = tile_of(k_at, k_n, first, key, inside, column, dim)
        v_tile = tile_of(v_at, v_n, first, key, inside, v_column, v_dim)
        s = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2E)
        if CAUSAL:
            inside = inside & (first + key <= start + token)
        s = tl.where(inside[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        fade = tl.exp2(m - safe)
        l = l * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
        m = top
    divisor = tl.where(l > 0.0, l, 1.0)
    o_at = rows_of(o, o_b, o_h, o_n, b, head, token) + v_column
    tl.store(o_at, acc / divisor[:, None], mask=there[:, None] & (v_column < v_dim))
    value = tl.where(l > 0.0, (m + tl.log2(divisor)) / LOG2E, float("-inf"))
    tl.store(lse + (b * kv_heads * group + head) * q_len + token, value, mask=there)


@triton.jit(do_not_specialize=["width", "q_len", "padded", "kv_len", "start", "kv_heads", "group"])
def queries(
    dq, q, k, v, do, top, delta, indices, counts, width, q_len, padded, kv_len, start, kv_heads, group, scale, q_b, q_h,
    q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n, dim: tl.constexpr, v_dim: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr, KEY_BLOCK: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq. top, delta: as backward.prepared has them, [batch, heads, padded]. Grid: q_len * kv_heads * batch."""
    parts: tl.constexpr = KEY_BLOCK // KEYS
    token = tl.program_id(0) % q_len
    line = (tl.program_id(0) // q_len).to(tl.int64)
    b = line // kv_heads
    h = line % kv_heads
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    column = tl.arange(0, DIM)[None, :]
    v_column = tl.arange(0, V_DIM)[None, :]
    head = h * group + row
    there = row < group
    q_at = rows_of(q, q_b, q_h, q_n, b, head, token) + column
    q_tile = tl.load(q_at, mask=there[:, None] & (column < dim), other=0.0)
    do_at = rows_of(do, do_b, do_h, do_n, b, head, token) + v_column
    do_tile = tl.load(do_at, mask=there[:, None] & (v_column < v_dim), other=0.0)
    number = (b * kv_heads * group + head) * padded + token
    level = tl.load(top + number, mask=there, other=float("inf"))
    common = tl.load(delta + number, mask=there, other=0.0)
    k_at = k + b * k_b + h * k_h
    v_at = v + b * v_b + h * v_h
    listed = indices + (line * q_len + token) * width
    acc = tl.full([ROWS, DIM], 0.0, tl.float32)
    for c in range(0, tl.load(counts + line * q_len + token) * parts):
        first = tl.load(listed + c // parts) * KEY_BLOCK + c % parts * KEYS
        inside = first + key < kv_len
        k_tile = tile_of(k_at, k_n, first, key, inside, column, dim)
        v_tile = tile_of(v_at, v_n, first, key, inside, v_column, v_dim)
        s = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2E)
        if CAUSAL:
            inside = inside & (first + key <= start + token)
        p = tl.where(inside[None, :], tl.exp2(s - level[:, None]), 0.0)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile)) - common[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile)
    dq_at = rows_of(dq, dq_b, dq_h, dq_n, b, head, token) + column
    tl.store(dq_at, acc * scale, mask=there[:, None] & (column < dim))


@triton.jit(do_not_specialize=["key_blocks", "q_len", "padded", "kv_len", "start", "lines", "kv_heads", "group"])
def keys(
    dk, dv, q, k, v, do, top, delta, listed, begins, key_blocks, q_len, padded, kv_len, start, lines, kv_heads, group,
    scale, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dim: tl.constexpr, v_dim: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, KEY_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SHARES: tl.constexpr, CAUSAL: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """dk, dv [SHARES, batch, kv_heads, kv_len, ...], contiguous: of each key the sums over each of the SHARES of the
    tokens that list its block. listed, begins: as builders.transposed gives them. lines: batch * kv_heads. HEADS: the
    group, up to a power of two; a tile has those of TOKENS tokens. FAR: a key head's queries may be 2**31 numbers
    apart. Grid: lines * SHARES * key_blocks * KEY_BLOCK / KEYS."""
    parts: tl.constexpr = KEY_BLOCK // KEYS
    line = (tl.program_id(0) % lines).to(tl.int64)  # long lists are those of the first keys, and begin first
    share = tl.program_id(0) // lines % SHARES
    tile = tl.program_id(0) // lines // SHARES
    b = line // kv_heads
    h = line % kv_heads
    row = tl.arange(0, TOKENS * HEADS)
    key = tile * KEYS + tl.arange(0, KEYS)
    column = tl.arange(0, DIM)[None, :]
    v_column = tl.arange(0, V_DIM)[None, :]
    inside = (key < kv_len)[:, None]
    wide = key.to(tl.int64)[:, None]
    k_tile = tl.load(k + b * k_b + h * k_h + wide * k_n + column, mask=inside & (column < dim), other=0.0)
    v_tile = tl.load(v + b * v_b + h * v_h + wide * v_n + v_column, mask=inside & (v_column < v_dim), other=0.0)
    step = (row % HEADS).to(tl.int64) if FAR else row % HEADS
    q_at = q + b * q_b + h * group * q_h
    do_at = do + b * do_b + h * group * do_h
    top += line * group * padded
    delta += line * group * padded
    begin = tl.load(begins + line * key_blocks + tile // parts)
    last = tl.load(begins + line * key_blocks + tile // parts + 1)
    size = tl.cdiv(tl.cdiv(last - begin, TOKENS), SHARES) * TOKENS
    begin += share * size
    last = tl.minimum(last, begin + size)
    k_sum = tl.full([KEYS, DIM], 0.0, tl.float32)
    v_sum = tl.full([KEYS, V_DIM], 0.0, tl.float32)
    for n in range(begin, last, TOKENS):
        place = n + row // HEADS
        there = (place < last) & (row % HEADS < group)
        token = tl.load(listed + place, mask=there, other=0).to(step.dtype)
        q_rows = (step * q_h + token * q_n)[:, None]
        q_tile = tl.load(q_at + q_rows + column, mask=there[:, None] & (column < dim), other=0.0)
        do_rows = (step * do_h + token * do_n)[:, None]
        do_tile = tl.load(do_at + do_rows + v_column, mask=there[:, None] & (v_column < v_dim), other=0.0)
        number = row % HEADS * padded + token
        level = tl.load(top + number, mask=there, other=float("inf"))
        common = tl.load(delta + number, mask=there, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile)) * (scale * LOG2E)
        p = tl.exp2(s - level[None, :])
        if CAUSAL:
            p = tl.where(key[:, None] <= (start + token)[None, :], p, 0.0)
        v_sum += tl.dot(p.to(do_tile.dtype), do_tile)
        ds = p * (tl.dot(v_tile, tl.trans(do_tile)) - common[None, :])
        k_sum += tl.dot(ds.to(q_tile.dtype), q_tile)
    target = (share * lines + line) * kv_len + wide
    tl.store(dk + target * dim + column, k_sum * scale, mask=inside & (column < dim))
    tl.store(dv + target * v_dim + v_column, v_sum, mask=inside & (v_column < v_dim))
