"""What the kernels share: the table of tiles, positions, and the kinds of weights."""

from __future__ import annotations

from manyheads.engines.triton.hopper.names import gl, gluon

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

# What the table holds for each tile of queries. LISTS: the number of key tiles, then 2 * tile + partial for each.
# RANGES: the key tiles are lo to hi - 1, those of them from f0 to f1 - 1 are full. EVERY: there is no table.
# JUMPS: how far behind there is what LISTS has.
EVERY = gl.constexpr(0)
RANGES = gl.constexpr(1)
LISTS = gl.constexpr(2)
JUMPS = gl.constexpr(3)

# Weights from scores. SIGNED: sign(s) softmax(|s|). NONE: the scores themselves. 0 is the softmax.
SIGNED = gl.constexpr(1)
NONE = gl.constexpr(2)


@gluon.jit
def row_of(table, full, tiles, KIND: gl.constexpr):
    """What the table says of one row: where its list begins, the number of steps, lo, f0 and f1."""
    lo = 0
    f0 = 0
    f1 = full
    n = tiles
    if KIND == RANGES:
        lo = gl.load(table)
        n = gl.load(table + 1) - lo
        f0 = gl.load(table + 2)
        f1 = gl.load(table + 3)
    if KIND == JUMPS:
        table += gl.load(table)
    if KIND >= LISTS:
        n = gl.load(table)
        table += 1
    return table, n, lo, f0, f1


@gluon.jit
def tile_of(table, step, lo, f0, f1, KIND: gl.constexpr):
    """The tile of a step, and whether the mask must look at it."""
    if KIND >= LISTS:
        entry = gl.load(table + step)
        return entry >> 1, (entry & 1) == 1
    else:
        tile = lo + step
        return tile, (tile < f0) | (tile >= f1)


@gluon.jit
def positions_of(start, at, step, b, places, length, POSITIONS: gl.constexpr):
    """The positions of tokens: from `start` on, or as a row of `at` says, -1 for none."""
    if POSITIONS:
        return gl.load(at + b.to(gl.int64) * step + places, mask=places < length, other=-1)
    else:
        return places + start


@gluon.jit
def seen_of(i, j, inside, POSITIONS: gl.constexpr):
    """The pairs of tokens that are there, whatever the mask says."""
    if POSITIONS:
        return inside & (i >= 0) & (j >= 0)
    else:
        return inside


@gluon.jit
def changed(
    s, b, h, i, j, inside, partial, scale, A,
    SCORE: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, NORMALISER: gl.constexpr,
):  # fmt: skip
    """The scores after the score function and, in partial tiles, the mask."""
    if SCORE is not None:
        s = SCORE(s * scale, b, h, i, j, A)
    elif NORMALISER == NONE:
        s = s * scale
    if MASKED:  # noqa: SIM102  one is known to the compiler, the other is not
        if partial:
            seen = inside
            if MASK is not None:
                seen = seen & MASK(b, h, i, j, A)
            s = gl.where(seen, s, 0.0 if NORMALISER == NONE else float("-inf"))
    return s


@gluon.jit
def lg2(x):
    """log2. What Triton makes of it is several times larger, for the sake of subnormal numbers."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
