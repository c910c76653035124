"""Attention and a state in one model: side by side in a layer; and how much a layer keeps of a text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from experiments.core import Mixer
from manyheads import get
from manyheads.core import Form, Operand, Recurrence, Scores, Sum
from manyheads.core.forms import one


def side_by_side(window: int) -> Sum:
    """Attention to the last keys and Kimi delta attention with the same queries, keys and values, each with a gate. The
    state is read by queries of length 1, so that it gives as much as attention does. No positions are rotated: it is
    the state that knows how long ago something was."""
    near, far = get("sliding_window")(window=window, sinks=0), replace(get("kimi_delta_attention")(), default_scale=one)
    gates = {name: Operand("batch heads len", torch.sigmoid) for name in ("near", "far")}
    return Sum(parts=(near, far), gates=("near", "far"), operands={**far.operands, **gates})


def kept(mixer: Mixer, tokens: int) -> int:
    """How many numbers a layer keeps after a text, to go on."""

    def of(form: Form) -> int:
        match form:
            case Sum():
                return sum(map(of, form.parts))
            case Recurrence():
                return mixer.heads * mixer.head_dim**2
            case Scores():
                return 2 * mixer.kv_heads * mixer.head_dim * in_sight(form, tokens)
        raise TypeError(f"what a {type(form).__name__} keeps is not counted here")

    return of(mixer.form)


def in_sight(form: Scores, tokens: int) -> int:
    """How many of the tokens before it the next one looks at."""
    zero, j = torch.zeros((), dtype=torch.long), torch.arange(tokens)
    seen: Tensor | bool = True if form.mask is None else form.mask(zero, zero, zero + tokens, j)
    return int(torch.as_tensor(seen).expand(tokens).sum())
