"""Choices that look at keys one by one: tournaments, kernels/tournaments.py, and products of few bits,
kernels/low_bits.py."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core import low_bits as in_torch
from manyheads.core import tournaments as in_rounds
from manyheads.engines.triton.blocks import cdiv, is_hopper, multiprocessors
from manyheads.engines.triton.choosing.kernels import low_bits, rounding, tournaments
from manyheads.engines.triton.choosing.launches import PRECISION, empty_lists, launch, power
from manyheads.engines.triton.launch import INTERPRETED

MOST = 2**13  # halves of chunks, and their sampled keys, that a program has
WIDEST = 128  # query blocks, key blocks and rows that a program has
AT_ONCE = 12  # warps of tournaments on a multiprocessor
ROUNDED, ROWS, LISTED, CHUNKS = 16, 64, 4, 8  # of kernels/rounding.py and low_bits.py: rows, lists and parts of them
ROW_BYTES = 512  # of a row up to which there is room for ROWS of them
RUN = low_bits.RUN.value
TILE = {"ROWS": 128, "COLUMNS": 128}


def tournament(
    q: Tensor, k: Tensor, count: int, query_stride: int, key_stride: int, query_block: int, key_block: int, offset: int
) -> tuple[Tensor, Tensor]:
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    key_blocks, blocks = cdiv(n, key_block), cdiv(n, query_block) - offset // query_block
    count = min(count, max(1, key_blocks))  # more of them are empty
    tile = tournament_tile_of(count, query_stride, key_stride, query_block, key_block, dim)
    fits = tile["ROWS"] <= WIDEST and tile["KEYS"] * tile["CHUNKS"] <= MOST
    if not (fits and able(q, (tile["ROWS"] + 2 * tile["PART"]) * tile["PD"] * q.element_size())):
        return in_rounds.tournament(q, k, count, query_stride, key_stride, query_block, key_block, offset)
    q, k = _rows_whole(q, k)
    width = in_rounds.lists_width(key_blocks, count, query_block, key_block)
    indices, counts = empty_lists(q, batch, heads, blocks, width)
    tiles = batch * heads * blocks
    options = tournament_options(tile)
    programs = min(tiles, max(1, AT_ONCE // options["num_warps"]) * multiprocessors(q.device))
    chunks = indices.new_empty(programs, 4 * tile["CHUNKS"])
    scored = max(2 * tile["CHUNKS"] * tile["KEYS"], tile["PART"])
    likes = torch.empty(programs, scored, device=q.device, dtype=torch.float32)
    arguments = (
        q, k, chunks, likes, indices, counts, tiles, heads, heads // kv_heads, queries, n, blocks, width,
        *q.stride()[:3], *k.stride()[:3], count, query_stride, key_stride, query_block, key_block, offset,
        *tile.values(), PRECISION,
    )  # fmt: skip
    launch(tournaments.tournaments, programs, arguments, **options)
    return indices, counts


def tournament_tile_of(
    count: int, query_stride: int, key_stride: int, query_block: int, key_block: int, dim: int
) -> dict[str, int]:
    """The constants of kernels/tournaments.py, in its order."""
    tile = {
        "D": dim, "PD": max(16, power(dim)), "ROWS": max(16, power(cdiv(query_block, query_stride))),
        "OWN": power(in_rounds.own_blocks(query_block, key_block)), "CHUNKS": power(count),
        "KEYS": power(key_block // key_stride),
    }  # fmt: skip
    return tile | {"PART": min(128, 32 * tournament_options(tile)["num_warps"])}


def tournament_options(tile: dict[str, int]) -> dict[str, int]:
    """One warp, which waits for no other, where its registers have room for the scores of a round."""
    warps = min(8, max(1, tile["CHUNKS"] * tile["KEYS"] // 512, tile["ROWS"] // 32))
    return {"num_warps": warps, "num_stages": 3} | ({"maxnreg": 168} if warps == 1 and not torch.version.hip else {})


def by_four_bits(
    q: Tensor, k: Tensor, scale: float, least: float, sink: int, near: int, query_block: int, key_block: int,
    offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, heads, queries, dim), (kv_heads, n) = q.shape, k.shape[1:3]
    type_, wide = type_of(q.device), max(32, power(dim))
    tile, options = low_bits_tile_of(query_block, key_block, type_), low_bits_options(type_)
    places = tile["SETS"] * tile["QUERIES"] + options["num_stages"] * tile["BLOCKS"] * tile["KEYS"]
    if not (max(query_block, key_block) <= WIDEST and able(q, places * wide * type_.itemsize)):
        return in_torch.by_four_bits(q, k, scale, least, sink, near, query_block, key_block, offset)
    q, k = _rows_whole(q, k)
    group = heads // kv_heads
    blocks, key_blocks, sinks = cdiv(n, query_block) - offset // query_block, cdiv(n, key_block), cdiv(sink, key_block)
    at_once = RUN * tile["BLOCKS"]
    room, keys = cdiv(key_blocks, at_once) * at_once, tile["KEYS"]
    middle, mean = (x.mean(-2, dtype=torch.float32) for x in (q, k))
    # Rows and keys of `limits`, fewer of wide numbers: three tiles of keys wait beside one of queries.
    rows = max(16, min(ROWS, ROWS * ROW_BYTES // (wide * q.element_size())))
    of_q, least_of = (middle.new_empty(batch, heads, queries) for _ in range(2))
    of_k, shared = (middle.new_empty(batch, number, room * keys) for number in (kv_heads, heads))
    rough_q, rough_k = (torch.empty(*x.shape, wide, dtype=type_, device=q.device) for x in (of_q, of_k))
    words = torch.empty(batch, heads, blocks, room // RUN, dtype=torch.int32, device=q.device)
    indices, counts = empty_lists(q, batch, heads, blocks, key_blocks)

    whole = queries, queries, 1, *q.stride()[:3], scale, dim, wide, ROUNDED, 1  # rows are blocks of their own
    of_blocks = n, room * keys, key_block, *k.stride()[:3], scale, dim, wide, ROUNDED, keys
    arguments = q, middle, rough_q, of_q, None, None, heads, 1, *whole
    launch(rounding.rounded, batch * heads * cdiv(queries, ROUNDED), arguments)
    arguments = k, mean, rough_k, of_k, middle, shared, kv_heads, group, *of_blocks
    launch(rounding.rounded, batch * kv_heads * cdiv(room * keys, ROUNDED), arguments)
    arguments = (
        q, k, mean, least_of, heads, group, queries, n, *q.stride()[:3], *k.stride()[:3], scale, least,
        sinks * key_block, near, query_block, key_block, offset, dim, wide, rows, rows, PRECISION,
    )  # fmt: skip
    launch(rounding.limits, batch * heads * cdiv(queries, rows), arguments)
    arguments = (
        rough_q, of_q, rough_k, of_k, shared, least_of, words, heads, group, queries, room, blocks, near,
        query_block, key_block, offset, wide, *tile.values(),
    )  # fmt: skip
    launch(low_bits.outweighing, batch * heads * cdiv(blocks, tile["SETS"]), arguments, **options)
    arguments = (
        words, indices, counts, counts.numel(), n, room, blocks, key_blocks, sinks, near, query_block, key_block,
        offset // query_block, LISTED, CHUNKS, tile["BLOCKS"],
    )  # fmt: skip
    launch(low_bits.listing, cdiv(counts.numel(), LISTED), arguments)
    return indices, counts


def low_bits_tile_of(query_block: int, key_block: int, type_: torch.dtype) -> dict[str, int]:
    """The constants of kernels/low_bits.py behind PD, in its order."""
    queries, keys, columns = power(query_block), power(key_block), TILE["COLUMNS"] // min(2, type_.itemsize)
    return {
        "SETS": max(1, TILE["ROWS"] // queries), "QUERIES": queries, "BLOCKS": max(1, columns // keys), "KEYS": keys,
        "WHOLE": keys == key_block,
    }  # fmt: skip


def low_bits_options(type_: torch.dtype) -> dict[str, int]:
    return {"num_warps": 4, "num_stages": 3 if type_.itemsize == 1 else 2}


def able(q: Tensor, shared: int) -> bool:
    """Whether a multiprocessor has so many bytes of shared memory, and 2 KiB for what moves between threads."""
    if q.dtype == torch.float64 or not q.is_cuda:
        return q.dtype != torch.float64
    properties = torch.cuda.get_device_properties(q.device)
    return shared + 2048 <= getattr(properties, "shared_memory_per_block_optin", 2**16)  # AMD's have that, and no field


def type_of(device: torch.device) -> torch.dtype:
    """That whole numbers up to 7 are multiplied in: on Hopper's matrix units sums of 8-bit floats are off by less than
    2^-13 of their greatest number, and these are whole."""
    if INTERPRETED:
        return torch.float32
    return torch.float8_e4m3fn if is_hopper(device) else torch.bfloat16


def _rows_whole(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if INTERPRETED:  # which multiplies bfloat16 as the integers that it stores
        q, k = q.float(), k.float()
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))  # type: ignore[return-value]  two
