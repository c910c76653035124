"""Maps of tiles made on the GPU: what a mask reads there is neither fetched nor waited for. Two launches for a table,
where the same rules on tensors take more than a hundred.

    states = map_of(program, x, (128, 128), operands)   # as program.tiles
    values = lists_of(states, last)                     # as tables.lists
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.expressions import Program
from manyheads.core.inputs import Inputs, Positions, as_rows
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper.kernels import listing, mapping
from manyheads.engines.triton.hopper.launching import Kernel, length_of

BLOCK = 32  # tiles of queries, and of keys, that one program makes a part of the map for
SLOTS = 128  # of a row of the map that a program reads at a time
FIXED = "q_at_step", "kv_at_step", "heads", "rows", "columns", "q_len", "kv_len", "q_start", "kv_start"
SIZES = "QUERIES: tl.constexpr", "KEYS: tl.constexpr", "BLOCK: tl.constexpr"
MAPPING = Kernel(mapping, "mapping", ("out", "q_at", "kv_at", *FIXED, *SIZES), FIXED, ("bounds",))


def map_of(
    program: Program, x: Inputs, tile: tuple[int, int], operands: dict[str, Tensor], block: int = BLOCK
) -> Tensor:
    """Which tiles are EMPTY, PARTIAL or FULL: uint8 [batch | 1, heads | 1, query tiles, key tiles] on q's device."""
    depends, device = program.mask_depends, x.q.device
    (q_at, q_step), (kv_at, kv_step) = (_at(p, x) for p in (x.q_positions, x.kv_positions))
    batch = x.batch if "b" in depends or q_step or kv_step else 1
    shape = batch, x.heads if "h" in depends else 1, cdiv(x.q_len, tile[0]), cdiv(x.kv_len, tile[1])
    out = quick.empty(shape, torch.uint8, device)
    starts = [0 if isinstance(p, Tensor) else p.start for p in (x.q_positions, x.kv_positions)]
    own = out, q_at, kv_at, q_step, kv_step, *shape[1:], x.q_len, x.kv_len, *starts, *tile, block
    programs = shape[0] * shape[1] * cdiv(shape[2], block) * cdiv(shape[3], block)
    source = program.source(outputs=("bounds",), length=length_of(x)) if program.has_mask else None
    with torch.cuda.device_of(out):
        MAPPING.run(programs, own, source, () if source is None else source.arguments(device, **operands))
    return out


def _at(positions: Positions, x: Inputs) -> tuple[Tensor | None, int]:
    """Rows of positions, and the step from one to the next: 0 where all share one."""
    if not isinstance(positions, Tensor):
        return None, 0
    rows = as_rows(positions, x.q.device).to(x.q.device)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0) if rows.shape[0] > 1 else 0


def lists_of(states: Tensor, last: int, turned: bool = False) -> Tensor:
    """The values of LISTS, see tables.py; turned: rows are the map's columns. Tile `last` sticks out, none if -1."""
    batch, heads, *tiles = states.shape
    rows, columns = tiles[::-1] if turned else tiles
    steps = (1, rows) if turned else (columns, 1)
    out = quick.empty((batch, heads, rows, 1 + columns), torch.int32, states.device)
    own = out, states, rows, columns, *steps, last, SLOTS
    with torch.cuda.device_of(out):
        quick.launch(listing.tiles_needed, batch * heads * rows, own, num_warps=1)
    return out
