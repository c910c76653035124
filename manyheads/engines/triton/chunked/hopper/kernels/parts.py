"""What the walks in Gluon share."""

from __future__ import annotations

from manyheads.engines.triton.chunked.kernels import common
from manyheads.engines.triton.hopper.names import gl, gluon, mbarrier

FORGOTTEN, SEEN = gl.constexpr(common.FORGOTTEN.value), gl.constexpr(common.SEEN.value)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def remembered_from(FADES, chunks, begin, stop, BACKWARDS: gl.constexpr):
    """As in common.py."""
    at = stop - 1 - gl.arange(0, SEEN, gl.BlockedLayout([2], [32], [4], [0]))
    there = at >= begin
    fades = gl.load(FADES + (chunks - 1 - at if BACKWARDS else at), mask=there, other=0.0)
    least = gl.where(gl.load(FADES + chunks) > 0.0, float("-inf"), FORGOTTEN)
    gone = there & (gl.associative_scan(fades, 0, add) < least)
    return gl.max(gl.where(gone, at, begin), 0), gl.max(gone.to(gl.int32), 0) > 0


@gluon.jit
def work_of(heads, segments, per, chunks, ALL: gl.constexpr):
    """What a program does, in a grid of ALL tiles for each segment of each head: its tile; the head, with its row and
    by itself; the segment, and the chunks where it begins and stops."""
    segment = gl.program_id(0) // ALL % segments
    bh = gl.program_id(0) // ALL // segments
    begin = segment * per
    return gl.program_id(0) % ALL, bh, bh // heads, bh % heads, segment, begin, gl.minimum(begin + per, chunks)


@gluon.jit
def room(desc, N: gl.constexpr):
    """Shared memory for N boxes."""
    return gl.allocate_shared_memory(desc.dtype, [N] + desc.block_shape, desc.layout)  # noqa: RUF005  Triton's lists


@gluon.jit
def rooms(desc, N: gl.constexpr, HALVES: gl.constexpr):
    """The same for each consumer."""
    first = room(desc, N)
    return (first, room(desc, N)) if HALVES == 2 else (first,)


@gluon.jit
def squares(N: gl.constexpr, C: gl.constexpr, dtype: gl.constexpr):
    """The same for N matrices of what tokens of a chunk are to each other."""
    return gl.allocate_shared_memory(dtype, [N, C, C], gl.NVMMASharedLayout.get_default_for([C, C], dtype))


@gluon.jit
def numbers(N: gl.constexpr, D: gl.constexpr):
    """The same for N times D numbers that no box holds."""
    return gl.allocate_shared_memory(gl.float32, [N, D], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N of them, at which COUNT warp groups arrive."""
    made = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(N):
        mbarrier.init(made.index(place), count=COUNT)
    return made


@gluon.jit
def state_before(START, near, far, same, other):
    """A consumer's part of a state before the first chunk, 0 where nothing was. The program for TRANSITION (`other`)
    adds the identity: where v = 0, S is then what the segment makes of the state before it."""
    if START is None:
        S = gl.full(same.shape, 0.0, gl.float32, same.type.layout)
    else:
        S = gl.load(START + near + far).to(gl.float32)
    if other is not None:  # noqa: SIM102  known when it is compiled
        if other:
            S += gl.where(same, 1.0, 0.0)
    return S


@gluon.jit
def turned(x, layout: gl.constexpr):
    """A chunk [tokens, values], the other way round, in float32."""
    return x.reshape([x.shape[2], x.shape[3]]).permute((1, 0)).load(layout).to(gl.float32)


@gluon.jit
def place_of(column, HALF: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr):
    """Where the numbers of a consumer's part lie in a state [D, DV], as a sum, and which are on the diagonal. Of the
    sum a thread has one `near`, and `far` are constants of the machine code."""
    values = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, layout)), 1)
    keys = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, layout)), 0)
    near = (keys & 6) * DV + (values & ~8) + column
    return near, (keys & ~6) * DV + (values & 8), keys == values + column
