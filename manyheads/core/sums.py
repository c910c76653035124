"""What a Sum is made of: each part with its own operands and scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from manyheads.core.forms import Form, Sum
from manyheads.core.inputs import Inputs


def parts_of(form: Sum, x: Inputs) -> Iterator[tuple[Form, Inputs]]:
    """The parts, and what each is given. Raises ValueError if there are none."""
    if not form.parts:
        raise ValueError("a Sum needs at least one part")
    for part in form.parts:
        own = {name: x.operands[name] for name in part.operands}
        scale = x.scale / form.default_scale(x.q.shape[3]) * part.default_scale(x.q.shape[3])
        yield part, x.with_(operands=own, scale=scale)


def summed(form: Sum, x: Inputs, run: Callable[[Form, Inputs], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, None]:
    """o of all parts, each run by `run`, times their gates."""
    total = None
    for (part, own), gate in zip(parts_of(form, x), form.gates, strict=True):
        o, _ = run(part, own)
        if gate is not None:  # the queries' own gates: queries are a row's last tokens
            o = o * x.operands[gate][:, :, x.kv_len - x.q_len :, None].to(o.dtype)
        total = o if total is None else total + o
    assert total is not None
    return total, None
