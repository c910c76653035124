"""What picking.py, crossing.py, lists.py, low_bits.py, sorting.py, tournaments.py and within.py here do as operators of
torch's, which torch.compile takes whole. An engine may register kernels that do the same on a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from manyheads.core import crossing, lists, low_bits, picking, sorting, tournaments, within

RULE = "SymInt query_block, SymInt key_block, SymInt offset, SymInt first, SymInt local"


@dataclass(frozen=True, eq=False)
class Operator:
    """made: torch's, which torch.compile, gradients and who watches operators take. What needs none of it is called
    directly: an operator takes a GPU's host longer than a short kernel."""

    made: Any
    function: Callable[..., Any]
    kernels: dict[str, Callable[..., Any]]  # by type of device

    def __call__(self, *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if watched or any(type(t) is not Tensor for t in tensors) or _learn(tensors):
            return self.made(*arguments)
        return self.kernels.get(tensors[0].device.type, self.function)(*arguments)

    def register_kernel(self, device: str, kernel: Callable[..., Any]) -> None:
        self.kernels[device] = kernel
        self.made.register_kernel(device)(kernel)


def operator(function: Callable[..., Any], schema: str, like: Callable[..., Any]) -> Operator:
    """like: makes empty tensors of the results' sizes from the same arguments."""
    name = f"manyheads::{function.__name__}"
    made = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    made.register_fake(like)
    return Operator(made, function, {})


def _learn(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _lists(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=torch.int32), like.new_empty(shape[:-1], dtype=torch.int32)


def _blocks(length: int, size: int) -> int:
    return (length + size - 1) // size


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
tournament = operator(
    tournaments.tournament,
    "(Tensor q, Tensor k, SymInt count, SymInt query_stride, SymInt key_stride, SymInt query_block, SymInt key_block, "
    "SymInt offset) -> (Tensor, Tensor)",
    lambda q, k, count, query_stride, key_stride, query_block, key_block, offset: _lists(
        q, *q.shape[:2], _blocks(k.shape[2], query_block) - offset // query_block,
        tournaments.lists_width(_blocks(k.shape[2], key_block), count, query_block, key_block),
    ),
)  # fmt: skip
by_four_bits = operator(
    low_bits.by_four_bits,
    "(Tensor q, Tensor k, float scale, float least, SymInt sink, SymInt near, SymInt query_block, SymInt key_block, "
    "SymInt offset) -> (Tensor, Tensor)",
    lambda q, k, scale, least, sink, near, query_block, key_block, offset: _lists(
        q, *q.shape[:2], _blocks(k.shape[2], query_block) - offset // query_block, _blocks(k.shape[2], key_block)
    ),
)
stripes = operator(
    picking.stripes,
    "(Tensor q, Tensor k, float scale, SymInt size) -> Tensor",
    lambda q, k, scale, size: q.new_empty(
        2, *q.shape[:2], (k.shape[2] + size - 1) // size, dtype=torch.promote_types(q.dtype, torch.float32)
    ),
)

heaviest_stripes = operator(
    crossing.heaviest_stripes,
    "(Tensor q, Tensor k, Tensor mass, float scale, float share, float near, SymInt least) -> (Tensor, Tensor)",
    lambda q, k, mass, *_: (mass.new_empty(mass.shape, dtype=torch.bool), mass.new_empty(*mass.shape[1:3], 1)),
)
heaviest_cells = operator(
    crossing.heaviest_cells,
    "(Tensor q, Tensor k, float scale, Tensor share, SymInt size, SymInt offset) -> Tensor",
    lambda q, k, scale, share, size, offset: q.new_empty(
        *q.shape[:2], _blocks(offset % size + q.shape[2], size), k.shape[2], dtype=torch.bool
    ),
)
crossed = operator(
    crossing.crossed,
    "(Tensor columns, Tensor diagonals, Tensor cells, Tensor share, SymInt first) -> (Tensor, Tensor)",
    lambda columns, diagonals, cells, *_: _lists(cells, *cells.shape),
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
block_means.made.register_autograd(_differentiate, setup_context=_keep)


# ---- hash and sort ----

hashed = operator(
    sorting.hashed,
    "(Tensor q, Tensor k, Tensor g) -> (Tensor, Tensor)",
    lambda q, k, g: (q.new_empty(q.shape[:3], dtype=torch.int32), k.new_empty(k.shape[:3], dtype=torch.int32)),
)
in_order = operator(
    sorting.in_order,
    "(Tensor ranks, SymInt many) -> (Tensor, Tensor)",
    lambda ranks, many: (torch.empty_like(ranks), torch.empty_like(ranks)),
)
BLOCKS = "(Tensor x, Tensor order, Tensor places, SymInt blocks, SymInt size, SymInt group) -> Tensor"
to_blocks = operator(
    sorting.to_blocks,
    BLOCKS,
    lambda x, order, places, blocks, size, group: x.new_empty(x.shape[0], x.shape[1] * blocks, size, x.shape[3]),
)
from_blocks = operator(sorting.from_blocks, BLOCKS, lambda x, order, *_: x.new_empty(*order.shape, x.shape[3]))


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.order = inputs


to_blocks.made.register_autograd(
    lambda ctx, grad: (from_blocks(grad.contiguous(), *ctx.order), *[None] * 5), setup_context=_keep_order
)
from_blocks.made.register_autograd(
    lambda ctx, grad: (to_blocks(grad.contiguous(), *ctx.order), *[None] * 5), setup_context=_keep_order
)


# ---- attention inside of a Function ----

attended = operator(
    within.attended,
    "(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? of_q, Tensor? of_k) -> (Tensor, Tensor)",
    lambda q, k, v, *_: (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
)
attended_gradients = operator(
    within.attended_gradients,
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor dlse, float scale, bool causal, "
    "Tensor? of_q, Tensor? of_k) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)


def _keep_attended(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, causal, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, *numbers)
    ctx.scale, ctx.causal = scale, causal


def _differentiate_attended(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *made, of_q, of_k = ctx.saved_tensors
    return *attended_gradients(*made, do, dlse, ctx.scale, ctx.causal, of_q, of_k), *[None] * 4


attended.made.register_autograd(_differentiate_attended, setup_context=_keep_attended)
