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

# MASKED, if not 0: partial tiles are masked. ENDS: by more than the mask, as tiles stick out, tokens are absent, or
# blocks were chosen.
ENDS = gl.constexpr(2)

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
def positions_of(start, at, step, b, first, lines, length, AXIS: gl.constexpr, POSITIONS: gl.constexpr):
    """The positions of the tokens at first + lines: from `start` on, or as a row of `at` says, -1 for none.

    Each is a sum, (near, far). In the layout of a product's rows (AXIS 1) and columns (AXIS 0) a thread has one `near`,
    and `far` are constants of the machine code: what is computed from both is computed with these."""
    if POSITIONS:
        places = first + lines
        found = gl.load(at + b.to(gl.int64) * step + places, mask=places < length, other=-1)
        return gl.expand_dims(found, AXIS), gl.expand_dims(lines & 0, AXIS)
    else:
        FAR: gl.constexpr = 8 if AXIS == 1 else ~6
        return gl.expand_dims(first + start + (lines & ~FAR), AXIS), gl.expand_dims(lines & FAR, AXIS)


@gluon.jit
def seen_of(x, y, places, start, length, POSITIONS: gl.constexpr):
    """The pairs of tokens that are there, whatever the mask says. y: the positions of the columns, which are at
    `places` and begin with `start`; x: of the rows, where those that are not there do no harm."""
    if POSITIONS:
        return (places < length)[None, :] & (x[0] >= 0) & (y[0] >= 0)
    else:
        return y[1] < length + start - y[0]


@gluon.jit
def branch():
    """Makes the assembler jump over what a full tile does not need, rather than have each tile go through it."""
    gl.inline_asm_elementwise("bar.warp.sync -1; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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
            branch()
            gone = 0.0 if NORMALISER == NONE else float("-inf")
            if MASK is not None:
                s = gl.where(MASK(b, h, i, j, A), s, gone)
            if MASKED == ENDS:
                s = gl.where(inside, s, gone)
    return s


@gluon.jit
def lg2(x):
    """log2. What Triton makes of it is several times larger, for the sake of subnormal numbers."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
