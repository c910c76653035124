"""Tiles of keys that are put together from several entries of a list, so that blocks of 64, 32 or 16 keys make tiles
of 128."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import tile_of
from manyheads.engines.triton.hopper.names import gl, gluon, mbarrier, tma_load


@gluon.jit
def load_keys(
    desc, b, head, line, step, lo, full, free, phase, slot, KEYS: gl.constexpr, DIM: gl.constexpr, PARTS: gl.constexpr,
    KIND: gl.constexpr,
):  # fmt: skip
    """The keys of a step, or their values, into a slot. desc: boxes of a tile, or of a PART of one and 64 columns."""
    if PARTS == 1:
        tile, _ = tile_of(line, step, lo, 0, 0, KIND)  # asked for before anything is waited for
        mbarrier.wait(free, phase)
        mbarrier.expect(full, KEYS * DIM * 2)
        tma_load(desc, [b, head, tile * KEYS, 0], full, slot)
    else:
        PART: gl.constexpr = KEYS // PARTS
        mbarrier.wait(free, phase)
        mbarrier.expect(full, KEYS * DIM * 2)
        for part in gl.static_range(PARTS):
            key = (gl.load(line + step * PARTS + part) >> 1) * PART
            for piece in gl.static_range(DIM // 64):  # columns that lie together in shared memory
                to = slot.slice(part * PART, PART, 2).slice(piece * 64, 64, 3)
                tma_load(desc, [b, head, key, piece * 64], full, to)


@gluon.jit
def keys_at(line, step, lo, f0, f1, columns, KEYS: gl.constexpr, PARTS: gl.constexpr, KIND: gl.constexpr):
    """What is added to `columns`, 0 to KEYS - 1, for the places of a step's keys, and whether the mask must look."""
    if PARTS == 1:
        tile, partial = tile_of(line, step, lo, f0, f1, KIND)
        return tile * KEYS, partial
    else:
        PART: gl.constexpr = KEYS // PARTS
        entry = gl.load(line + step * PARTS)
        signs = entry
        first = columns * 0 + (entry >> 1) * PART
        for part in gl.static_range(1, PARTS):
            entry = gl.load(line + step * PARTS + part)
            signs = signs | entry
            # A thread's columns differ from its first by constants, and that is less than 8: the compiler decides.
            first = gl.where((columns & ~7) >= part * PART, ((entry >> 1) - part) * PART, first)
        return first, (signs & 1) == 1
