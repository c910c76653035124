"""Tokens that choose blocks one by one, all query heads of a key head the same: a tile has the heads of one token, and
visits what the token chose, where tiles of neighbours visit all that any of them chose.

Backward, keys meet the tokens that list them, several at a time. Where there are few key heads, the gradients of keys
are sums of what shares of these tokens give, as every token may list the first block.

Yuan, Gao, Dai, et al. "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention." 2025.
arXiv:2502.11089, section 3.4, has these tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.builders import transposed
from manyheads.core.forms import Blocks, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv, padded
from manyheads.engines.triton.hopper import backward
from manyheads.engines.triton.hopper.kernels import tokens
from manyheads.engines.triton.hopper.ordering import TILE
from manyheads.engines.triton.hopper.rounds import CAUSAL
from manyheads.engines.triton.hopper.rounds import Chosen as Others

LEAST = 16  # rows, and keys, of a product
KEY_BLOCKS = (16, 32, 64, 128)
COST = 3  # a tile of LEAST rows takes so many times as long as LEAST rows of a tile of neighbours
SHARES = 16  # of the tokens that list a block, over all key heads: its list may be by far the longest
FAR = 2**31  # numbers, from a key head's first query to its last one, that do not fit 32 bits


class Tiling(NamedTuple):
    """keys: in a tile, at most. rows: of queries, at least."""

    keys: int
    warps: int
    stages: int
    rows: int = LEAST


# Of the kernels attend, queries and keys, by the wider of head_dim and v_head_dim, at most.
TILINGS = {
    64: (Tiling(64, 4, 3), Tiling(64, 4, 3), Tiling(64, 4, 3, rows=64)),
    128: (Tiling(32, 2, 3), Tiling(32, 2, 3), Tiling(64, 4, 3, rows=32)),
    256: (Tiling(32, 4, 3), Tiling(32, 4, 3), Tiling(32, 4, 3, rows=32)),
}


@dataclass(frozen=True, eq=False)
class Tokens:
    """The blocks that were chosen: indices and counts of key heads, contiguous."""

    blocks: Blocks
    key_block: int


Chosen = Others | Tokens


def pay(form: Selection, x: Inputs, blocks: Blocks) -> bool:
    """Whether it can be done so, and takes less time than tiles that unite the lists of their queries, as far as sizes
    tell: these compute at most with all that they see, which is half of it on average where there is a mask."""
    number, (_, _, lists, width), group = cdiv(x.kv_len, form.key_block), blocks.indices.shape, x.heads // x.kv_heads
    seen = number if form.scores.mask is None else number / 2
    united = min(seen, width * min(lists, TILE)) * group
    return width * COST * max(group, LEAST) < united and able(form, x)


def able(form: Selection, x: Inputs) -> bool:
    """Lists of tokens, the same for the heads of a key head, and a softmax with no mask but a causal one."""
    scores = form.scores
    known = scores.normaliser == "softmax" and scores.sink is None and not scores.program.has_score
    known = known and (scores.mask is None or scores.program.key == CAUSAL) and x.dropout is None
    known = known and x.q.numel() > 0 and x.k.numel() > 0 and x.v.numel() > 0
    return known and form.together and form.query_block == 1 and form.key_block in KEY_BLOCKS


def chosen_of(form: Selection, x: Inputs, blocks: Blocks) -> Tokens:
    """Of what `form` chose for x."""
    group = x.heads // x.kv_heads
    return Tokens(
        Blocks(blocks.indices[:, ::group].contiguous(), blocks.counts[:, ::group].contiguous()), form.key_block
    )


def run(form: Scores, x: Inputs, chosen: Tokens) -> tuple[Tensor, Tensor]:
    """As forward.run."""
    q, k, v = _rows(x.q), _rows(x.k), _rows(x.v)
    o = quick.empty((x.batch, x.heads, x.q_len, x.v_head_dim), q.dtype, q.device)
    lse = quick.empty((x.batch, x.heads, x.q_len), torch.float32, q.device)
    tiling, *_ = tilings_of(x)
    arguments = (
        o, lse, q, k, v, *_lists(chosen), x.q_len, *_sizes(x), *_steps(q, k, v, o), *_widths(x),
        *_tile(form, x, chosen, tiling),
    )  # fmt: skip
    _launch(tokens.attend, x.q_len * x.kv_heads * x.batch, arguments, tiling)
    return o, lse


def gradients(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: tuple[bool, bool, bool],
    chosen: Tokens,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As backward.run. The gradients of keys and values are summed in float32."""
    q, k, v, do = _rows(x.q), _rows(x.k), _rows(x.v), _rows(do)
    with torch.cuda.device_of(q):
        top, delta = backward.prepared(o, lse, do, dlse)
    given = q, k, v, do, top, delta
    dq = _of_queries(form, x, given, chosen) if needed[0] else None
    dk, dv = _of_keys(form, x, given, chosen) if needed[1] or needed[2] else (None, None)
    return dq, dk if needed[1] else None, dv if needed[2] else None


def _of_queries(form: Scores, x: Inputs, given: tuple[Tensor, ...], chosen: Tokens) -> Tensor:
    q, k, v, do, top, _ = given
    dq = quick.empty(tuple(q.shape), q.dtype, q.device)
    _, tiling, _ = tilings_of(x)
    arguments = (
        dq, *given, *_lists(chosen), x.q_len, top.shape[2], *_sizes(x), *_steps(q, k, v, do, dq), *_widths(x),
        *_tile(form, x, chosen, tiling),
    )  # fmt: skip
    _launch(tokens.queries, x.q_len * x.kv_heads * x.batch, arguments, tiling)
    return dq


def _of_keys(form: Scores, x: Inputs, given: tuple[Tensor, ...], chosen: Tokens) -> tuple[Tensor, Tensor]:
    q, k, v, do, top, _ = given
    *_, tiling = tilings_of(x)
    group, key_blocks, lines = x.heads // x.kv_heads, cdiv(x.kv_len, chosen.key_block), x.batch * x.kv_heads
    listed, begins = transposed(chosen.blocks.indices, chosen.blocks.counts, key_blocks)
    heads, keys, shares = 1 << (group - 1).bit_length(), min(chosen.key_block, tiling.keys), max(1, SHARES // lines)
    far = max((group - 1) * t.stride(1) + x.q_len * t.stride(2) for t in (q, do)) >= FAR
    dk, dv = (quick.empty((shares, *t.shape), torch.float32, t.device) for t in (k, v))
    arguments = (
        dk, dv, *given, listed, begins, key_blocks, x.q_len, top.shape[2], x.kv_len, row_start(x.q_positions), lines,
        x.kv_heads, group, float(x.scale), *_steps(q, k, v, do), *_widths(x), heads, max(1, tiling.rows // heads),
        chosen.key_block, keys, shares, form.program.has_mask, far,
    )  # fmt: skip
    _launch(tokens.keys, lines * shares * key_blocks * (chosen.key_block // keys), arguments, tiling)
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def tilings_of(x: Inputs) -> tuple[Tiling, Tiling, Tiling]:
    widest = max(x.q.shape[3], x.v_head_dim)
    return next(tilings for width, tilings in TILINGS.items() if widest <= width)


# ---- arguments, in the kernels' order ----


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _lists(chosen: Tokens) -> tuple[Tensor, Tensor, int]:
    return chosen.blocks.indices, chosen.blocks.counts, chosen.blocks.indices.shape[3]


def _sizes(x: Inputs) -> tuple[Any, ...]:
    return x.kv_len, row_start(x.q_positions), x.kv_heads, x.heads // x.kv_heads, float(x.scale)


def _steps(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for t in tensors for step in t.stride()[:3])


def _widths(x: Inputs) -> tuple[int, ...]:
    return x.q.shape[3], x.v_head_dim, padded(x.q.shape[3]), padded(x.v_head_dim)


def _tile(form: Scores, x: Inputs, chosen: Tokens, tiling: Tiling) -> tuple[int, int, int, bool]:
    rows = max(tiling.rows, padded(x.heads // x.kv_heads))
    return rows, chosen.key_block, min(chosen.key_block, tiling.keys), form.program.has_mask


def _launch(entry: Any, programs: int, arguments: tuple[Any, ...], tiling: Tiling) -> None:
    with torch.cuda.device_of(arguments[0]):
        quick.launch(entry, programs, arguments, num_warps=tiling.warps, num_stages=tiling.stages)
