"""The rows of tiles of one program. It computes several one after the other, and what the next one needs is loaded
under the one before: between two programs a multiprocessor waits for as long as three tiles take."""

from __future__ import annotations

from manyheads.engines.triton.hopper.names import gl, gluon


@gluon.jit
def share_of(pid, several, halvings, halved):
    """The first row of a program, and how many it has: the first `several` programs have 2^halvings, the next `halved`
    half of that, and so on; the last ones have one, so that all processors end at nearly the same time."""
    each = 1 << halvings
    power = gl.where(pid < several, 0, gl.minimum((pid - several) // halved + 1, halvings))
    count = each >> power
    after = several * each + halved * (each - 2 * count) + (pid - several - (power - 1) * halved) * count
    return gl.where(power == 0, pid * each, after), count


@gluon.jit
def place_of(number, tiles, heads, table, table_batch, table_head, table_row):
    """Where a row is: b, h, the heads of all batches before it, its tile of queries, and its row of the table."""
    at = tiles - 1 - number % tiles  # the last queries see most in a causal mask: longest first
    head = number // tiles
    b = head // heads
    h = head % heads
    table += b.to(gl.int64) * table_batch + h.to(gl.int64) * table_head + at.to(gl.int64) * table_row
    return b, h, head, at, table
