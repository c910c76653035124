"""Flash attention for any mask and score, as Triton kernels: forward and backward, on any GPU that Triton knows; and
recurrences in chunks (chunked/).

Which tiles of scores are empty, full or partial follows from intervals, on the device; no mask is ever built. Memory is
linear in length, but for one number for each tile that is visited. The same result every run, gradients included. In
Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from manyheads.core.forms import Form, Recurrence, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.selection import why_no_scores
from manyheads.core.tiling import choose, plain
from manyheads.engines.triton import choosing, chunked, op

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    choosing.register()
NORMALISERS = ("softmax", "signed", "none")  # of the kernels for any GPU
LARGEST_HEAD_DIM = 256
FEW_QUERIES, MANY_KEYS = 16, 8192
FEW = 2**27  # scores in all below which torch's own kernels are faster, where torch has one


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    if isinstance(form, Recurrence):
        return _unable(x) or chunked.why_not(form, x)
    if isinstance(form, Selection):
        why = why_no_scores(form)
        if why is not None:
            return f"the Triton kernels do not take {why}"
        form = form.scores
    if not isinstance(form, Scores):
        return f"the Triton kernels compute Scores, Selections and Recurrences, not a {type(form).__name__}"
    if form.normaliser not in NORMALISERS and x.q.device.type != "cuda":
        return f"the Triton kernels for any GPU have no {form.normaliser!r} normaliser"
    if x.dropout is not None and x.q.device.type != "cuda":
        return "the Triton kernels for any GPU have no dropout"
    why = _unable(x)
    return _on_gpu(form, x) if why is None and x.q.device.type == "cuda" else why


def _unable(x: Inputs) -> str | None:
    """Whatever the form."""
    if not HAS_TRITON:
        return "triton is not installed"
    if x.q.device.type != "cuda" and not (x.q.device.type == "cpu" and _interprets()):
        return f"Triton runs on CUDA and ROCm GPUs, not on {x.q.device.type} (TRITON_INTERPRET=1 is for tests on a CPU)"
    if x.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, not {x.q.dtype}"
    if max(x.q.shape[3], x.v_head_dim) > LARGEST_HEAD_DIM:
        return f"the Triton kernels take head_dim up to {LARGEST_HEAD_DIM}, not {max(x.q.shape[3], x.v_head_dim)}"
    return None


def _on_gpu(form: Scores, x: Inputs) -> str | None:
    """Hopper GPUs have kernels of their own for 16 bits; the plain ones take the rest. With rows of 16-bit numbers that
    do not begin at multiples of 16 bytes they read memory that is no tensor's, on an H100 (docs/log.md)."""
    from manyheads.engines.triton import hopper

    why = hopper.why_not(form, x)
    if why is None or form.normaliser not in NORMALISERS:
        return why
    if x.dropout is not None:
        return f"the Triton kernels for any GPU have no dropout, and {why}"
    if x.q.element_size() == 2 and (x.q.shape[3] % 8 or x.v_head_dim % 8):
        return f"the Triton kernels take multiples of 8 in 16 bits, not {x.q.shape[3]} and {x.v_head_dim}"
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    from manyheads.engines.triton import hopper

    if x.q.device.type == "cpu":
        return "Triton's interpreter is for tests: ask for it by name"
    if isinstance(form, Recurrence):
        return None
    if isinstance(form, Selection) and x.wants_grad and (why := hopper.why_no_lists(form, x)) is not None:
        return f"it would read a map of the chosen blocks, whose gradients were not timed ({why}): ask for it by name"
    inner = form.scores if isinstance(form, Selection) else form
    if hopper.why_not(inner, x) is not None:
        return "the kernels for any GPU were checked on an H100 and not timed beside the others: ask for them by name"
    if x.q_len <= FEW_QUERIES and x.kv_len > MANY_KEYS:
        return "one program reads all keys of a head, which is slow where there is little else to do"
    if not plain(form, x):
        return None
    if x.batch * x.heads * x.q_len * x.kv_len < FEW:
        return "torch's own kernel is faster for so little work, by docs/benchmarks.md"
    if x.wants_grad and not 64 < max(x.q.shape[3], x.v_head_dim) <= 128:
        return "torch's own kernel has a faster backward pass at this head_dim, by docs/benchmarks.md"
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor]:
    """(o, lse), or (o, state). The first call of a structure compiles; other numbers, tensors and lengths compile
    nothing."""
    if isinstance(form, Recurrence):
        return chunked.run(form, x)
    assert isinstance(form, Scores | Selection), "why_not said so"
    blocks = choose(form, x) if isinstance(form, Selection) else None
    return (op.ATTEND if torch.compiler.is_compiling() else op.attend)(form, x, blocks)


def again(form: Form, x: Inputs) -> Callable[[Sequence[Tensor]], tuple[Tensor | None, ...] | None] | None:
    """What the last `run` did, for other q, k, v, operands and, where x has one, another state behind them, like those
    of x; None if that is not known yet, or may be something else the next time."""
    if isinstance(form, Recurrence):
        return chunked.again(form, x)
    if not isinstance(form, Scores) or x.q.device.type != "cuda":
        return None
    from manyheads.engines.triton import launch

    return launch.again(form, x)


def _interprets() -> bool:
    """As Triton reads it, without importing Triton: on a CPU that would cost every call's first engine a second."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
