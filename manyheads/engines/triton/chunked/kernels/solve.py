"""T = (I + diag(beta) B)^-1 of a chunk, B_ij = k_i.k_j e^(G_i - G_j) where j < i: what the delta rule's corrections,
each of which sees those before it, are together.

One warp has a chunk, in registers, as blocks of 16. The numbers of a product that a lane holds are those that it is
asked for if the product is the first factor of another one, or, transposed, the second one. So what is multiplied from
the right is there transposed, and nothing moves between lanes.

On the diagonal blocks of 1, of 2, 4 and 8 join: the inverse of [[X^-1, 0], [N, Y^-1]] is [[X, 0], [-Y N X, Y]].
Elsewhere T_ij = -(sum of T_ik N_kj over k from j + 1 to i) T_jj, as T (I + N) = I.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import (
    LENGTHS,
    add_dot,
    decays,
    dot,
    fade_of,
    in_base_two,
    load,
    note_fade,
)

SUB = tl.constexpr(16)
LEAST = tl.constexpr(2.0**-40)  # strength: a write so weak is lost beside any, and u / beta says what it lacked
MIDDLE = tl.constexpr(1 + 1.5 * 2.0**-12)


@triton.jit
def product(a, b_t, WIDE: tl.constexpr, SIMULATED: tl.constexpr):
    """a b, of blocks, b transposed. WIDE: in float32, as far as three products of its parts go; else of numbers with 11
    bits and float32's range."""
    b = tl.trans(b_t)  # before all else, or Triton takes it through shared memory
    if SIMULATED:
        return tl.dot(a, b, input_precision="ieee")
    elif WIDE:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        # The other bits are cut off, half of the last one of those that are left on average: it is added before. And
        # of each eight numbers a lane has two neighbours, where the matrix units want one and the fourth behind it.
        a = tl.reshape(tl.permute(tl.reshape(a * MIDDLE, [SUB, 2, 4, 2]), [0, 1, 3, 2]), [SUB, SUB])
        b = tl.reshape(tl.permute(tl.reshape(b * MIDDLE, [2, 4, 2, SUB]), [0, 2, 1, 3]), [SUB, SUB])
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def inverse(above, WIDE: tl.constexpr, SIMULATED: tl.constexpr):
    """(I + N)^-1 of a block of the diagonal, and transposed. above: N transposed."""
    n = tl.arange(0, SUB)
    X = tl.where(n[:, None] == n[None, :], 1.0, 0.0)
    X_t = X
    for level in tl.static_range(4):  # type: ignore[misc]  (its types are for Python)
        row, column = n[:, None] >> level, n[None, :] >> level
        between = tl.where((row // 2 == column // 2) & (row < column), above, 0.0)
        passed = product(X, between, WIDE, SIMULATED)
        if level == 0:
            X, X_t = X - passed, X_t - between
        else:
            X, X_t = X - product(passed, X_t, WIDE, SIMULATED), X_t - product(X_t, passed, WIDE, SIMULATED)
    return X, X_t


@triton.jit
def quarters(x, SIZE: tl.constexpr):
    """The four blocks of a matrix, row by row."""
    rows = tl.permute(tl.reshape(x, [2, SIZE, 2, SIZE]), [1, 3, 2, 0])
    upper, lower = tl.split(rows)
    a, b = tl.split(upper)
    c, d = tl.split(lower)
    return a, b, c, d


@triton.jit
def whole(a, b, c, d, SIZE: tl.constexpr):
    """The matrix of four blocks."""
    rows = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.permute(rows, [3, 0, 2, 1]), [2 * SIZE, 2 * SIZE])


@triton.jit
def assembled(above, C: tl.constexpr, WIDE: tl.constexpr, SIMULATED: tl.constexpr):
    """(I + N)^-1. above: N transposed, of which what is above the diagonal is read. n10: its block for N's row 1 and
    column 0."""
    n00, n10, _, n11 = quarters(above, C // 2)  # type: ignore[misc]  (as above)
    if C == 32:
        t00, t00_t = inverse(n00, WIDE, SIMULATED)
        t11, _ = inverse(n11, WIDE, SIMULATED)
        t10 = -product(product(t11, n10, WIDE, SIMULATED), t00_t, WIDE, SIMULATED)
        return whole(t00, tl.zeros_like(t00), t10, t11, SUB)
    else:
        n20, n30, n21, n31 = quarters(n10, SUB)
        n22, n32, _, n33 = quarters(n11, SUB)
        n00, n10, _, n11 = quarters(n00, SUB)
        t00, t00_t = inverse(n00, WIDE, SIMULATED)
        t11, t11_t = inverse(n11, WIDE, SIMULATED)
        t22, t22_t = inverse(n22, WIDE, SIMULATED)
        t33, _ = inverse(n33, WIDE, SIMULATED)
        t10 = -product(product(t11, n10, WIDE, SIMULATED), t00_t, WIDE, SIMULATED)
        t21 = -product(product(t22, n21, WIDE, SIMULATED), t11_t, WIDE, SIMULATED)
        t32 = -product(product(t33, n32, WIDE, SIMULATED), t22_t, WIDE, SIMULATED)
        t20 = -product(product(t21, n10, WIDE, SIMULATED) + product(t22, n20, WIDE, SIMULATED), t00_t, WIDE, SIMULATED)
        t31 = -product(product(t32, n21, WIDE, SIMULATED) + product(t33, n31, WIDE, SIMULATED), t11_t, WIDE, SIMULATED)
        t30 = (
            product(t31, n10, WIDE, SIMULATED) + product(t32, n20, WIDE, SIMULATED) + product(t33, n30, WIDE, SIMULATED)
        )
        t30 = -product(t30, t00_t, WIDE, SIMULATED)
        none = tl.zeros_like(t00)
        upper, lower = whole(t00, none, t10, t11, SUB), whole(t22, none, t32, t33, SUB)
        return whole(upper, tl.zeros_like(upper), whole(t20, t21, t30, t31, SUB), lower, C // 2)


@triton.jit(do_not_specialize=LENGTHS)
def solve(
    K, G, BETA, B, T, SUMS, STRENGTHS, FADES, k_b, k_h, k_n, g_b, g_h, g_n, w_b, w_h, w_n, kv_len, heads, group,
    D: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SIMULATED: tl.constexpr,
):  # fmt: skip
    """One chunk. B, if `pairs` has left it behind; else it is computed from K, BK columns at a time, and G, and so are,
    if G is there, SUMS, G of the formulas, and FADES. STRENGTHS: BETA in float32, of whole chunks."""
    chunks = tl.cdiv(kv_len, C)
    c, bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first = c * C
    chunk = bh.to(tl.int64) * chunks + c
    tokens = tl.arange(0, C)
    at = first + tokens
    beta = tl.load(BETA + b * w_b + h * w_h + at.to(tl.int64) * w_n, mask=at < kv_len, other=0.0).to(tl.float32)
    beta = tl.where((at < kv_len) & (tl.abs(beta) < LEAST), LEAST, beta)
    tl.store(STRENGTHS + chunk * C + tokens, beta)
    if B is None:
        K += (b * k_b + h // group * k_h) * UNIT
        above = tl.zeros([C, C], tl.float32)
        for n in tl.range(PD // BK):
            k = load(K, k_n * UNIT, first, kv_len, n * BK + tl.arange(0, BK), C, D)
            above = add_dot(k, tl.trans(k), above, SIMULATED)
        if G is not None:
            G += b * g_b + h * g_h
            sum_g = decays(G, g_n, first, kv_len, C)
            tl.store(SUMS + chunk * C + tokens, sum_g)
            g = in_base_two(tl.load(G + at.to(tl.int64) * g_n, mask=at < kv_len, other=0.0))
            size = tl.sum(tl.where(tokens[:, None] == tokens[None, :], above, 0.0), 0)
            note_fade(FADES + bh.to(tl.int64) * (chunks + 1), chunks, c, fade_of(g, size, beta))
            earlier = tokens[:, None] < tokens[None, :]
            above *= tl.math.exp2(tl.where(earlier, sum_g[None, :] - sum_g[:, None], float("-inf")))
    else:
        same = tl.where(tokens[:, None] == tokens[None, :], 1.0, 0.0).to(B.dtype.element_ty)
        place = chunk * C * C + tokens[:, None] * C + tokens[None, :]
        above = dot(tl.trans(tl.load(B + place)), same, SIMULATED)  # which puts it where products take it from
    above *= beta[None, :]
    t = assembled(above, C, T.dtype.element_ty == tl.float32, SIMULATED)
    tl.store(T + chunk * C * C + tokens[:, None] * C + tokens[None, :], t.to(T.dtype.element_ty))
