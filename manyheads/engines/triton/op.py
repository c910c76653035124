"""The kernels as operators of torch's, for torch.compile: attend, and its backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.core.attending import Scored, operators, with_captured
from manyheads.core.forms import Blocks, Scores, Selection
from manyheads.core.inputs import Inputs, as_rows
from manyheads.core.selection import as_scores

if TYPE_CHECKING:
    from manyheads.engines.triton.hopper import Chosen


def attend(form: Scored, x: Inputs, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
    """(o, lse). blocks: what a selection chose."""
    from manyheads.engines.triton import launch

    return launch.attend(*as_launched(form, x, blocks))


def as_launched(
    form: Scored, x: Inputs, blocks: Blocks | None, by_map: bool = False
) -> tuple[Scores, Inputs, Chosen | None]:
    """What kernels take: a selection's blocks as lists, or, if that is not possible or `by_map`, as a map."""
    from manyheads.engines.triton import hopper

    if isinstance(form, Scores):
        return form, x, None
    assert blocks is not None, "a selection chooses first"
    if not by_map and hopper.why_no_lists(form, x) is None:
        return form.scores, x, hopper.chosen_of(form, x, blocks)
    scores, x = as_scores(form, x, blocks)
    return with_captured(scores, [*form.scores.program.tensors]), x, None  # type: ignore[return-value]  it stays Scores


def backward(
    form: Scored, x: Inputs, blocks: Blocks | None, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
    needed: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of q, k, v, the captured tensors and the operands; None where they are not needed, or zero."""
    from manyheads.engines.triton import launch

    x = x.with_(q=launch._rows(x.q), k=launch._rows(x.k), v=launch._rows(x.v))
    inner = form.scores if isinstance(form, Selection) else form
    names: list[int | str] = [*range(len(inner.program.tensors)), *form.operands]
    wanted = [name for name, need in zip(names, needed[3:], strict=True) if need]
    read = {gradient.source for gradient in inner.program.derivative().gradients} if wanted else set()
    sources = [name for name in wanted if name in read]
    scores, x, chosen = as_launched(form, x, blocks, by_map=bool(sources))
    heads = launch.of_heads(scores)
    products, dheads, found = launch.run_backward(
        scores, x, o, lse, do, dlse, launch.hopper.why_not(scores, x) is None, (needed[0], needed[1], needed[2]),
        heads in wanted, sources, chosen,
    )  # fmt: skip
    found = {name: grad if isinstance(name, int) else _stored(grad, name, form, x) for name, grad in found.items()}
    if heads is not None and dheads is not None:
        found[heads] = dheads.to(x.operands[heads].dtype)
    return [*products, *map(found.get, names)]


def _stored(grad: Tensor, name: str, form: Scored, x: Inputs) -> Tensor:
    """From where tokens stand to where they are stored: what position_operands did, turned round."""
    value, names = x.operands[name], form.operands[name].names
    if "len" not in names or (not isinstance(x.kv_positions, Tensor) and x.kv_positions.start == 0):
        return grad
    shape = [1] * value.ndim
    at, dim = as_rows(x.kv_positions, value.device), names.index("len")
    shape[0], shape[dim] = at.shape
    at = at.view(shape).expand(value.shape)
    return torch.where(at < 0, 0.0, grad.gather(dim, at.clamp(min=0)))


ATTEND = operators("attend", attend, backward)
