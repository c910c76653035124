"""What the kernels share. A chunk of C tokens begins at row `first`; G holds the sums of log decays in it, in base two.

G is [C] where all channels of the keys decay alike, and else [C, channels].
Only differences of these sums are exponentiated, and none of them is above 0. Columns are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.core import recurrence

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_DECAY = tl.constexpr(recurrence.LEAST_DECAY * 1.4426950408889634)
FORGOTTEN = tl.constexpr(-64.0)  # log2 of what is as nothing beside anything of like size, in float32
SEEN = tl.constexpr(256)  # chunks before an end of which it is asked whether they are remembered
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
def inside(rows, length):
    """0 <= rows < length, in one comparison: without a sign, what is below 0 is large."""
    return rows.to(tl.uint32) < length.to(tl.uint32)


@triton.jit
def load(at, step, first, length, columns, C: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `first` to first + C - 1 of a tensor [length, WIDTH]; zeros outside of it. No length: all are inside."""
    rows = tl.arange(0, C)
    there = (columns < WIDTH)[None, :]
    if length is not None:
        there = there & inside(first + rows, length)[:, None]
    return tl.load(at + first.to(tl.int64) * step + rows[:, None] * step + columns[None, :], mask=there, other=0.0)


@triton.jit
def square(at, first, C: tl.constexpr):
    """Rows `first` to first + C - 1 of a tensor whose rows are C wide."""
    tokens = tl.arange(0, C)
    return tl.load(at + first.to(tl.int64) * C + tokens[:, None] * C + tokens[None, :])


@triton.jit
def store(at, step, first, length, columns, value, C: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, C)
    there = (columns < WIDTH)[None, :]
    if length is not None:
        there = there & inside(first + rows, length)[:, None]
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
def in_base_two(g):
    """Log decays as they are summed: float32, and of -inf a number, as only differences of sums are exponentiated."""
    return tl.maximum(g.to(tl.float32) * LOG2E, LEAST_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def decays(G, step, first, length, C: tl.constexpr):
    """G [C] from a log decay for each token."""
    rows = tl.arange(0, C)
    g = tl.load(G + (first + rows).to(tl.int64) * step, mask=rows < length - first, other=0.0)
    return tl.cumsum(in_base_two(g), 0)


@triton.jit
def end_of(G, C: tl.constexpr):
    """The last row, [1, channels]."""
    rows = tl.arange(0, C)
    return tl.sum(tl.where((rows == C - 1)[:, None], G, 0.0), 0, keep_dims=True)


@triton.jit
def between(G, C: tl.constexpr):
    """exp2(G_i - G_j) where j <= i, and 0 elsewhere, [C, C]."""
    rows = tl.arange(0, C)
    return tl.math.exp2(tl.where(rows[:, None] >= rows[None, :], G[:, None] - G[None, :], float("-inf")))


@triton.jit
def between_transposed(G, C: tl.constexpr):
    """exp2(G_j - G_i) where i <= j, and 0 elsewhere."""
    rows = tl.arange(0, C)
    return tl.math.exp2(tl.where(rows[:, None] <= rows[None, :], G[None, :] - G[:, None], float("-inf")))


@triton.jit
def sums(G, C: tl.constexpr):
    """G [C] and its end; zeros without any."""
    if G is None:
        return tl.zeros([C], tl.float32), 0.0
    else:
        return tl.load(G + tl.arange(0, C)), tl.load(G + C - 1)


@triton.jit
def fade_of(g, size, beta):
    """A bound of the log2 of what is left of a state behind a chunk of writes that correct; infinite if one makes it
    longer. g: log decays of its tokens in base two, of the slowest channel; size: |k|^2. I - beta k k^T makes nothing
    longer if beta |k|^2 is from 0 to 2."""
    longer = (g > 0.0) | (tl.abs(beta * size - 1.0) > 1.0)
    return tl.where(tl.max(longer.to(tl.int32), 0) > 0, float("inf"), tl.sum(g, 0))


@triton.jit
def note_fade(FADES, chunks, c, fade):
    """FADES of one row: fades of its chunks, and behind them 1 if one is infinite, where 0 is at first."""
    tl.store(FADES + c, fade)
    if fade == float("inf"):
        tl.store(FADES + chunks, 1.0)


@triton.jit
def remembered_from(FADES, chunks, begin, stop, BACKWARDS: tl.constexpr):
    """Where a walk from `begin` to `stop` may as well begin at zero, as before that all is forgotten when it ends; and
    whether there is such a place. FADES: of one row, see `note_fade`. There is none in a row of which a chunk makes
    states longer: what is before a place may be of any size."""
    at = stop - 1 - tl.arange(0, SEEN)
    there = at >= begin
    fades = tl.load(FADES + (chunks - 1 - at if BACKWARDS else at), mask=there, other=0.0)
    gone = there & (tl.cumsum(fades, 0) < tl.where(tl.load(FADES + chunks) > 0.0, float("-inf"), FORGOTTEN))
    return tl.max(tl.where(gone, at, begin), 0), tl.max(gone.to(tl.int32), 0) > 0
