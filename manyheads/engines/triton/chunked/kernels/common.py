"""What the kernels share. A chunk of C tokens begins at row `first`; G holds the sums of log decays in it, in base two.

G is [C, 1] where all channels of the keys decay alike, and else [C, channels].
Only differences of these sums are exponentiated, and none of them is above 0. Columns are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = ["kv_len", "ahead", "heads", "segments", "per", "g_b", "g_h", "w_b", "w_h", "w_n"]  # compile nothing anew


@triton.jit
def dot(a, b, SIMULATED: tl.constexpr):
    """a @ b in float32. Of float32 operands three products of parts of their bits; the interpreter cannot multiply
    bfloat16."""
    if SIMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def add_dot(a, b, c, SIMULATED: tl.constexpr):
    """a @ b + c."""
    if SIMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def load(at, step, first, length, columns, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `first` to first + C - 1 of a tensor [length, WIDTH]; zeros outside of it."""
    rows = tl.arange(0, C)
    there = ((rows >= -first) & (rows < length - first))[:, None] & (columns < WIDTH)[None, :]
    return tl.load(at + first.to(tl.int64) * step + rows[:, None] * step + columns[None, :], mask=there, other=0.0)


@triton.jit
def store(at, step, first, length, columns, value, C: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, C)
    there = ((rows >= -first) & (rows < length - first))[:, None] & (columns < WIDTH)[None, :]
    at = at + first.to(tl.int64) * step + rows[:, None] * step + columns[None, :]
    tl.store(at, value.to(at.dtype.element_ty), mask=there)


@triton.jit
def load_state(at, rows, columns, D: tl.constexpr, DV: tl.constexpr):
    """Of a state [D, DV]; zeros outside of it."""
    there = (rows < D)[:, None] & (columns < DV)[None, :]
    return tl.load(at + rows[:, None] * DV + columns[None, :], mask=there, other=0.0)


@triton.jit
def store_state(at, rows, columns, value, D: tl.constexpr, DV: tl.constexpr):
    there = (rows < D)[:, None] & ((columns >= 0) & (columns < DV))[None, :]
    tl.store(at + rows[:, None] * DV + columns[None, :], value.to(at.dtype.element_ty), mask=there)


@triton.jit
def decays(G, step, first, length, C: tl.constexpr):
    """G [C, 1] from a log decay for each token; without any, zeros."""
    if G is None:
        return tl.zeros([C, 1], tl.float32)
    else:
        rows = tl.arange(0, C)
        g = tl.load(G + (first + rows).to(tl.int64) * step, mask=rows < length - first, other=0.0)
        return tl.cumsum(g.to(tl.float32) * LOG2E, 0)[:, None]


@triton.jit
def end_of(G, C: tl.constexpr):
    """The last row, [1, 1 | channels]."""
    rows = tl.arange(0, C)
    return tl.sum(tl.where((rows == C - 1)[:, None], G, 0.0), 0, keep_dims=True)


@triton.jit
def between(G, C: tl.constexpr):
    """exp2(G_i - G_j) where j <= i, and 0 elsewhere, [C, C]."""
    rows = tl.arange(0, C)
    return tl.math.exp2(tl.where(rows[:, None] >= rows[None, :], G - tl.trans(G), float("-inf")))


@triton.jit
def between_transposed(G, C: tl.constexpr):
    """exp2(G_j - G_i) where i <= j, and 0 elsewhere."""
    rows = tl.arange(0, C)
    return tl.math.exp2(tl.where(rows[:, None] <= rows[None, :], tl.trans(G) - G, float("-inf")))


@triton.jit
def sums(G, step, first, length, columns, C: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    """G of a chunk; of single channels `prepare` has left it behind."""
    if CHANNELS:
        return load(G, D, first, first + C, columns, C, D)
    else:
        return decays(G, step, first, length, C)
