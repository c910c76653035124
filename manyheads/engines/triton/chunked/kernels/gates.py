"""Sums of log decays in each chunk: all of them where all channels of the keys decay alike, else how much is left."""

from __future__ import annotations

import triton
import triton.language as tl

from manyheads.engines.triton.chunked.kernels.common import LENGTHS, in_base_two, load, note_fade

CHUNKS = 16  # of a program


@triton.jit(do_not_specialize=LENGTHS)
def gates(G, SUMS, FADES, g_b, g_h, g_n, kv_len, heads, C: tl.constexpr, CHUNKS: tl.constexpr):
    """G: log decays [batch, heads, kv_len]; SUMS: float32 [batch, heads, chunks * C]; FADES, the last of each chunk, or
    infinity: see `fade_of` and `note_fade`."""
    chunks = tl.cdiv(kv_len, C)
    programs = tl.cdiv(chunks, CHUNKS)
    bh = tl.program_id(0) // programs
    b, h, wide = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64), bh.to(tl.int64)
    c = tl.program_id(0) % programs * CHUNKS + tl.arange(0, CHUNKS)
    at = c[:, None] * C + tl.arange(0, C)[None, :]
    g = in_base_two(tl.load(G + b * g_b + h * g_h + at.to(tl.int64) * g_n, mask=at < kv_len, other=0.0))
    tl.store(SUMS + wide * chunks * C + at, tl.cumsum(g, 1), mask=(c < chunks)[:, None])
    fades = tl.where(tl.max(g, 1) > 0.0, float("inf"), tl.sum(g, 1))
    FADES += wide * (chunks + 1)
    tl.store(FADES + c, fades, mask=c < chunks)
    if tl.max(tl.where(c < chunks, fades, 0.0), 0) == float("inf"):
        tl.store(FADES + chunks, 1.0)


@triton.jit(do_not_specialize=["kv_len", "heads", "rows", "segments", "per"])
def fades_of_channels(
    G, FADES, g_b, g_h, g_n, kv_len, heads, rows, segments, per, D: tl.constexpr, PD: tl.constexpr, C: tl.constexpr
):
    """G: log decays [batch, heads, kv_len, D]; FADES: as those of `pairs` where writes add, of the first `segments` of
    `per` chunks. Their beginnings come last: a walk reads their decays next, and some are still near."""
    chunks = tl.cdiv(kv_len, C)
    place = tl.program_id(0) % (rows * segments)
    bh = place // segments
    c = place % segments * per + per - 1 - tl.program_id(0) // (rows * segments)
    if c >= chunks:
        return
    columns = tl.arange(0, PD)
    G += (bh // heads).to(tl.int64) * g_b + (bh % heads).to(tl.int64) * g_h
    g = in_base_two(load(G, g_n, c * C, kv_len, columns, C, D))
    most = tl.max(tl.where(columns < D, tl.sum(g, 0), float("-inf")), 0)
    fade = tl.where(tl.max(g) > 0.0, float("inf"), most)
    note_fade(FADES + bh.to(tl.int64) * (chunks + 1), chunks, c, fade)
