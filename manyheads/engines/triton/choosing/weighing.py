"""Choices that weigh queries against many keys: products of 16-bit parts, kernels/scores.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.core import picking
from manyheads.engines.triton.blocks import cdiv, multiprocessors
from manyheads.engines.triton.choosing.kernels import stripes as striping
from manyheads.engines.triton.choosing.kernels import windows
from manyheads.engines.triton.choosing.kernels.scores import halved
from manyheads.engines.triton.choosing.launches import (
    PART,
    PRECISION,
    empty_lists,
    fits,
    held,
    launch,
    line_of,
    power,
)
from manyheads.engines.triton.launch import INTERPRETED

ROWS, KEYS = 128, 64  # that are multiplied at a time
HALVED = 2**11  # numbers of a program
TILES, SOME = 64, 16  # tiles of KEYS and queries whose sums are added up at a time
OPTIONS = {"windows": {"num_warps": 4, "num_stages": 2}, "stripes": {"num_warps": 8, "num_stages": 1}}
NARROW = 128  # numbers of a head in 16 bits, up to which two programs of kernels/windows.py fit on a multiprocessor


def best_windows(
    q: Tensor, k: Tensor, scale: float, count: int, dense: int, together: int, kernel: int, stride: int, *rule: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, heads, queries, dim), (_, kv_heads, n, _), (_, key_block, offset, first, local) = q.shape, k.shape, rule
    blocks, step, overlap = cdiv(offset + queries, key_block), key_block // stride, kernel // stride - 1
    able = power(step) == step <= PART and overlap <= step and heads // kv_heads % together == 0
    if not (able and fits(q, blocks) and narrow(q)):
        return picking.best_windows(q, k, scale, count, dense, together, kernel, stride, *rule)
    q = q if q.stride(-1) == 1 else q.contiguous()
    high, low, sizes = _in_halves(k) if q.element_size() == 2 else (k.float().contiguous(), None, None)
    width = picking.windows_width(queries, count, dense, *rule)
    indices, counts = empty_lists(q, batch, heads // together, queries, width)
    two = low is not None and dim <= NARROW
    options = OPTIONS["windows"] | ({} if two else {"num_warps": 8})
    tile = window_tile_of(blocks, step, overlap, together, dim, options["num_warps"])
    tiles = batch * heads // together * cdiv(queries, tile["QUERIES"])
    programs = min(tiles, (2 if two else 1) * multiprocessors(q.device))
    space = torch.empty(programs, 2, tile["QUERIES"], tile["COLUMNS"], dtype=torch.float32, device=q.device)
    rows = tile["QUERIES"] * tile["HIGH"] * tile["LOW"]
    halves = None if low is None else low.new_empty(programs, rows, tile["PD"])
    arguments = (
        q, high, low, sizes, space, halves, indices, counts, tiles, heads, heads // kv_heads, queries, n, width,
        *q.stride()[:3], scale, count, kernel, stride, dense, key_block, offset, first, local, together,
        *tile.values(), PRECISION,
    )  # fmt: skip
    launch(windows.windows, programs, arguments, **options)
    return indices, counts


def stripes(q: Tensor, k: Tensor, scale: float, size: int) -> Tensor:
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    if not (fits(q, 0) and narrow(q)):
        return picking.stripes(q, k, scale, size)
    if INTERPRETED:  # which multiplies bfloat16 as the integers that it stores
        q, k = q.float(), k.float()
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    tiles, blocks = cdiv(n, KEYS), cdiv(n, size)
    columns = 1 if size % KEYS == 0 else (KEYS - 2) // size + 2  # that a tile may have a part of
    diagonals = (ROWS + KEYS - 2) // size + 2
    tops, totals = torch.empty(2, batch, heads, tiles, queries, dtype=torch.float32, device=q.device)
    sums, out = tops.new_empty(*tops.shape[:3], columns + diagonals, queries), tops.new_empty(2, batch, heads, blocks)
    sizes, steps = (tiles, size, columns, diagonals), (*q.stride()[:3], *k.stride()[:3])
    arguments = q, k, tops, totals, sums, heads, heads // kv_heads, queries, n, *sizes, scale, *steps
    constants = dim, max(16, power(dim)), ROWS, KEYS, PRECISION
    programs = batch * heads * tiles * cdiv(queries, ROWS)
    launch(striping.parts, programs, (*arguments, *constants), **OPTIONS["stripes"])
    divisor = tops.new_empty(batch, heads, queries)
    launch(striping.divisors, batch * heads * cdiv(queries, SOME), (totals, divisor, queries, tiles, TILES, SOME))
    arguments = tops, divisor, sums, out, queries, n, tiles, blocks, size, columns, diagonals, ROWS, KEYS
    launch(striping.stripes, out.numel(), arguments, num_warps=4)
    return out


def window_tile_of(key_blocks: int, step: int, overlap: int, together: int, dim: int, warps: int) -> dict[str, int]:
    """The constants of kernels/windows.py from HIGH on, in its order."""
    members, columns = power(together), max(16, PART // step, power(key_blocks))  # a part's at least: all are written
    low, queries = min(2, members), max(1, ROWS // members)
    return {
        "HIGH": members // low, "LOW": low, "EACH": min(8, queries), "D": dim, "PD": max(16, power(dim)),
        "QUERIES": queries, "SOME": min(queries, held(columns, warps)), "STEP": step,
        "OVERLAP": overlap, "PART": PART, "COLUMNS": columns, "LINE": line_of(columns),
    }  # fmt: skip


def _in_halves(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float16 twice and float32 [batch, heads], whose product is k [batch, heads, n, dim] to 22 bits."""
    k = k.float().contiguous()
    high, low = torch.empty(2, *k.shape, dtype=torch.float16, device=k.device)
    if not k.numel():
        return high, low, k.new_ones(k.shape[:2])
    largest = torch.linalg.vector_norm(k, math.inf, (-2, -1))
    sizes, numbers = torch.empty_like(largest), k.shape[2] * k.shape[3]
    programs = largest.numel() * cdiv(numbers, HALVED)
    launch(halved, programs, (k, largest, high, low, sizes, numbers, HALVED))
    return high, low, sizes


def narrow(q: Tensor) -> bool:
    """Whether tiles of whole rows fit in shared memory."""
    return q.shape[-1] * q.element_size() <= 512
