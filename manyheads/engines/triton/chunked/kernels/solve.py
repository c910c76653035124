"""T = (I + diag(beta) B)^-1 of a chunk, B_ij = k_i.k_j e^(G_i - G_j) where j < i: what the delta rule's corrections,
each of which sees those before it, are together.

Blocks of 16 on the diagonal are inverted column by column in float32, all at once; pairs of blocks, and pairs of pairs,
then join: the inverse of [[X^-1, 0], [N, Y^-1]] is [[X, 0], [-Y N X, Y]].
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import LENGTHS, LOG2E, decays, dot, fade_of, load, note_fade

SUB = tl.constexpr(16)


@triton.jit
def join(X, below, size: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Inverses of blocks of `size` become those of blocks twice as large. WIDE: the numbers are float32 ones; else the
    products take as many bits as a float16 has."""
    tokens = tl.arange(0, C)
    row, column = tokens[:, None] // size, tokens[None, :] // size
    between = tl.where((row // 2 == column // 2) & (row != column), below, 0.0)
    if WIDE:
        return X - tl.dot(tl.dot(X, between, input_precision="tf32x3"), X, input_precision="tf32x3")
    else:
        return X - tl.dot(tl.dot(X, between, input_precision="tf32"), X, input_precision="tf32")


@triton.jit(do_not_specialize=LENGTHS)
def solve(
    K, G, BETA, B, T, SUMS, STRENGTHS, FADES, k_b, k_h, k_n, g_b, g_h, g_n, w_b, w_h, w_n, kv_len, heads, group,
    D: tl.constexpr, PD: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One chunk. B, if `pairs` has left it behind; else it is computed from K and G, and so are, if G is there, SUMS, G
    of the formulas, and FADES. STRENGTHS: BETA in float32, of whole chunks."""
    chunks = tl.cdiv(kv_len, C)
    c, bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first = c * C
    place = (bh.to(tl.int64) * chunks + c) * C * C
    tokens, within = tl.arange(0, C), tl.arange(0, SUB)
    strictly = tokens[:, None] > tokens[None, :]
    at = first + tokens
    beta = tl.load(BETA + b * w_b + h * w_h + at.to(tl.int64) * w_n, mask=at < kv_len, other=0.0).to(tl.float32)
    tl.store(STRENGTHS + (bh.to(tl.int64) * chunks + c) * C + tokens, beta)
    if B is None:
        K += (b * k_b + h // group * k_h) * UNIT
        k = load(K, k_n * UNIT, first, kv_len, tl.arange(0, PD), C, D)
        below = dot(k, tl.trans(k), SIMULATED)
        if G is None:
            below = tl.where(strictly, below, 0.0)
        else:
            sum_g = decays(G + b * g_b + h * g_h, g_n, first, kv_len, C)
            tl.store(SUMS + (bh.to(tl.int64) * chunks + c) * C + tokens, sum_g)
            g = tl.load(G + b * g_b + h * g_h + at.to(tl.int64) * g_n, mask=at < kv_len, other=0.0).to(tl.float32)
            size = tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
            note_fade(FADES + bh.to(tl.int64) * (chunks + 1), chunks, c, fade_of(g * LOG2E, size, beta))
            below *= tl.math.exp2(tl.where(strictly, sum_g[:, None] - sum_g[None, :], float("-inf")))
    else:
        # As a product, so that a warp has whole blocks of it: three times as fast.
        same = tl.where(tokens[:, None] == tokens[None, :], 1.0, 0.0).to(B.dtype.element_ty)
        below = dot(same, tl.load(B + place + tokens[:, None] * C + tokens[None, :]), SIMULATED)
    below *= beta[:, None]

    BLOCKS: tl.constexpr = C // SUB
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(below, [BLOCKS, SUB, BLOCKS, SUB]), 0.0), 2)  # [blocks, 16, 16]
    row, column = within[None, :, None], within[None, None, :]
    X = tl.where(row == column, 1.0, tl.zeros([BLOCKS, SUB, SUB], tl.float32))
    for n in tl.range(0, SUB - 1):
        factors = tl.sum(tl.where(column == n, diagonal, 0.0), 2)
        solved = tl.sum(tl.where(row == n, X, 0.0), 1)
        X -= factors[:, :, None] * solved[:, None, :]
    whole = tl.broadcast_to(tl.where(same, X[:, :, None, :], 0.0), [BLOCKS, SUB, BLOCKS, SUB])
    X = tl.reshape(whole, [C, C])
    WIDE: tl.constexpr = T.dtype.element_ty == tl.float32
    X = join(X, below, 16, C, WIDE)
    if C == 64:
        X = join(X, below, 32, C, WIDE)
    tl.store(T + place + tokens[:, None] * C + tokens[None, :], X.to(T.dtype.element_ty))
