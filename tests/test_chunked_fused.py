"""The way back and the gradients of chunks in one kernel for Hopper GPUs: emulated, against a recurrence of tokens in
float64, compiled, and on a GPU."""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_chunked import Case as Whole
from tests.test_chunked import computed, errors, triton

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
import gluon_emulator as emulator
import in_flight

from manyheads.engines.triton import replay
from manyheads.engines.triton.chunked import hopper, tables
from manyheads.engines.triton.chunked.backward import Gradients
from manyheads.engines.triton.chunked.call import Call
from manyheads.engines.triton.chunked.kernels.solve import LEAST
from tests.test_chunked_walks import CPU, STRONG, C, Case, Truth

CASES = [
    Case(length=200), Case(length=330, heads=(2, 2), least=1), Case(None, length=130), Case(delta=False, length=300),
    Case(None, delta=False, length=65), Case(STRONG, length=330), Case(length=64, heads=(2, 1), batch=2),
    Case(delta=False, length=130, heads=(2, 1), dtype=torch.float16),
]  # fmt: skip
BOUND = {torch.bfloat16: 6e-3, torch.float16: 8e-4}  # operands of products are rounded, some of them twice


@pytest.fixture
def emulated(monkeypatch):
    names = "parts", "channels", "walking", "walk", "fused_walker", "fused_chunks", "fused"
    modules = emulator.load(*names, package=hopper.__name__)
    monkeypatch.setattr(hopper.walks, "walk", emulator.Kernel(modules["walk"].walk))
    monkeypatch.setattr(emulator, "tma_load", late)
    monkeypatch.setattr(emulator, "warpgroup_mma", early_or_late)
    monkeypatch.setattr(emulator.mbarrier, "wait", staticmethod(after_a_while))
    modules = emulator.load(*names, package=hopper.__name__)
    monkeypatch.setattr(hopper.fuseds, "fused", emulator.Kernel(modules["fused"].fused))


def late(source: Any, at: Any, barrier: Any, target: Any) -> None:
    """A copy into shared memory that lands some time after it was issued, in any order."""
    part, inside = source.box(at)
    values = part.float().numpy().copy()

    def land() -> None:
        target.values[...] = 0
        target.values[inside] = values
        with emulator._changed:
            barrier.bytes -= target.values.size * source.tensor.element_size()
            barrier.settle()

    threading.Timer(random.random() * 0.01, land).start()


multiply, wait = emulator.warpgroup_mma, emulator.mbarrier.wait


def early_or_late(a: Any, b: Any, *rest: Any, **options: Any) -> Any:
    """A product that reads shared memory when it is issued or when it is waited for."""
    if random.random() < 0.5:
        a, b = (emulator.Shared(x.values.copy(), x.dtype) if isinstance(x, emulator.Shared) else x for x in (a, b))
    return multiply(a, b, *rest, **options)


def after_a_while(barrier: Any, phase: int) -> None:
    """Warp groups fall behind each other."""
    wait(barrier, phase)
    if random.random() < 0.2:
        time.sleep(random.random() * 0.01)


def found_and_true(case: Case, decays: bool, idle: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """idle: tokens whose strength is 0, which solve takes for LEAST."""
    truth = Truth(case, CPU)
    if idle and truth.beta is not None:
        truth.beta[:, :, ::3] = LEAST.value
    call, made = truth.call, truth.prepared()
    if idle and truth.beta is not None:
        truth.beta[:, :, ::3] = 0
    leaves = {"q": truth.q, "k": truth.k, "v": truth.v, "state": truth.state}
    leaves |= {} if case.decay is None else {"g": truth.g}
    leaves |= {"beta": truth.beta} if case.delta else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    d_end, do = torch.randn(call.state).double(), torch.randn(truth.v.shape).to(case.dtype)
    o, states = truth.states(truth.v, C)
    own = torch.autograd.grad([o, states[-1]], list(leaves.values()), [do.double(), d_end], True)
    true = dict(zip(leaves, own, strict=True))
    d_states = torch.autograd.grad([o, states[-1]], states, [do.double(), d_end])

    starts = truth.rows([s.detach() for s in truth.states(truth.v, truth.per)[1]][: call.segments])
    shape = *call.state[:2], case.length
    before = truth.nothing(call.rows, call.chunks, *call.state[2:])
    u = truth.nothing(*shape, case.v_head_dim) if case.delta else None
    hopper.walk(call, made, starts, u=u, states=before)
    found = {name: truth.nothing(*shape, 128) for name in ("q", "k", "v")}
    found |= {name: truth.nothing(*shape, dtype=torch.float32) for name in ("g", "beta") if name in leaves}
    found["state"] = truth.nothing(*call.state, dtype=torch.float32)
    if not decays:
        found.pop("g")
    ends = truth.rows([d_states[call.chunks - n * (truth.per // C)] for n in range(call.segments)])
    to_fill = Gradients(**({"g": None, "beta": None} | found))
    hopper.fused(call, made, ends, call.v if u is None else u, before, do, to_fill)
    return {name: (one.double(), true[name]) for name, one in found.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case, emulated, monkeypatch):
    monkeypatch.setattr(tables, "LEAST", case.least)
    for name, (found, true) in found_and_true(case, True, False).items():
        assert (found - true).norm() <= BOUND[case.dtype] * true.norm(), name


def test_decays_without_a_gradient(emulated):
    pairs = found_and_true(Case(length=130), False, False)
    assert "g" not in pairs and all((a - b).norm() <= BOUND[torch.bfloat16] * b.norm() for a, b in pairs.values())


def test_what_is_not_written_has_a_gradient(emulated):
    found, true = found_and_true(Case(length=130), True, True)["beta"]
    assert (found - true)[:, :, ::3].norm() <= BOUND[torch.bfloat16] * true[:, :, ::3].norm() > 0


def test_what_it_takes(monkeypatch):
    def call(head_dim=128, v_head_dim=128, dtype=torch.bfloat16, corrects=True, channels=False, q_len=64):
        shapes = (q_len, head_dim), (64, head_dim), (64, v_head_dim)
        beta = torch.zeros(1, 1, 64) if corrects else None
        g = torch.zeros(1, 1, 64, head_dim) if channels else None
        return Call.of(*(torch.zeros(1, 1, *shape, dtype=dtype) for shape in shapes), g, beta, 1.0)

    assert not hopper.takes_fused(call())  # on a CPU
    monkeypatch.setattr(hopper, "_hopper", lambda device: True)
    assert hopper.takes_fused(call()) and hopper.takes_fused(call(dtype=torch.float16, corrects=False))
    others = call(64), call(v_head_dim=64), call(dtype=torch.float16), call(q_len=63), call(channels=True)
    assert not any(hopper.takes_fused(other) for other in others)


SPILLED = 48  # words, which the loop over chunks needs once each


@pytest.mark.parametrize("name", [name for name, _ in compiled.fused_kernels()])
def test_uses_what_a_hopper_has(name):
    kernel = dict(compiled.fused_kernels())[name]()
    made = compiled.read(kernel)
    assert not in_flight.overlaps(kernel.asm["ttgir"])
    assert made.spilled <= SPILLED and made.hgmma > 0 and made.shared <= compiled.LIMIT, made


# ---- on a GPU ----

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
REAL = [
    Whole("delta and step", 1000, 1000, 128, 128, (2, 2), 2), Whole("delta", 333, 333, 128, 128, (4, 2)),
    Whole("step", 777, 777, 128, 128, (2, 2), decay=100.0), Whole("none", 65, 65, 128, 128, (1, 1)),
    Whole("delta and step", 4100, 4100, 128, 128, decay=20.0, state=False),
]  # fmt: skip


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("case", REAL, ids=str)
    def test_equals_float64(self, case, monkeypatch):
        taken, fused = [], hopper.fused
        monkeypatch.setattr(hopper, "fused", lambda *given: (taken.append(given), fused(*given)))
        cuda = torch.device("cuda")
        for _ in range(2):  # the first call may be made twice, as it compiles
            taken.clear()
            replay.forget()
            assert max(errors(case, torch.bfloat16, cuda).values()) < 1e-2
        assert len(taken) == 1
        first, *more = (computed(case, triton, torch.bfloat16, cuda, torch.bfloat16) for _ in range(5))
        assert all(torch.equal(first[name], other[name]) for other in more for name in first)
