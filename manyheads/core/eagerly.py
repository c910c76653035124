"""Operators of engines that torch differentiates.

ATTEND = eagerly("eager", _scores); o, lse = ATTEND(form, x, blocks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from manyheads.core.attending import Operators, Scored, operators, rebound, scores_of
from manyheads.core.forms import Blocks
from manyheads.core.inputs import Inputs
from manyheads.core.selection import fixed

Run = Callable[[Scored, Inputs], tuple[Tensor, Tensor | None]]


def eagerly(name: str, run: Run, has_lse: bool = True) -> Operators:
    """manyheads::<name>; its backward pass computes the forward one once more."""

    def forward(form: Scored, x: Inputs, blocks: Blocks | None) -> tuple[Tensor, Tensor | None]:
        return run(form if blocks is None else fixed(form, blocks), x)

    def backward(
        form: Scored, x: Inputs, blocks: Blocks | None, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
        needed: list[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        tensors = x.q, x.k, x.v, *scores_of(form).program.tensors, *x.operands.values()
        q, k, v, *rest = leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, needed, strict=True)]
        captured = len(rest) - len(x.operands)
        x = x.with_(q=q, k=k, v=v, operands=dict(zip(x.operands, rest[captured:], strict=True)))
        with _autograd():
            found = forward(rebound(form, rest[:captured]), x, blocks)
            pairs = [(a, b) for a, b in zip(found, (do, dlse), strict=True) if a is not None and b is not None]
            outputs, gradients = zip(*pairs, strict=True)
            wanted = [leaf for leaf, want in zip(leaves, needed, strict=True) if want]
            made = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return [next(made) if want else None for want in needed]

    return operators(name, forward, backward, has_lse)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside of an operator, where torch has switched it off."""
    inside = torch._C
    off = inside._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        off = off.remove(getattr(inside.DispatchKey, key))
    with inside._ForceDispatchKeyGuard(inside._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield
