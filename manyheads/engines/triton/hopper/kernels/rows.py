"""What the backward pass needs of each query, whatever its keys."""

from __future__ import annotations

from manyheads.engines.triton.hopper.kernels.common import LOG2E
from manyheads.engines.triton.hopper.names import gl, gluon


@gluon.jit(do_not_specialize=["q_len", "padded", "heads"])
def rows(
    o, do, lse, dlse, top, delta, o_b, o_h, o_n, do_b, do_h, do_n, dlse_b, dlse_h, dlse_n, q_len, padded, heads,
    head_dim: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """top: lse in base two, delta: rowsum(dO O) - dlse; float32 [batch, heads, padded]. Queries that see nothing, and
    those behind q_len, have top = inf, so that all their weights are 0. Grid: padded // ROWS * heads * batch."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    tiles = padded // ROWS
    pid = gl.program_id(0)
    row = pid % tiles * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    b = (pid // tiles // heads).to(gl.int64)
    h = (pid // tiles % heads).to(gl.int64)
    there = row < q_len
    inside = there[:, None] & (column < head_dim)[None, :]
    wide = row.to(gl.int64)
    o_tile = gl.load(o + (b * o_b + h * o_h) + wide[:, None] * o_n + column[None, :], mask=inside, other=0.0)
    do_tile = gl.load(do + (b * do_b + h * do_h) + wide[:, None] * do_n + column[None, :], mask=inside, other=0.0)
    value = gl.sum(o_tile.to(gl.float32) * do_tile.to(gl.float32), 1)
    own = gl.load(lse + (b * heads + h) * q_len + row, mask=there, other=float("-inf"))
    if HAS_DLSE:
        value -= gl.load(dlse + (b * dlse_b + h * dlse_h) + wide * dlse_n, mask=there, other=0.0).to(gl.float32)
    at = (b * heads + h) * padded + row
    gl.store(top + at, gl.where(own == float("-inf"), float("inf"), own * LOG2E))
    gl.store(delta + at, value)
