"""torch's scaled_dot_product_attention, over the keys that intervals and block lists leave.

Grouped heads are folded into the queries instead of repeating keys; a mask is built for partial tiles only, a chunk of
queries at a time, and once more in the backward pass. Where heads chose different blocks each gets keys of its own,
gathered for a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from manyheads.core.eagerly import eagerly
from manyheads.core.forms import Blocks, Form, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.selection import fixed
from manyheads.core.tiling import Chunk, choose, chunks, plain, position_operands, row_start, seen_pairs

LEAST = 32  # queries in a block, for which gathering keys pays


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
    return (COMPILED if torch.compiler.is_compiling() else _in_chunks)(form, x)[0], None


def _in_chunks(form: Scores | Selection, x: Inputs) -> tuple[Tensor, None]:
    if isinstance(form, Selection) and form.query_block >= LEAST and x.q_len and x.kv_len:
        blocks = choose(form, x)
        if _differ(blocks, -(-x.kv_len // form.key_block)):
            return _by_heads(form, x, blocks), None
        form = fixed(form, blocks)
    o = x.q.new_zeros(x.batch, x.heads, x.q_len, x.v_head_dim)
    again = x.wants_grad
    for chunk in chunks(form, x):
        o[:, :, chunk.rows] = checkpoint(_folded, x, chunk, use_reentrant=False) if again else _folded(x, chunk)
    if again and not o.requires_grad:  # nothing is seen by anyone: let a backward pass find its way
        o = x.nothing()
    return o, None


COMPILED = eagerly("sdpa", _in_chunks, has_lse=False)


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


# ---- heads that chose different blocks ----


def _differ(blocks: Blocks, key_blocks: int) -> bool:
    """Whether all heads together look at twice as much as one of them."""
    together = blocks.to_map(key_blocks).flatten(0, 1).any(0).sum()
    return bool(together > 2 * blocks.counts.flatten(0, 1).sum(-1).float().mean())


def _by_heads(form: Selection, x: Inputs, blocks: Blocks) -> Tensor:
    size, start, device = form.query_block, row_start(x.q_positions), x.q.device
    operands = position_operands(form.scores, x)
    cut = (0, 0, 0, -x.kv_len % form.key_block)
    keys, values = (pad(t, cut).unflatten(2, (-1, form.key_block)) for t in (x.k, x.v))
    parts = []
    for n in range(blocks.counts.shape[2]):
        first = (start // size + n) * size  # the position of the block's first query
        rows = slice(max(first - start, 0), min(first + size - start, x.q_len))
        i = torch.arange(start + rows.start, start + rows.stop, device=device).view(1, 1, -1, 1)
        own = x.q[:, :, rows], keys, values, blocks.indices[:, :, n], blocks.counts[:, :, n], i, form, x, operands
        parts.append(checkpoint(_gathered, *own, use_reentrant=False) if x.wants_grad else _gathered(*own))
    return torch.cat(parts, 2)


def _gathered(
    q: Tensor, keys: Tensor, values: Tensor, listed: Tensor, counts: Tensor, i: Tensor, form: Selection, x: Inputs,
    operands: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """Of one block of queries. keys, values: [batch, kv_heads, key blocks, key_block, dim]."""
    width = max(1, int(counts.max()))
    b = torch.arange(x.batch, device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(x.heads, device=q.device).view(1, -1, 1, 1)
    there = torch.arange(width, device=q.device) < counts[..., None]
    listed = torch.where(there, listed[..., :width].long(), 0)
    j = listed[..., None] * form.key_block + torch.arange(form.key_block, device=q.device)
    j = torch.where(there[..., None] & (j < x.kv_len), j, -1).flatten(2)[:, :, None]
    program = form.scores.program
    allowed = seen_pairs(program, b, h, i, j, operands) if program.has_mask else (i >= 0) & (j >= 0)
    seen = allowed.any(-1, keepdim=True)
    place = b[..., 0], h[..., 0] * x.kv_heads // x.heads, listed
    o = scaled_dot_product_attention(
        q, keys[place].flatten(2, 3), values[place].flatten(2, 3), allowed | ~seen, scale=x.scale
    )
    return torch.where(seen, o, 0.0)
