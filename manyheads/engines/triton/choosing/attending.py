"""Attention inside of Functions by the kernels that attention has, where they take it."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core import within
from manyheads.core.forms import Operand, Scores
from manyheads.core.inputs import Inputs
from manyheads.engines.triton import hopper

NUMBERS = {"of_q": Operand("batch heads 0"), "of_k": Operand("batch heads 0")}
FULL, CAUSAL = Scores(), Scores(mask=lambda b, h, i, j: j <= i)
APART = Scores(mask=lambda b, h, i, j, of_q, of_k: of_q[b, h, i] != of_k[b, h, j], operands=NUMBERS)


def attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, of_q: Tensor | None, of_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    form, x = _call(q, k, v, scale, causal, of_q, of_k)
    if form is None or hopper.why_not(form, x) is not None:
        return within.attended(q, k, v, scale, causal, of_q, of_k)
    with torch.cuda.device_of(q):
        return hopper.run(form, x)


def attended_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, scale: float, causal: bool,
    of_q: Tensor | None, of_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form, x = _call(q, k, v, scale, causal, of_q, of_k)
    if form is None or hopper.why_not(form, x) is not None:
        return within.attended_gradients(q, k, v, o, lse, do, dlse, scale, causal, of_q, of_k)
    with torch.cuda.device_of(q):
        return hopper.gradients(form, x, o, lse, do, dlse)  # type: ignore[return-value]  all are needed


def _call(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, of_q: Tensor | None, of_k: Tensor | None
) -> tuple[Scores | None, Inputs]:
    """No form for numbers and causal together."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (length, n), numbers = (q.shape[2], k.shape[2]), {}
    if of_q is not None and of_k is not None:  # float32 has all whole numbers that are no more than 2^24
        numbers = {"of_q": of_q.float(), "of_k": of_k.float()}
        form = None if causal else APART
    else:
        form = CAUSAL if causal else FULL
    start = n - length if causal else 0
    return form, Inputs(q, k, v, scale, range(start, start + length), range(n), numbers)
