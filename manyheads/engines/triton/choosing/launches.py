"""What the operators of core/builders.py run on a GPU. What no kernel takes, float64 and rows that are too long, torch
operations do there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from manyheads.core import picking
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv, multiprocessors
from manyheads.engines.triton.choosing.kernels import listing, long, means, turning
from manyheads.engines.triton.choosing.kernels.past import past as past_of
from manyheads.engines.triton.choosing.kernels.rows import heaviest_of_rows
from manyheads.engines.triton.hopper.kernels.uniting import mark
from manyheads.engines.triton.launch import INTERPRETED

LONGEST = 2**14  # a row in registers
TILE = 2**12  # numbers in registers, where rows are shorter
HELD, LINES = 32, 8  # numbers of rows that a thread has, and lines of a row of 128 to 1024
LOOKED, TOGETHER = 2**14, 64  # entries of a longer row that a program looks at, at most, and such chunks it adds up
CHUNKS = 256  # of a row, before programs look at more than KEPT entries
MEASURED, KEPT = 256, 2048  # of these at a time
ROWS, PART, DIMS = 16, 64, 32  # query blocks, key blocks, and numbers of each, that are multiplied at a time
MARKED = 64, 1024  # entries of 32 lists that are marked at a time, and words that are set to 0
AT_ONCE = 16  # warps of kernels/past.py on a multiprocessor
PRECISION = "ieee" if INTERPRETED or torch.version.hip else "tf32x3"  # three products of parts of the bits


def block_means(x: Tensor, size: int, start: int, share: Tensor | None = None) -> Tensor:
    """share: float32 of each batch and head, contiguous; means of those whose is 0 are whatever memory held."""
    if x.dtype == torch.float64:
        return picking.block_means(x, size, start)
    x = x if x.stride(-1) == 1 else x.contiguous()
    four = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) if x.ndim > 2 else x[None, None]
    (batch, heads, length, dim), before = four.shape, start % size
    blocks, width = cdiv(before + length, size), power(dim)
    out = x.new_empty(*x.shape[:-2], blocks, dim, dtype=torch.float32)
    some = max(1, min(TILE // width, power(size)))
    arguments = four, out, share, heads, blocks, length, before, size, *four.stride()[:3], some, dim, width
    launch(means.means, batch * heads * blocks, arguments, num_warps=2)
    return out


def heaviest(mass: Tensor, share: Tensor | None, least: int, first: bool) -> Tensor:
    if mass.dtype == torch.float64:
        return picking.heaviest(mass, share, least, first)
    kept = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    if share is not None:
        share = share.float()
        share = share if share.numel() == 1 else share.expand(*mass.shape[:-1], 1).contiguous()
    if mass.shape[-1] > LONGEST:
        of_long_rows(mass.contiguous(), share, kept.view(torch.uint8), least, first)
        return kept
    _of_rows(mass.contiguous(), share, kept.view(torch.uint8), None, None, 0, least, first)
    return kept


def best(likes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if not fits(likes):
        return picking.best(likes, count)
    indices, counts = empty_lists(likes, *likes.shape[:-1], min(count, likes.shape[-1]))
    _of_rows(likes.contiguous(), None, None, indices, counts, indices.shape[-1], count, False)
    return indices, counts


def _of_rows(
    mass: Tensor, share: Tensor | None, kept: Tensor | None, indices: Tensor | None, counts: Tensor | None, width: int,
    least: int, first: bool,
) -> None:  # fmt: skip
    n, step = mass.shape[-1], 0 if share is None or share.numel() == 1 else 1
    columns, number = power(n), math.prod(mass.shape[:-1])
    some = held(columns, warps(columns))
    tile = some, columns, line_of(columns)
    arguments = mass, share, kept, indices, counts, number, n, width, step, least, first, *tile
    launch(heaviest_of_rows, cdiv(number, some), arguments, **rows_options(columns, share is not None))


def of_long_rows(mass: Tensor, share: Tensor | None, kept: Tensor, least: int, first: bool) -> None:
    n, step, number = mass.shape[-1], 0 if share is None or share.numel() == 1 else 1, math.prod(mass.shape[:-1])
    looked = min(LOOKED, max(KEPT, power(n // CHUNKS)))
    chunks = cdiv(n, looked)
    ended, limits = torch.zeros(2, number, dtype=torch.int32, device=mass.device)
    limits = limits.view(torch.uint32)
    counts = torch.empty(number, chunks, long.DIGITS.value, dtype=torch.int32, device=mass.device)
    masses = counts.new_empty(counts.shape, dtype=torch.float32)
    above = counts.new_empty(number), masses.new_empty(number), counts.new_empty(number, chunks)
    for turn, shift in enumerate(range((cdiv(32, long.BITS) - 1) * long.BITS, -1, -long.BITS), 1):
        sizes, constants = (n, looked, chunks, turn * chunks - 1, shift, step, least), (first, MEASURED, TOGETHER)
        arguments = mass, share, limits, ended, counts, masses, *above, *sizes, *constants
        launch(long.measure, number * chunks, arguments, num_warps=4)
    arguments = mass, kept, limits, share, *above, n, looked, chunks, step, least, first, KEPT
    launch(long.keep, number * chunks, arguments, num_warps=8)


def best_past(q: Tensor, k: Tensor, count: int, *rule: int) -> tuple[Tensor, Tensor]:
    if not fits(q, k.shape[2]):
        return picking.best_past(q, k, count, *rule)
    return _past(q, k, min(count, k.shape[2]), 1.0, 0.0, count, rule, False)


def fewest_past(q: Tensor, k: Tensor, scale: float, share: float, least: int, *rule: int) -> tuple[Tensor, Tensor]:
    if not fits(q, k.shape[2]):
        return picking.fewest_past(q, k, scale, share, least, *rule)
    return _past(q, k, k.shape[2], scale, share, least, rule, True)


def _past(
    q: Tensor, k: Tensor, width: int, scale: float, share: float, least: int, rule: tuple[int, ...], shared: bool
) -> tuple[Tensor, Tensor]:
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    q, k = q if q.stride(-1) == 1 else q.contiguous(), k.float().contiguous()
    indices, counts = empty_lists(q, batch, heads, queries, width)
    tile = tile_of(n, dim)
    tiles = batch * heads * cdiv(queries, tile["ROWS"])
    options = past_options(tile["COLUMNS"])
    programs = min(tiles, AT_ONCE // options["num_warps"] * multiprocessors(q.device))
    space = torch.empty(programs, tile["ROWS"], tile["COLUMNS"], dtype=torch.float32, device=q.device)
    query_block, key_block, offset, first, local = rule
    arguments = (
        q, k, space, indices, counts, tiles, heads, heads // kv_heads, queries, n, width, *q.stride()[:3], scale, share,
        least, query_block, key_block, offset // query_block, first, local, shared, not shared or least > 0, dim,
        *tile.values(), PRECISION,
    )  # fmt: skip
    launch(past_of, programs, arguments, **options)
    return indices, counts


def tile_of(key_blocks: int, dim: int) -> dict[str, int]:
    """The constants of kernels/past.py, in its order."""
    columns, dims = max(16, power(key_blocks)), min(DIMS, max(16, power(dim)))
    return {
        "DIMS": dims, "ROWS": ROWS, "SOME": min(ROWS, held(columns, warps(columns))), "PART": min(PART, columns),
        "COLUMNS": columns, "LINE": line_of(columns),
    }  # fmt: skip


def past_options(columns: int) -> dict[str, int]:
    return {"num_warps": warps(columns), "num_stages": 2, **few()}


def rows_options(columns: int, shared: bool) -> dict[str, int]:
    """Few registers where they are enough."""
    return {"num_warps": warps(columns), **({} if shared or columns > TILE else few())}


def few() -> dict[str, int]:
    """Registers so few that 16 warps fit on a multiprocessor of NVIDIA's."""
    return {} if torch.version.hip else {"maxnreg": 128}


def held(columns: int, warps: int) -> int:
    """Rows in the registers of so many warps."""
    return max(1, HELD * 32 * warps // columns)


def line_of(columns: int) -> int:
    """Numbers of a row, four to a thread, that as many threads as there are for it read at a time; see
    kernels/rows.py."""
    return min(columns, max(16, columns // LINES), 128)


def listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    indices, counts = empty_lists(keep, *keep.shape)
    n, number = keep.shape[-1], counts.numel()
    arguments = keep.contiguous().view(torch.uint8), indices, counts, number, n, 4, 512
    launch(listing.listing, cdiv(number, 4), arguments)
    return indices, counts


def transposed(indices: Tensor, counts: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    batch, heads, query_blocks, width = indices.shape
    chunks, rows = cdiv(query_blocks, turning.BITS.value), batch * heads
    words = torch.empty(rows * chunks * key_blocks, dtype=torch.int32, device=indices.device)
    numbers = words.new_zeros(1 + rows * key_blocks)  # a 0 comes before all of them
    out = words.new_empty(indices.numel())
    sizes = 0, query_blocks, width, chunks, key_blocks, *MARKED, False
    launch(mark, rows * chunks, (words, None, indices.contiguous(), counts.contiguous(), *sizes))
    programs = rows * cdiv(key_blocks, turning.COLUMNS)
    launch(turning.count, programs, (words, numbers[1:], chunks, key_blocks, turning.COLUMNS))
    begins = numbers.cumsum(0, dtype=torch.int32)
    launch(turning.place, programs, (words, begins, out, chunks, key_blocks, turning.COLUMNS))
    return out, begins


# ---- what they share ----


def fits(x: Tensor, length: int | None = None) -> bool:
    return x.dtype != torch.float64 and (x.shape[-1] if length is None else length) <= LONGEST


def empty_lists(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty(shape, dtype=torch.int32, device=like.device)
    return indices, indices.new_empty(shape[:-1])


def power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def warps(columns: int) -> int:
    """So that a thread has 64 numbers of a row at most."""
    return 4 if columns <= TILE else 8


def launch(entry: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            quick.launch(entry, programs, arguments, **options)
