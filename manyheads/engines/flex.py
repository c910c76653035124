"""torch's FlexAttention, with the tile map from intervals in place of a mask that would be built first.

What is compiled is keyed on the traced function's structure and the shapes, each key with a code object of its own, so
that torch's limit of recompilations, behind which it would materialise the scores, is never reached. Numbers and
tensors inside the functions are arguments: a new window compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from manyheads.core.expressions import EMPTY, FULL, PARTIAL, Number, Program
from manyheads.core.forms import Form, Scores
from manyheads.core.inputs import Inputs, as_range, as_rows
from manyheads.core.merge import merge
from manyheads.core.rows import unseen
from manyheads.core.tiling import position_operands

TILE = 128


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    if not isinstance(form, Scores):
        return f"FlexAttention has no {type(form).__name__}"
    if form.normaliser != "softmax":
        return f"FlexAttention has no {form.normaliser!r} normaliser"
    if x.dropout is not None:
        return "FlexAttention has no dropout"
    if x.q.dtype == torch.float64:
        return "FlexAttention does not compile for float64"
    if x.q.device.type not in ("cpu", "cuda"):
        return f"FlexAttention runs on CPUs and CUDA GPUs, not on {x.q.device.type}"
    if x.q.device.type == "cpu" and x.wants_grad:
        return "FlexAttention has no backward on a CPU, and refuses inputs that require a gradient"
    if x.q.device.type == "cpu" and (lse or form.sink is not None):
        return f"FlexAttention does not return the lse on a CPU{'' if lse else ', which a sink needs'}"
    if x.q.device.type == "cuda" and x.q.shape[3] < 16:
        return f"FlexAttention needs a head_dim of 16 or more on a GPU, not {x.q.shape[3]}"
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    if x.q.device.type == "cpu":
        return "on a CPU it compiles for seconds for each shape: ask for it by name"
    if x.q_len < TILE:
        return "it compiles anew for each length of a growing cache: ask for it by name"
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """(o, lse), or (o, None) on a CPU. The first call of a structure and shape compiles."""
    assert isinstance(form, Scores), "why_not said so"
    program, device = form.program, x.q.device
    operands = position_operands(form, x)
    tiles = program.tiles(
        as_range(x.q_positions), as_range(x.kv_positions), (TILE, TILE), x.batch, x.heads, device=device, **operands
    )  # fmt: skip
    partial = tiles == PARTIAL
    if x.kv_len % TILE:  # the last tile sticks out of the keys: let the mask see to it
        partial[..., -1] |= tiles[..., -1] == FULL
    full = (tiles != EMPTY) & ~partial
    lists = (*_lists(partial), *_lists(full))
    numbers = tuple(torch.tensor(n, device=device, dtype=_number_type(n)) for n in program.numbers)
    tensors = tuple(t.to(device) for t in program.tensors)
    q_at, kv_at = as_rows(x.q_positions, device), as_rows(x.kv_positions, device)
    key = (program.key, x.q.shape, x.k.shape, x.v.shape, x.q.dtype, device, x.wants_grad, tuple(operands))
    if key not in _COMPILED:
        _COMPILED[key] = _compile(program, lse=device.type == "cuda")
    o, lse = _COMPILED[key](x.q, x.k, x.v, x.scale, q_at, kv_at, lists, numbers, tensors, operands)
    if lse is not None:
        o = torch.where(lse.isneginf()[..., None], 0.0, o)
    if form.sink is not None and lse is not None:  # one more key, whose value is zero
        o, lse = merge((o, lse), (torch.zeros_like(o), unseen(form, x)))
    return o.to(x.q.dtype), lse


def _lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [batch, heads, query tiles] and indices [.., key tiles] of a tile map, as FlexAttention has them."""
    order = torch.argsort((~tiles).to(torch.uint8), dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _number_type(n: Number) -> torch.dtype:
    return torch.float32 if isinstance(n, float) else torch.int64


_COMPILED: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor | None]]] = {}


def _compile(program: Program, lse: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """FlexAttention compiled for one structure. torch counts recompilations by code object: this one has its own, and
    the structure is a default of it, since a partial would share torch's wrapper with all others."""
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__, (program, lse))
    return torch.compile(own, dynamic=False, fullgraph=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, q_at: Tensor, kv_at: Tensor, lists: tuple[Tensor, ...],
    numbers: tuple[Tensor, ...], tensors: tuple[Tensor, ...], operands: dict[str, Tensor], program: Program, lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    bound = program.rebind(numbers, tensors)
    rows_q, rows_kv = q_at.shape[0], kv_at.shape[0]

    def at(b: Tensor, n: Tensor, positions: Tensor, rows: int) -> Tensor:
        return positions[b if rows > 1 else 0, n.clamp(max=positions.shape[1] - 1)]

    def mask_mod(b: Tensor, h: Tensor, n: Tensor, m: Tensor) -> Tensor:
        i, j = at(b, n, q_at, rows_q), at(b, m, kv_at, rows_kv)
        return bound.mask(b, h, i, j, **operands) & (i >= 0) & (j >= 0) & (m < k.shape[2])

    def score_mod(s: Tensor, b: Tensor, h: Tensor, n: Tensor, m: Tensor) -> Tensor:
        return bound.score(s, b, h, at(b, n, q_at, rows_q), at(b, m, kv_at, rows_kv), **operands)

    blocks = BlockMask.from_kv_blocks(
        lists[0], lists[1], lists[2], lists[3], BLOCK_SIZE=TILE, mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
    )  # fmt: skip
    found: Any = flex_attention(
        q, k, v, score_mod=score_mod if bound.has_score else None, block_mask=blocks, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True) if lse else None,
    )  # fmt: skip
    return (found[0], found[1].lse) if lse else (found, None)
