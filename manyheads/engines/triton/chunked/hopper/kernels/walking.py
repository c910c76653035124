"""What walks through a segment share, whatever their consumers do: a program's part of the work, its shared memory, and
its warp groups.

A producer loads chunks into STAGES slots. Consumers hold 64 values of the state each, turned round, [values, keys]:
what one product gives is, rounded, the left side of the next one without leaving the registers, and they never wait for
each other. One more warp group makes A for them, a chunk or two ahead; where channels decay by themselves it prepares
chunks before that (channels.py).

A slot has room for q, k, v, T, strengths and decays (sums, but those of channels), of channels also for the last sums
and `scales`. Its barriers: `full` when all was loaded, `ready` when it is prepared, `free` when it was read.
"""

from __future__ import annotations

from manyheads.engines.triton.chunked.hopper.kernels.channels import prepare
from manyheads.engines.triton.chunked.hopper.kernels.parts import (
    barriers,
    numbers,
    remembered_from,
    room,
    rooms,
    squares,
    work_of,
)
from manyheads.engines.triton.hopper.names import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def walking(
    consumer, boxes, leaving, held, A, states, sizes, scale, DV: gl.constexpr, STAGES: gl.constexpr,
    BACKWARDS: gl.constexpr,
):  # fmt: skip
    """boxes: what is loaded, None where it is not there; without q there is no A. leaving, held: what consumers write,
    and the room where they put it. BACKWARDS: segments and chunks count from the end, and values are of query heads.

    With TOTALS it is asked what a segment adds to a state, from the chunk on that is remembered; with TRANSITION also
    what it makes of one."""
    q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, ends_desc = boxes
    START, END, TRANSITION, TOTALS, FADES, ENDS = states
    heads, group, segments, per, chunks = sizes
    C: gl.constexpr = k_desc.block_shape[2]
    D: gl.constexpr = k_desc.block_shape[3]
    HALF: gl.constexpr = v_desc.block_shape[3]
    HALVES: gl.constexpr = 1 if DV == HALF else 2
    TILES: gl.constexpr = DV // (HALVES * HALF)
    ALL: gl.constexpr = TILES if TRANSITION is None else TILES + 1
    INNER: gl.constexpr = q_desc is not None
    CORRECTS: gl.constexpr = t_desc is not None
    CHANNELS: gl.constexpr = g_desc is not None and len(g_desc.block_shape) == 4
    HELPED: gl.constexpr = INNER or CHANNELS
    AHEAD: gl.constexpr = 1 if CHANNELS and BACKWARDS else 2  # there is room for
    tile, bh, b, h, segment, begin, stop = work_of(heads, segments, per, chunks, ALL)
    column = tile % TILES * (HALVES * HALF)
    other = tile == TILES  # a program for TRANSITION, [D, D], beside those for END; D is DV then
    kept_end = segment == segments - 1
    place = (bh * segments + segment).to(gl.int64)
    if START is not None:
        START += place * (D * DV)
    if TOTALS is not None:
        kept_end = True
        END += place * (D * DV)
        TOTALS += place * (D if CHANNELS and TRANSITION is None else 1)
        forgotten = False
        if FADES is not None:
            begin, forgotten = remembered_from(FADES + bh.to(gl.int64) * (chunks + 1), chunks, begin, stop, BACKWARDS)
        if TRANSITION is not None:
            gl.store(TOTALS, gl.where(forgotten, float("-inf"), 0.0))
            if other:
                END = TRANSITION + place * (D * DV)
                if forgotten:
                    return
    elif END is not None:
        END += bh.to(gl.int64) * (D * DV)
    slots = (
        room(q_desc, STAGES) if INNER else None,
        room(k_desc, STAGES),
        rooms(v_desc, STAGES, HALVES),
        room(t_desc, STAGES) if CORRECTS else None,
        room(beta_desc, STAGES) if CORRECTS else None,
        room(g_desc, STAGES) if g_desc is not None else None,
        room(ends_desc, STAGES) if ends_desc is not None else None,
        numbers(2 * STAGES, D) if CHANNELS else None,
        barriers(STAGES, 1),
        barriers(STAGES, 1) if CHANNELS else None,
        barriers(STAGES, HALVES + (1 if INNER else 0)),
    )
    inner = (None, None, None)
    if INNER:
        inner = (squares(AHEAD, C, k_desc.dtype), barriers(AHEAD, 1), barriers(AHEAD, HALVES))
    span = (bh * chunks, begin, stop, chunks)
    given = (leaving, held, START, END, TOTALS, slots, inner, span, b, h, column, kept_end, other, scale)
    heads_of = (b, h, h // group, h if BACKWARDS else h // group)
    if HALVES == 2 and HELPED:
        gl.warp_specialize(
            [
                (_consumer, (consumer, given, 0, DV, BACKWARDS)),
                (_consumer, (consumer, given, 1, DV, BACKWARDS)),
                (_helper, (slots, inner, A, ENDS, span, scale, CHANNELS, BACKWARDS)),
                (_producer, (boxes, slots, span, heads_of, column, BACKWARDS)),
            ],
            [4, 4, 4],
            [200, 88, 24],
        )
    elif HELPED:
        gl.warp_specialize(
            [
                (_consumer, (consumer, given, 0, DV, BACKWARDS)),
                (_helper, (slots, inner, A, ENDS, span, scale, CHANNELS, BACKWARDS)),
                (_producer, (boxes, slots, span, heads_of, column, BACKWARDS)),
            ],
            [4, 4],
            [128 if CHANNELS else 104, 24],
        )
    elif HALVES == 2:
        gl.warp_specialize(
            [
                (_consumer, (consumer, given, 0, DV, BACKWARDS)),
                (_consumer, (consumer, given, 1, DV, BACKWARDS)),
                (_producer, (boxes, slots, span, heads_of, column, BACKWARDS)),
            ],
            [4, 4],
            [224, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (consumer, given, 0, DV, BACKWARDS)),
                (_producer, (boxes, slots, span, heads_of, column, BACKWARDS)),
            ],
            [4],
            [24],
        )


@gluon.jit
def _consumer(consumer, given, PART: gl.constexpr, DV: gl.constexpr, BACKWARDS: gl.constexpr):
    """As an argument, a function can be called, but is no warp group's."""
    consumer(given, PART, DV, BACKWARDS)


@gluon.jit
def _helper(slots, inner, A, ENDS, span, scale, CHANNELS: gl.constexpr, BACKWARDS: gl.constexpr):
    if CHANNELS:
        prepare(slots, inner, A, ENDS, span, scale, BACKWARDS)
    else:
        pairs(slots, inner, span, scale, BACKWARDS)


@gluon.jit
def _producer(boxes, slots, span, heads, column, BACKWARDS: gl.constexpr):
    q_desc, k_desc, v_desc, t_desc, g_desc, beta_desc, ends_desc = boxes
    qs, ks, vs, ts, betas, gs, ends, scales, full, _, free = slots
    line, begin, stop, chunks = span
    b, h, kv_head, v_head = heads
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    HALF: gl.constexpr = vs[0].shape[4]
    HALVES: gl.constexpr = len(vs)
    CHANNELS: gl.constexpr = scales is not None
    DECAYS: gl.constexpr = gs is not None and not CHANNELS
    CORRECTS: gl.constexpr = t_desc is not None
    ROWS: gl.constexpr = (D * (1 if qs is None else 2) + HALVES * HALF + (C if CORRECTS else 0)) * 2
    NUMBERS: gl.constexpr = (4 if CORRECTS else 0) + (4 if DECAYS else 0)
    OF_CHANNELS: gl.constexpr = C * D * (4 if g_desc.dtype == gl.float32 else 2) if CHANNELS else 0
    LAST: gl.constexpr = 4 * D if ends is not None else 0
    for n in range(begin, stop):
        step = n - begin
        c = chunks - 1 - n if BACKWARDS else n
        slot = step % STAGES
        here = full.index(slot)
        mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(here, C * (ROWS + NUMBERS) + OF_CHANNELS + LAST)
        if CHANNELS:
            tma_load(g_desc, [b, h, c * C, 0], here, gs.index(slot))
        if ends is not None:
            tma_load(ends_desc, [line + c, 0], here, ends.index(slot))
        tma_load(k_desc, [b, kv_head, c * C, 0], here, ks.index(slot))
        if qs is not None:
            tma_load(q_desc, [b, h, c * C, 0], here, qs.index(slot))
        for part in gl.static_range(HALVES):
            tma_load(v_desc, [b, v_head, c * C, column + part * HALF], here, vs[part].index(slot))
        if CORRECTS:
            tma_load(t_desc, [(line + c) * C, 0], here, ts.index(slot))
            tma_load(beta_desc, [line + c, 0], here, betas.index(slot))
        if DECAYS:
            tma_load(g_desc, [line + c, 0], here, gs.index(slot))


@gluon.jit
def pairs(slots, inner, span, scale, BACKWARDS: gl.constexpr):
    """A_ij = q_i.k_j e^(G_i - G_j) where j <= i of each chunk, [keys, queries]; BACKWARDS scale A, [queries, keys]."""
    qs, ks, _, _, _, gs, _, _, full, _, free = slots
    inners, inner_full, inner_free = inner
    _, begin, stop, _ = span
    STAGES: gl.constexpr = ks.shape[0]
    C: gl.constexpr = ks.shape[3]
    D: gl.constexpr = ks.shape[4]
    AHEAD: gl.constexpr = inners.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    zero = gl.full([C, C], 0.0, gl.float32, layout)
    row = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)), 0)
    inside = column <= row if BACKWARDS else row <= column
    for step in range(0, stop - begin):
        slot = step % STAGES
        a = step % AHEAD
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        q = qs.index(slot).reshape([C, D])
        k = ks.index(slot).reshape([C, D])
        if BACKWARDS:
            later = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        else:
            later = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        if gs is not None:
            above = gs.index(slot).load(layout)
            beside = gs.index(slot).permute((1, 0)).load(layout)
            fade = beside - above if BACKWARDS else above - beside
            product = warpgroup_mma_wait(0, deps=[later]) * gl.exp2(gl.where(inside, fade, float("-inf")))
        else:
            product = gl.where(inside, warpgroup_mma_wait(0, deps=[later]), 0.0)
        if BACKWARDS:
            product = product * scale
        mbarrier.arrive(free.index(slot))
        mbarrier.wait(inner_free.index(a), ((step // AHEAD) & 1) ^ 1)
        inners.index(a).store(product.to(inners.dtype))
        fence_async_shared()
        mbarrier.arrive(inner_full.index(a))
