"""torch's scaled_dot_product_attention, over the keys that intervals and block lists leave.

Grouped heads are folded into the queries instead of repeating keys; a mask is built for partial tiles only, a chunk of
queries at a time, and once more in the backward pass. Where blocks were chosen each block of queries gets keys of its
own, gathered for some of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from manyheads.core.eagerly import eagerly
from manyheads.core.expressions import EMPTY, FULL, PARTIAL, Program
from manyheads.core.forms import Blocks, Form, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import Chunk, choose, chunks, plain, position_operands, row_start, seen_pairs, tile_map

LEAST = 32  # queries in a block, for which gathering keys pays
AT_ONCE = 2**18  # pairs of query and key, for each thread: keys, values and scores stay in its cache
LARGER = 4  # times as many where a backward pass adds to the gradients of all keys for each call


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    if lse:
        return "scaled_dot_product_attention keeps its lse to itself"
    inner = form.scores if isinstance(form, Selection) else form
    if not isinstance(inner, Scores):
        return f"scaled_dot_product_attention has no {type(form).__name__}"
    if inner.program.has_score:
        return "scaled_dot_product_attention takes no score function"
    if inner.normaliser != "softmax":
        return f"scaled_dot_product_attention has no {inner.normaliser!r} normaliser"
    if inner.sink is not None:
        return "scaled_dot_product_attention has no sinks"
    if x.dropout is not None:
        return "scaled_dot_product_attention's dropout takes no seed"
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    if x.q.device.type == "cuda" and x.q_len >= 1024 and isinstance(form, Scores) and not plain(form, x):
        return "it needs a call and a mask for every 128 queries; FlexAttention does this in one kernel"
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, None]:
    """(o, None): scaled_dot_product_attention keeps its lse to itself."""
    assert isinstance(form, Scores | Selection), "why_not said so"
    if isinstance(form, Scores) and plain(form, x):
        return _grouped(x, is_causal=form.program.has_mask), None
    return (COMPILED if torch.compiler.is_compiling() else _in_parts)(form, x)[0], None


def _in_parts(form: Scores | Selection, x: Inputs) -> tuple[Tensor, None]:
    gathers = isinstance(form, Selection) and form.query_block >= LEAST and x.batch and x.q_len and x.kv_len
    o = _by_lists(form, x) if gathers else _by_chunks(form, x)  # type: ignore[arg-type]  a Selection
    if not o.requires_grad and x.wants_grad and any(t.requires_grad for t in (x.q, x.k, x.v)):
        # Nothing is seen by anyone: let a backward pass find its way.
        o = x.nothing()
    return o, None


def _by_chunks(form: Scores | Selection, x: Inputs) -> Tensor:
    o = x.q.new_zeros(x.batch, x.heads, x.q_len, x.v_head_dim)
    for chunk in chunks(form, x):
        own = x, chunk
        o[:, :, chunk.rows] = checkpoint(_folded, *own, use_reentrant=False) if x.wants_grad else _folded(*own)
    return o


COMPILED = eagerly("sdpa", _in_parts, has_lse=False)


def again(form: Form, x: Inputs) -> Callable[[Sequence[Tensor]], tuple[Tensor, None]] | None:
    """What `run` does, for other q, k and v like those of x; None if it is more than one call."""
    if not isinstance(form, Scores) or not plain(form, x):
        return None
    is_causal, scale, shared = form.program.has_mask, x.scale, x.heads != x.kv_heads

    def run_again(tensors: Sequence[Tensor]) -> tuple[Tensor, None]:
        q, k, v, *_ = tensors
        return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal, enable_gqa=shared), None

    return run_again


def _grouped(x: Inputs, is_causal: bool) -> Tensor:
    shared = x.heads != x.kv_heads
    return scaled_dot_product_attention(x.q, x.k, x.v, scale=x.scale, is_causal=is_causal, enable_gqa=shared)


def _folded(x: Inputs, chunk: Chunk) -> Tensor:
    """The queries of a group stand one below the other before the head they share."""
    q = x.q[:, :, chunk.rows]
    batch, heads, rows, _ = q.shape
    group = heads // x.kv_heads
    allowed = chunk.allowed
    seen = None
    if allowed is not None:
        # A row that sees no key would be NaN, or a mean, depending on torch's kernel: let it see all, then zero it.
        seen = allowed.any(-1, keepdim=True)
        allowed = allowed | ~seen
        if allowed.shape[1] == 1:
            allowed = allowed.expand(-1, group, -1, -1).reshape(allowed.shape[0], 1, group * rows, -1)
        else:
            allowed = allowed.reshape(allowed.shape[0], x.kv_heads, group * rows, -1)
    o = scaled_dot_product_attention(
        q.reshape(batch, x.kv_heads, group * rows, -1), chunk.pick(x.k), chunk.pick(x.v), allowed, scale=x.scale
    )
    o = o.reshape(batch, heads, rows, -1)
    return o if seen is None else torch.where(seen, o, 0.0)


# ---- blocks that were chosen ----


class _Lists(NamedTuple):
    """What blocks of queries look at, a list for each, of one length.

    b, h, n: batch rows, heads and numbers of the blocks of queries, [lists]. at [lists, all]: where its blocks are
    among those of all keys, in front what is seen whole. others: the numbers of the rest, [lists, some].
    """

    b: Tensor
    h: Tensor
    n: Tensor
    at: Tensor
    others: Tensor


def _by_lists(form: Selection, x: Inputs) -> Tensor:
    """Lists of equal lengths are computed together, so that none is padded."""
    program, operands, device = form.scores.program, position_operands(form.scores, x), x.q.device
    blocks, start = choose(form, x), row_start(x.q_positions)
    count = blocks.counts.shape[2]
    size, ahead = (form.query_block, start % form.query_block) if count > 1 else (x.q_len, 0)
    ends, cut = (ahead, count * size - ahead - x.q_len), (0, -x.kv_len % form.key_block)
    i = pad(torch.arange(start, start + x.q_len, device=device), ends, value=-1)
    j = pad(torch.arange(x.kv_len, device=device), cut, value=-1)
    tiles = tile_map(program, x, i, j, (size, form.key_block), operands).to(device)
    full, partial, listed = _sorted(blocks, tiles.expand(x.batch, x.heads, -1, -1))
    at = i.view(-1, size), j.view(-1, form.key_block)

    n, b, h = torch.cartesian_prod(*(torch.arange(end, device=device) for end in (count, x.batch, x.heads))).T
    first = (b * x.kv_heads + h * x.kv_heads // x.heads) * len(at[1])
    lengths, order = (full * (listed.shape[1] + 1) + partial).sort(stable=True)
    lengths, numbers = lengths.unique_consecutive(return_counts=True)
    pieces, room = [], AT_ONCE * torch.get_num_threads() * (LARGER if x.wants_grad else 1)
    for length, alike in zip(lengths.tolist(), order.split(numbers.tolist()), strict=True):
        whole, some = divmod(length, listed.shape[1] + 1)
        for own in alike.split(max(1, room // (size * form.key_block * max(1, whole + some)))):
            found = listed[own, : whole + some]
            pieces.append(_Lists(b[own], h[own], n[own], first[own, None] + found, found[:, whole:]))

    keys, values = (_cut(t, cut, form.key_block) for t in (x.k, x.v))
    places = ((b * x.heads + h) * count + n)[order]
    queries, counts = _cut(x.q, ends, size), [len(lists.n) for lists in pieces]
    rest = keys, values, at, program, x.scale, operands
    if x.wants_grad:
        sorted_queries = queries.index_select(0, places).split(counts)
        parts = [
            checkpoint(_listed, q, lists, *rest, use_reentrant=False)
            for q, lists in zip(sorted_queries, pieces, strict=True)
        ]
        o = torch.cat(parts).index_select(0, places.argsort())
    else:
        o = x.q.new_empty(len(places), size, x.v_head_dim)
        for own, lists in zip(places.split(counts), pieces, strict=True):
            o.index_copy_(0, own, _listed(queries.index_select(0, own), lists, *rest))
    return o.unflatten(0, (x.batch, x.heads, -1)).flatten(2, 3)[:, :, ahead : ahead + x.q_len].contiguous()


def _sorted(blocks: Blocks, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each list how many of its blocks are full and how many partial, [lists], and the blocks in this order, [lists,
    n]. Lists are ordered by the block of queries, the batch row and the head."""
    meant = torch.arange(blocks.indices.shape[-1], device=tiles.device) < blocks.counts[..., None]
    listed = torch.where(meant, blocks.indices.long(), 0)
    states, order = torch.where(meant, tiles.gather(-1, listed), EMPTY).sort(dim=-1, descending=True, stable=True)
    full, partial = ((states == state).sum(-1).permute(2, 0, 1).flatten() for state in (FULL, PARTIAL))
    return full, partial, listed.gather(-1, order).permute(2, 0, 1, 3).flatten(0, 2)


def _cut(t: Tensor, ends: tuple[int, int], size: int) -> Tensor:
    """Blocks [batch * heads * blocks, size, dim] of t [batch, heads, len, dim]."""
    return (pad(t, (0, 0, *ends)) if any(ends) else t).unflatten(2, (-1, size)).flatten(0, 2)


def _listed(
    q: Tensor, lists: _Lists, keys: Tensor, values: Tensor, at: tuple[Tensor, Tensor], program: Program, scale: float,
    operands: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """q [lists, size, head_dim]; keys and values [blocks, key_block, dim], all there are; at: the positions in the
    blocks of queries and of keys, [blocks, size], -1 where there is no token."""
    if not lists.at.shape[1]:
        return q.new_zeros(*q.shape[:2], values.shape[2])
    k, v = (t.index_select(0, lists.at.flatten()).view(len(q), 1, -1, t.shape[2]) for t in (keys, values))
    bias = seen = None
    if lists.others.shape[1]:
        # Several heads often have the same block of queries and of keys: once for all of them.
        depends, none = program.mask_depends, torch.zeros_like(lists.n)
        b, h = lists.b if "b" in depends else none, lists.h if "h" in depends else none
        (b, h, n, *others), same = torch.stack([b, h, lists.n, *lists.others.T]).unique(dim=1, return_inverse=True)
        i, j = at[0][n][:, None, :, None], at[1][torch.stack(others, 1)].flatten(1)[:, None, None]
        allowed = seen_pairs(program, b.view(-1, 1, 1, 1), h.view(-1, 1, 1, 1), i, j, operands)
        whole = k.shape[2] - j.shape[3]
        if not whole:  # some may see nothing: let them see all, then zero them, as in _folded
            seen = allowed.any(-1, keepdim=True)
            allowed, seen = allowed | ~seen, seen[same]
        bias = q.new_zeros(*k.shape[:2], q.shape[1], k.shape[2])
        bias[..., whole:] = torch.where(allowed, 0.0, -torch.inf).to(q.dtype)[same]
    o = scaled_dot_product_attention(q[:, None], k, v, bias, scale=scale)
    return (o if seen is None else torch.where(seen, o, 0.0))[:, 0]
