"""torch's scaled_dot_product_attention, over the keys that intervals and block lists leave.

Grouped heads are folded into the queries instead of repeating keys; a mask is built for partial tiles only, a chunk of
queries at a time, and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from manyheads.core.eagerly import eagerly
from manyheads.core.forms import Form, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import Chunk, chunks, plain


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
    o = x.q.new_zeros(x.batch, x.heads, x.q_len, x.v_head_dim)
    again = x.wants_grad
    for chunk in chunks(form, x):
        o[:, :, chunk.rows] = checkpoint(_folded, x, chunk, use_reentrant=False) if again else _folded(x, chunk)
    if again and not o.requires_grad:  # nothing is seen by anyone: let a backward pass find its way
        o = x.nothing()
    return o, None


COMPILED = eagerly("sdpa", _in_chunks, has_lse=False)


def again(form: Form, x: Inputs) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, None]] | None:
    """What `run` does, for other q, k and v like those of x; None if it is more than one call."""
    if not isinstance(form, Scores) or not plain(form, x):
        return None
    is_causal, scale, shared = form.program.has_mask, x.scale, x.heads != x.kv_heads

    def run_again(qkv: tuple[Tensor, ...]) -> tuple[Tensor, None]:
        q, k, v = qkv
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
