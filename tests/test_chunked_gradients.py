"""Gradients of recurrences as Hopper GPUs compute them: emulated, against eager in float64, and on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import interpret
from tests.test_chunked import Case, errors

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
import gluon_emulator as emulator
import in_flight

CPU = torch.device("cpu")
FORMS = ("none", "head and step", "delta", "delta and step")
CASES = {
    "lengths": [Case("delta and step", n, n) for n in (17, 64, 130)],
    "fewer queries": [Case(form, 70, 150, 64, 32, (4, 2)) for form in FORMS],
    "wide": [Case("delta and step", 100, 100, 128, 64), Case("step", 100, 100, 64, 128, (2, 2), 2)],
}


def emulated(group: str) -> None:
    """What a process of its own does: prints the errors of a group's cases, in bfloat16."""
    from manyheads.engines.triton.chunked.hopper import gradients

    kernels = emulator.load("gradients", package="manyheads.engines.triton.chunked.hopper")["gradients"]
    launched = []

    def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        launched.append(programs)
        emulator.Kernel(kernels.gradients)[(programs,)](*arguments)

    gradients.takes, gradients.quick = (lambda call: True), SimpleNamespace(launch=launch)
    gradients.multiprocessors = lambda device: 2  # a program has several chunks
    found = [errors(case, torch.bfloat16, CPU) for case in CASES[group]]
    assert len(launched) == len(found)
    print(json.dumps(found))


@pytest.mark.parametrize("group", CASES)
def test_emulated(group):
    found = json.loads(interpret("test_chunked_gradients", f"emulated({group!r})"))
    for case, of_case in zip(CASES[group], found, strict=True):
        # Of numbers with 8 bits, and of differences of them.
        assert max(of_case.values()) < 2.4e-2, (case, of_case)


SPILLED = {"Hopper gradients delta 128": 80}  # words, while the next chunk is fetched


@pytest.mark.parametrize("name", [name for name, _ in compiled.gradient_kernels()])
def test_uses_what_a_hopper_has(name):
    kernel = dict(compiled.gradient_kernels())[name]()
    made = compiled.read(kernel)
    assert not in_flight.overlaps(kernel.asm["ttgir"])
    assert made.spilled <= SPILLED.get(name, 0) and made.hgmma > 0 and made.shared <= compiled.LIMIT, made
    assert made.registers == 168, "more would leave no room for three warp groups"


# ---- on a GPU ----

REAL = [(128, 64, (4, 1)), (64, 128, (2, 2)), (32, 16, (2, 1)), (128, 128, (2, 2))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("head_dim", "v_head_dim", "heads"), REAL)
def test_on_a_gpu(monkeypatch, form, head_dim, v_head_dim, heads):
    from manyheads.engines.triton import replay
    from manyheads.engines.triton.chunked.hopper import gradients

    taken, found = [], gradients.gradients
    monkeypatch.setattr(gradients, "gradients", lambda *args: (taken.append(args), found(*args)))
    for _ in range(2):  # the first call may be made twice, as it compiles
        taken.clear()
        replay.forget()
        of_case = errors(Case(form, 400, 500, head_dim, v_head_dim, heads, 2), torch.bfloat16, torch.device("cuda"))
        assert max(of_case.values()) < 2.4e-2, of_case
    assert len(taken) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_program_has_many_chunks_on_a_gpu(monkeypatch):
    from manyheads.engines.triton.chunked.hopper import gradients

    monkeypatch.setattr(gradients, "multiprocessors", lambda device: 1)
    found = errors(Case("delta and step", 900, 1000, 128, 128, (2, 2)), torch.bfloat16, torch.device("cuda"))
    assert max(found.values()) < 2.4e-2, found
