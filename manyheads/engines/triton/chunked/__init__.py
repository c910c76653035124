"""Recurrences in chunks: a state is carried from chunk to chunk, and within a chunk tokens meet as in attention.

Work and memory are linear in length. A row is cut into segments that are walked side by side where batch and heads are
too few to fill a chip. States are float32; as operands of products they are rounded to the inputs' dtype, so in
float16 a state beyond 65504 is infinite. The same result every run, gradients included.

Yang, Wang, Shen, Panda, Kim. "Gated Linear Attention Transformers with Hardware-Efficient Training." 2023.
arXiv:2312.06635. Yang, Wang, Zhang, Shen, Kim. "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length." 2024. arXiv:2406.06484.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyheads.core.forms import Recurrence
from manyheads.core.inputs import Inputs
from manyheads.core.recurrence import is_direct, key_width, recur, state_shape
from manyheads.engines.triton.chunked import op
from manyheads.engines.triton.chunked.by_value import by_value

LARGEST_HEAD_DIM = 256
EVEN = {16, 32, 64, 128, 256}  # sizes that fill their tiles


def why_not(form: Recurrence, x: Inputs) -> str | None:
    if not form.causal:
        return "the Triton kernels take causal recurrences; the others are two matrix products, which eager has"
    if x.ragged:
        return "the Triton kernels take recurrences over whole rows, without absent tokens"
    if not x.q_len:
        return "the Triton kernels take recurrences that somebody reads: q_len is 0"
    unread = form.operands.keys() - {"g", "beta", "more_keys", "more_values"}
    if unread:
        return f"the Triton kernels read g, beta, more_keys and more_values, not {', '.join(sorted(unread))}"
    sizes = {key_width(form, x), x.v_head_dim, state_shape(form, x)[2]}  # the last: slots, where there are some
    if max(sizes) > LARGEST_HEAD_DIM:
        return f"the Triton kernels take features and slots up to {LARGEST_HEAD_DIM}, not {max(sizes)}"
    if x.q.device.type == "cuda" and x.q.element_size() == 2 and not sizes <= EVEN:
        # 72 and 24 in bfloat16 gave wrong gradients on an H100: docs/log.md.
        found = ", ".join(map(str, sorted(sizes)))
        return f"the Triton kernels take recurrences of 16, 32, ... {max(EVEN)} in 16 bits, not {found}"
    return None


def run(form: Recurrence, x: Inputs) -> tuple[Tensor, Tensor]:
    """o, and the state behind the last token, in float32."""
    if not (x.q.numel() and x.k.numel() and x.v.numel()):
        size = state_shape(form, x)
        return x.nothing(), x.q.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.float()
    if torch.compiler.is_compiling():
        return recur(form, x, op.recur, by_value, columns=min(EVEN))
    from manyheads.engines.triton.chunked import autograd

    return recur(form, x, autograd.recur, by_value, columns=min(EVEN))


def again(form: Recurrence, x: Inputs) -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]] | None:
    """`run` for other tensors like those of x; None while it is not known what it launches."""
    if x.ragged or not (x.q.numel() and x.k.numel() and x.v.numel()):
        return None
    from manyheads.engines.triton.chunked import autograd

    known = None
    if is_direct(form):
        known = autograd.known((x.q, x.k, x.v, x.operands.get("g"), x.operands.get("beta"), x.state), x.scale)
        if known is None:
            return None
    scale, at, has_state = x.scale, (x.q_positions, x.kv_positions), x.state is not None
    shapes = [(name, t.shape) for name, t in x.operands.items()]  # and keeps no tensor

    def run_again(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, *rest = tensors
        state = rest.pop() if has_state else None
        pairs = zip(shapes, rest, strict=True)
        operands = {name: t if t.shape == shape else t.expand(shape) for (name, shape), t in pairs}
        if known is None:
            return run(form, Inputs(q, k, v, scale, *at, operands, state))
        return autograd.recur(q, k, v, operands.get("g"), operands.get("beta"), state, scale, known)

    return run_again
