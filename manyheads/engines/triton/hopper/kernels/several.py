"""The rows of tiles of one program. It computes several one after the other, and what the next one needs is loaded
under the one before: between two programs a multiprocessor waits for as long as three tiles take."""

from __future__ import annotations

from manyheads.engines.triton.hopper.names import gl, gluon


@gluon.jit
def share_of(pid, several, each):
    """The first row of a program, and how many it has: the first `several` programs have `each`, the others one."""
    many = pid < several
    return gl.where(many, pid * each, several * each + pid - several), gl.where(many, each, 1)


@gluon.jit
def place_of(number, tiles, heads, table, table_batch, table_head, table_row):
    """Where a row is: b, h, the heads of all batches before it, its tile of queries, and its row of the table."""
    at = tiles - 1 - number % tiles  # the last queries see most in a causal mask: longest first
    head = number // tiles
    b = head // heads
    h = head % heads
    table += b.to(gl.int64) * table_batch + h.to(gl.int64) * table_head + at.to(gl.int64) * table_row
    return b, h, head, at, table
