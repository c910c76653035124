"""core/picking.py and core/lists.py as operators of torch's, which torch.compile takes whole. An engine may register
kernels that do the same on a device of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.core import lists, picking

RULE = "SymInt query_block, SymInt key_block, SymInt offset, SymInt first, SymInt local"


def operator(function: Callable[..., Any], schema: str, like: Callable[..., Any]) -> Any:
    """like: makes empty tensors of the results' sizes from the same arguments."""
    name = f"manyheads::{function.__name__}"
    made = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    made.register_fake(like)
    return made


def _lists(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=torch.int32), like.new_empty(shape[:-1], dtype=torch.int32)


listed = operator(lists.listed, "(Tensor keep) -> (Tensor, Tensor)", lambda keep: _lists(keep, *keep.shape))
transposed = operator(
    lists.transposed,
    "(Tensor indices, Tensor counts, SymInt key_blocks) -> (Tensor, Tensor)",
    lambda indices, counts, key_blocks: (
        counts.new_empty(indices.numel(), dtype=torch.int32),
        counts.new_empty(indices.shape[0] * indices.shape[1] * key_blocks + 1, dtype=torch.int32),
    ),
)
heaviest = operator(
    picking.heaviest,
    "(Tensor mass, Tensor? share, SymInt least, bool first) -> Tensor",
    lambda mass, share, least, first: mass.new_empty(mass.shape, dtype=torch.bool),
)
best = operator(
    picking.best,
    "(Tensor likes, SymInt count) -> (Tensor, Tensor)",
    lambda likes, count: _lists(likes, *likes.shape[:-1], min(count, likes.shape[-1])),
)
best_past = operator(
    picking.best_past,
    f"(Tensor q, Tensor k, SymInt count, {RULE}) -> (Tensor, Tensor)",
    lambda q, k, count, *rule: _lists(q, *q.shape[:3], min(count, k.shape[2])),
)
fewest_past = operator(
    picking.fewest_past,
    f"(Tensor q, Tensor k, float scale, float share, SymInt least, {RULE}) -> (Tensor, Tensor)",
    lambda q, k, scale, share, least, *rule: _lists(q, *q.shape[:3], k.shape[2]),
)
best_windows = operator(
    picking.best_windows,
    "(Tensor q, Tensor k, float scale, SymInt count, SymInt dense, SymInt together, SymInt kernel, SymInt stride, "
    f"{RULE}) -> (Tensor, Tensor)",
    lambda q, k, scale, count, dense, together, kernel, stride, *rule: _lists(
        q, q.shape[0], q.shape[1] // together, q.shape[2], picking.windows_width(q.shape[2], count, dense, *rule)
    ),
)
stripes = operator(
    picking.stripes,
    "(Tensor q, Tensor k, float scale, SymInt size) -> Tensor",
    lambda q, k, scale, size: q.new_empty(
        2, *q.shape[:2], (k.shape[2] + size - 1) // size, dtype=torch.promote_types(q.dtype, torch.float32)
    ),
)


def _means(x: Tensor, size: int, start: int) -> Tensor:
    blocks = (start % size + x.shape[-2] + size - 1) // size
    return x.new_empty(*x.shape[:-2], blocks, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _keep(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    x, ctx.size, start = inputs
    ctx.length, ctx.before, ctx.dtype = x.shape[-2], start % ctx.size, x.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    block = (torch.arange(ctx.length, device=grad.device) + ctx.before) // ctx.size
    sizes = grad.new_zeros(grad.shape[-2]).index_add(0, block, grad.new_ones(ctx.length))
    return (grad / sizes[:, None]).index_select(-2, block).to(ctx.dtype), None, None


block_means = operator(picking.block_means, "(Tensor x, SymInt size, SymInt start) -> Tensor", _means)
block_means.register_autograd(_differentiate, setup_context=_keep)
