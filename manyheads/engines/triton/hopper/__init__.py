"""Hopper GPUs: kernels in Gluon, forward and backward, for any mask and score and any tiles of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from manyheads.core.forms import Form, Scores
from manyheads.core.inputs import Inputs

try:
    from manyheads.engines.triton.hopper import backward, forward
    from manyheads.engines.triton.hopper.launching import NORMALISERS, UNIT, WIDTHS
except (ImportError, AttributeError) as error:  # no triton, or one that renamed something
    MISSING = f"this Triton has no Gluon for Hopper that is known here ({error})"
else:
    MISSING = None


def why_not(form: Form, x: Inputs) -> str | None:
    """Why `run` cannot take it."""
    if MISSING:
        return MISSING
    if not isinstance(form, Scores):
        return f"the Hopper kernel has no {type(form).__name__}"
    if form.normaliser not in NORMALISERS:
        return f"the Hopper kernel has no {form.normaliser!r} normaliser"
    if x.q.device.type != "cuda" or torch.version.hip or _capability(x.q.device) != 9:
        return "the Hopper kernel needs a GPU of compute capability 9"
    if x.q.dtype not in (torch.bfloat16, torch.float16) or not x.q.dtype == x.k.dtype == x.v.dtype:
        return f"the Hopper kernel takes bfloat16 and float16, not {x.q.dtype}"
    if max(x.q.shape[3], x.v_head_dim) > WIDTHS[-1] or x.q.shape[3] % UNIT or x.v_head_dim % UNIT:
        given = f"{x.q.shape[3]} and {x.v_head_dim}"
        return (
            f"the Hopper kernel takes multiples of {UNIT} up to {WIDTHS[-1]} for head_dim and v_head_dim, not {given}"
        )
    if not all(isinstance(p, Tensor) or p.step == 1 for p in (x.q_positions, x.kv_positions)):
        return "the Hopper kernel needs consecutive positions, or a tensor of them"
    return None


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def run(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    """(o, lse), without gradients."""
    return forward.run(form, x)


def gradients(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv of what `run` gave; None for those that are not needed."""
    return backward.run(form, x, o, lse, do, dlse, needed)
