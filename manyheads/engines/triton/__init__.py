"""Flash attention for any mask and score, as Triton kernels: forward and backward, on any GPU that Triton knows.

Which tiles of scores are empty, full or partial follows from intervals, on the device; no mask is ever built. Memory is
linear in length, but for one number for each tile that is visited. The same result every run, gradients included. In
Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from manyheads.core.forms import Form, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.selection import as_scores, why_no_scores
from manyheads.core.tiling import plain
from manyheads.engines.triton import op

HAS_TRITON = find_spec("triton") is not None
NORMALISERS = ("softmax", "signed", "none")
LARGEST_HEAD_DIM = 256
FEW = 2**20  # scores in all below which a launch costs more than the work
PLAIN = 2**27  # the same where torch has a kernel of its own, whose launch costs less


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    if isinstance(form, Selection):
        why = why_no_scores(form)
        if why is not None:
            return f"the Triton kernels do not take {why}"
        form = form.scores
    if not isinstance(form, Scores):
        return f"the Triton kernels compute Scores and Selections, not a {type(form).__name__}"
    if form.normaliser not in NORMALISERS:
        return f"the Triton kernels have no {form.normaliser!r} normaliser"
    if not HAS_TRITON:
        return "triton is not installed"
    if x.q.device.type != "cuda" and not (x.q.device.type == "cpu" and _interprets()):
        return f"Triton runs on CUDA and ROCm GPUs, not on {x.q.device.type} (TRITON_INTERPRET=1 is for tests on a CPU)"
    if x.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, not {x.q.dtype}"
    if max(x.q.shape[3], x.v_head_dim) > LARGEST_HEAD_DIM:
        return f"the Triton kernels take head_dim up to {LARGEST_HEAD_DIM}, not {max(x.q.shape[3], x.v_head_dim)}"
    if x.q.device.type == "cuda":
        return _on_gpu(form, x)
    return None


def _on_gpu(form: Scores, x: Inputs) -> str | None:
    """Hopper GPUs have kernels of their own for 16 bits; the plain ones take the rest. With rows of 16-bit numbers that
    do not begin at multiples of 16 bytes they read memory that is no tensor's, on an H100 (docs/log.md)."""
    from manyheads.engines.triton import hopper

    if hopper.why_not(form, x) is None:
        return None
    if x.q.element_size() == 2 and (x.q.shape[3] % 8 or x.v_head_dim % 8):
        return f"the Triton kernels take multiples of 8 in 16 bits, not {x.q.shape[3]} and {x.v_head_dim}"
    return None


def hesitates(form: Form, x: Inputs) -> str | None:
    from manyheads.engines.triton import hopper

    if x.q.device.type == "cpu":
        return "Triton's interpreter is for tests: ask for it by name"
    if isinstance(form, Selection):
        return "its block lists were checked in emulation alone: ask for it by name"
    if hopper.why_not(form, x) is not None:
        return "the kernels for any GPU were checked on an H100 and not timed beside the others: ask for them by name"
    if x.batch * x.heads * x.q_len * x.kv_len < (PLAIN if plain(form, x) else FEW):
        return "its launch takes longer than so little work, by benchmarks/attention.py on an H100"
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor]:
    """(o, lse). The first call of a structure compiles; other numbers, tensors and lengths compile nothing."""
    if isinstance(form, Selection):
        chosen: Any = torch._dynamo.disable(_selected) if torch.compiler.is_compiling() else _selected
        return chosen(form, x)
    assert isinstance(form, Scores), "why_not said so"
    if torch.compiler.is_compiling():
        return op.attend(form, x)
    from manyheads.engines.triton import launch

    return launch.attend(form, x)


def _selected(form: Selection, x: Inputs) -> tuple[Tensor, Tensor]:
    from manyheads.engines.triton import launch

    return launch.attend(*as_scores(form, x))


def _interprets() -> bool:
    """As Triton reads it, without importing Triton: on a CPU that would cost every call's first engine a second."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
