"""Recurrences in chunks: a state is carried from chunk to chunk, and within a chunk tokens meet as in attention.

Work and memory are linear in length. A row is cut into segments that are walked side by side where batch and heads are
too few to fill a chip. States are float32; as operands of products they are rounded to the inputs' dtype, so in
float16 a state beyond 65504 is infinite. The same result every run, gradients included.

Yang, Wang, Shen, Panda, Kim. "Gated Linear Attention Transformers with Hardware-Efficient Training." 2023.
arXiv:2312.06635. Yang, Wang, Zhang, Shen, Kim. "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length." 2024. arXiv:2406.06484.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import getclosurevars, isfunction

import torch
from torch import Tensor

from manyheads.core.forms import Recurrence, identity
from manyheads.core.inputs import Inputs

LARGEST_HEAD_DIM = 256
EVEN = {16, 32, 64, 128, 256}  # sizes that fill their tiles


def why_not(form: Recurrence, x: Inputs) -> str | None:
    if not form.causal:
        return "the Triton kernels take causal recurrences; the others are two matrix products, which eager has"
    if x.ragged:
        return "the Triton kernels take recurrences over whole rows, without absent tokens"
    if not x.q_len:
        return "the Triton kernels take recurrences that somebody reads: q_len is 0"
    if torch.compiler.is_compiling():
        return "the Triton kernels of recurrences are no operators of torch's, as torch.compile needs"
    unread = form.operands.keys() - {"g", "beta"}
    if unread:
        return f"the Triton kernels read g and beta, not {', '.join(sorted(unread))}"
    width = _width(form, x.kv_heads, x.q.shape[3], x.q.device)
    if width > LARGEST_HEAD_DIM:
        return f"the Triton kernels take features up to {LARGEST_HEAD_DIM}, not {width}"
    if x.q.device.type == "cuda" and x.q.element_size() == 2 and not {width, x.v_head_dim} <= EVEN:
        # 72 and 24 in bfloat16 gave wrong gradients on an H100: docs/log.md.
        return (
            f"the Triton kernels take recurrences of 16, 32, ... {max(EVEN)} in 16 bits, not {width} and {x.v_head_dim}"
        )
    return None


def run(form: Recurrence, x: Inputs) -> tuple[Tensor, Tensor]:
    """o, and the state behind the last token: float32 [batch, heads, head_dim, v_head_dim]."""
    from manyheads.engines.triton.chunked import autograd

    q, k = _featured(form.query_feature, x.q), _featured(form.key_feature, x.k)
    if not (q.numel() and k.numel() and x.v.numel()):
        size = x.batch, x.heads, k.shape[3], x.v_head_dim
        return x.nothing(), x.q.new_zeros(size, dtype=torch.float32) if x.state is None else x.state.float()
    with torch.cuda.device_of(q):
        return autograd.recur(q, k, x.v, log_decays(form, x), x.operands.get("beta"), x.state, x.scale)


def log_decays(form: Recurrence, x: Inputs) -> Tensor | None:
    """Of each token, [batch, heads, kv_len], or of its channels, with head_dim behind; None without any."""
    g = x.operands.get("g")
    if form.decay is None:
        return g
    constant = _constant(form, x.heads, x.q.device)[None, :, None]
    if g is None:
        return constant.expand(x.batch, -1, x.kv_len)
    return constant + g if g.ndim == 3 else constant[..., None] + g


def _constant(form: Recurrence, heads: int, device: torch.device) -> Tensor:
    """The log decay of each head. Computed once, unless the function reads tensors, which may change."""
    return (_computed.__wrapped__ if _reads(form) else _computed)(form, heads, device)


@lru_cache(256)
def _computed(form: Recurrence, heads: int, device: torch.device) -> Tensor:
    assert form.decay is not None, "log_decays looked"
    with torch.inference_mode(False):  # or it could not be used where gradients are wanted
        return form.decay(torch.arange(heads, device=device), heads).float()


@lru_cache(256)
def _reads(form: Recurrence) -> bool:
    if not isfunction(form.decay):  # a module, for instance
        return True
    seen = getclosurevars(form.decay)
    return any(isinstance(t, Tensor | torch.nn.Module) for t in (*seen.nonlocals.values(), *seen.globals.values()))


def _featured(feature: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return t if feature is identity else feature(t.float()).to(t.dtype)


@lru_cache(256)
def _width(form: Recurrence, kv_heads: int, head_dim: int, device: torch.device) -> int:
    """How many numbers a key has behind its feature."""
    if form.key_feature is identity:
        return head_dim
    return form.key_feature(torch.zeros(1, kv_heads, 1, head_dim, device=device)).shape[3]
