"""Blocks of tokens as their means: one program for each, which reads it once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "blocks", "length", "before", "size"])
def means(
    x, out, share, heads, blocks, length, before, size, x_b, x_h, x_n, ROWS: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr,
):  # fmt: skip
    """out float32 [batch, heads, blocks, D] of x [batch, heads, length, D] with these strides, where share float32
    [batch, heads] is more than 0, or there is none. before: tokens that the first block has not.
    Grid: batch * heads * blocks."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // blocks
    if share is not None:  # noqa: SIM102  Triton has no `and` of what is known and what is not
        if tl.load(share + head) <= 0:
            return
    begin = pid % blocks * size - before
    end = tl.minimum(begin + size, length)
    begin = tl.maximum(begin, 0)
    columns = tl.arange(0, PD)
    at = x + head // heads * x_b + head % heads * x_h + columns[None, :]
    sums = tl.zeros([ROWS, PD], tl.float32)
    for first in tl.range(begin, end, ROWS, loop_unroll_factor=4):  # so that more is on its way at a time
        rows = first + tl.arange(0, ROWS)
        there = (rows < end)[:, None] & (columns < D)[None, :]
        sums += tl.load(at + rows[:, None] * x_n, mask=there, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0), tl.zeros([PD], tl.float32) + (end - begin).to(tl.float32))
    tl.store(out + pid * D + columns, mean, mask=columns < D)
