"""Which past keys a block of queries likes best, by a tournament between ever shorter chunks of them: by torch
operations on any device and in any dtype. Scores are float32 or wider, and of equal halves the earlier one stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.picking import wide

HELD = 2**21  # numbers of keys that are held at a time
NONE = torch.iinfo(torch.int32).max


def tournament(
    q: Tensor, k: Tensor, count: int, query_stride: int, key_stride: int, query_block: int, key_block: int, offset: int
) -> tuple[Tensor, Tensor]:
    """As choosing.tournament."""
    (batch, heads, _, dim), n = q.shape, k.shape[2]
    tiles = F.pad(wide(k), (0, 0, 0, -n % key_block)).unflatten(2, (-1, key_block))
    sample = tiles[:, :, :, key_stride - 1 :: key_stride]
    rows = F.pad(wide(q), (0, 0, offset % query_block, -n % query_block)).unflatten(2, (-1, query_block))
    begin = (offset // query_block + torch.arange(rows.shape[2], device=q.device)[:, None]) * query_block
    i = begin + torch.arange(query_block, device=q.device)
    there = (i >= offset) & (i < n) & ((i - begin.clamp(min=offset)) % query_stride == 0)
    rounds = (max(1, -(-(n // key_block) // count)) - 1).bit_length()
    at_once = max(1, HELD // max(1, batch * heads * 2 * count * sample.shape[3] * dim))
    runs = zip(*(x.split(at_once, at) for x, at in ((rows, 2), (there, 0), (begin // key_block, 0))), strict=True)
    low, high = (torch.cat(ends, 2) for ends in zip(*(_play(sample, count, rounds, *run) for run in runs), strict=True))

    own = begin // key_block + torch.arange(own_blocks(query_block, key_block), device=q.device)
    own = torch.where(own * key_block < (begin + query_block).clamp(max=n), own, NONE).expand(batch, heads, -1, -1)
    listed = torch.cat([torch.where(low < high, low, NONE), own], -1).sort(-1).values
    width = lists_width(tiles.shape[2], count, query_block, key_block)
    return listed[..., :width].int(), (listed < NONE).sum(-1, dtype=torch.int32)


def _play(tiles: Tensor, count: int, rounds: int, rows: Tensor, there: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Where the chunks that stay begin and end, ascending, [batch, heads, m, count] each: of the first `blocks` [m, 1]
    tiles of keys [batch, kv_heads, t, size, dim], for rows [batch, heads, m, query_block, dim] that are `there`."""
    batch, heads, m = rows.shape[:3]
    kv_heads = tiles.shape[1]
    grouped = rows.unflatten(1, (kv_heads, -1))
    cuts = torch.arange(count + 1, device=rows.device) * blocks // count
    low, high = (x.expand(batch, heads, m, count) for x in (cuts[:, :-1], cuts[:, 1:]))
    for _ in range(rounds):
        middle = (low + high) // 2
        low, high = torch.stack([low, middle], -1).flatten(-2), torch.stack([middle, high], -1).flatten(-2)
        centre = ((low + high) // 2).view(batch, kv_heads, -1)
        picked = tiles.gather(2, centre[..., None, None].expand(-1, -1, -1, *tiles.shape[3:]))
        picked = picked.view(batch, kv_heads, -1, m, 2 * count, *tiles.shape[3:])
        s = torch.einsum("bkgmid,bkgmcjd->bkgmcij", grouped, picked).flatten(1, 2)
        s = s.masked_fill(~there[:, None, :, None], -torch.inf).amax((-2, -1)).masked_fill(low >= high, -torch.inf)
        best = s.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
        low, high = low.gather(-1, best), high.gather(-1, best)
    return low, high


def own_blocks(query_block: int, key_block: int) -> int:
    """Key blocks that a query block overlaps, at most."""
    return query_block // key_block if query_block % key_block == 0 else (query_block + key_block - 2) // key_block + 1


def lists_width(key_blocks: int, count: int, query_block: int, key_block: int) -> int:
    return min(key_blocks, count + own_blocks(query_block, key_block))
