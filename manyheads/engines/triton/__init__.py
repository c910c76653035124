"""Flash attention for any mask and score, as Triton kernels: forward and backward, on any GPU that Triton knows.

Which tiles of scores are empty, full or partial follows from intervals, on the device; no mask is ever built. Memory is
linear in length, but for one number for each tile that is visited. The same result every run, gradients included. In
Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from manyheads.core.forms import Form, Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import plain

NORMALISERS = ("softmax", "signed")
LARGEST_HEAD_DIM = 256
FEW = 2**20  # scores in all below which a launch costs more than the work
PLAIN = 2**27  # the same where torch has a kernel of its own, whose launch costs less


def why_not(form: Form, x: Inputs, lse: bool = False) -> str | None:
    if not isinstance(form, Scores):
        return f"the Triton kernels compute Scores, not a {type(form).__name__}"
    if form.normaliser not in NORMALISERS:
        return f"the Triton kernels have no {form.normaliser!r} normaliser"
    if not _has_triton():
        return "triton is not installed"
    if x.q.device.type != "cuda" and not (x.q.device.type == "cpu" and _interprets()):
        return f"Triton runs on CUDA and ROCm GPUs, not on {x.q.device.type} (TRITON_INTERPRET=1 is for tests on a CPU)"
    if x.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, not {x.q.dtype}"
    if max(x.q.shape[3], x.v_head_dim) > LARGEST_HEAD_DIM:
        return f"the Triton kernels take head_dim up to {LARGEST_HEAD_DIM}, not {max(x.q.shape[3], x.v_head_dim)}"
    if x.q.device.type == "cuda":
        return _on_gpu(form, x)
    if torch.is_grad_enabled():
        if any(t.requires_grad for t in form.program.tensors):
            return "the Triton kernels have no gradient yet for tensors that a mask or score captured"
        asked = [name for name, operand in x.operands.items() if operand.requires_grad]
        if asked:
            return f"the Triton kernels have no gradient yet for operands: {', '.join(asked)}"
    return None


def _on_gpu(form: Scores, x: Inputs) -> str | None:
    """On a GPU the Hopper kernel alone is offered. The plain kernels, which have the backward pass, were right in 40
    tests on an H100 and then read memory that is no tensor's (docs/log.md): until that is found, they are for tests."""
    from manyheads.engines.triton import hopper

    if x.wants_grad:
        return "the Triton kernels have no backward pass on a GPU yet"
    return hopper.why_not(form, x)


def hesitates(form: Form, x: Inputs) -> str | None:
    if x.q.device.type == "cpu":
        return "Triton's interpreter is for tests: ask for it by name"
    if x.batch * x.heads * x.q_len * x.kv_len < (PLAIN if plain(form, x) else FEW):
        return "its launch takes longer than so little work: 150 us, by benchmarks/hopper_check.py on an H100"
    return None


def run(form: Form, x: Inputs) -> tuple[Tensor, Tensor]:
    """(o, lse). The first call of a structure compiles; other numbers, tensors and lengths compile nothing."""
    from manyheads.engines.triton import launch

    assert isinstance(form, Scores), "why_not said so"
    if torch.compiler.is_compiling():  # the kernels are no operators of torch's yet: a break in the graph
        eagerly: Any = torch._dynamo.disable(launch.attend)
        return eagerly(form, x)
    return launch.attend(form, x)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interprets() -> bool:
    """As Triton reads it, without importing Triton: on a CPU that would cost every call's first engine a second."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
