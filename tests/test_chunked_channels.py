"""Recurrences whose channels decay by themselves, on Hopper GPUs: walks launch by launch against a recurrence of tokens
in float64; emulated, and on a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
import in_flight
import test_chunked_walks as walks

from manyheads.core.recurrence import LEAST_DECAY
from manyheads.engines.triton.chunked import hopper, tables
from manyheads.engines.triton.chunked.call import Call, Prepared
from manyheads.engines.triton.chunked.kernels.pairs import LEAST

C, CPU, emulated = walks.C, walks.CPU, walks.emulated


@pytest.fixture(autouse=True)
def short_segments(request, monkeypatch):
    if "case" in request.fixturenames:
        monkeypatch.setattr(tables, "LEAST", request.getfixturevalue("case").least)


@dataclass(frozen=True)
class Case(walks.Case):
    """fast: how much more a token decays in a channel of sixteen; gates: the dtype of decays."""

    fast: float = 0.0
    gates: torch.dtype = torch.float32


CASES = [
    Case(), Case(delta=False), Case(fast=3.0, length=330, least=1, decay=0.3),
    Case(fast=3.0, length=330, least=1, decay=0.3, delta=False, heads=(4, 2), gates=torch.bfloat16),
    Case(delta=False, head_dim=64, v_head_dim=64, length=301, gates=torch.bfloat16), Case(20.0, fast=100.0, length=130),
    Case(fast=1e5, length=130), Case(fast=1e5, length=130, delta=False, gates=torch.bfloat16),
    Case(0.01, heads=(2, 1), batch=2, length=130, least=1), Case(0.02, dtype=torch.float16, length=130, least=1),
    Case(delta=False, v_head_dim=64, fast=20.0, length=130, least=1), Case(length=384, early=2.0),
    Case(delta=False, length=384, early=2.0),
]  # fmt: skip


class Truth(walks.Truth):
    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        g = -torch.rand(case.batch, case.heads[0], case.length, case.head_dim) * (case.decay or 0.0)
        g[..., ::16] -= case.fast
        g[:, :, : case.length // 2] -= case.early
        g = g.to(case.gates)
        call = self.call
        self.g, self.call = g.double(), Call.of(call.q, call.k, call.v, g.to(device), call.beta, walks.SCALE)
        self.per = -(-self.call.chunks // self.call.segments) * C

    def walked(self, state: Tensor, v: Tensor, tokens: range) -> tuple[Tensor, Tensor]:
        found = []
        for t in tokens:
            state = state * self.g[:, :, t, :, None].exp()
            u = v[:, :, t]
            if self.beta is not None:
                u = self.beta[:, :, t, None] * (u - (self.k[:, :, t, :, None] * state).sum(2))
            state = state + self.k[:, :, t, :, None] * u[:, :, None]
            found.append((self.q[:, :, t, :, None] * state).sum(2) * walks.SCALE)
        return torch.stack(found, 2), state

    def prepared(self) -> Prepared:
        """As call.prepare makes it. Of A, what nobody is to read is NaN."""
        call, device, padding = self.call, self.call.q.device, self.call.chunks * C - self.case.length
        q, k, g = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (call.chunks, C)) for x in (self.q, self.k, self.g))
        g = g.clamp(min=LEAST_DECAY)
        sums, beta, t = g.cumsum(3) / log(2), None, None

        def met(left: Tensor) -> Tensor:
            rows = [
                (left[..., i, None, :] * k * (sums[..., i, None, :] - sums).clamp(max=0.0).exp2()).sum(-1)
                for i in range(C)
            ]
            return torch.stack(rows, -2).tril()

        ends = sums[..., -1, :].flatten(0, 1)
        bound = -8.0 if call.q.dtype == torch.float16 else float(LEAST.value)
        a = torch.where((ends.amin(-1) < bound)[..., None, None], met(q).flatten(0, 1), torch.nan)
        fades = g.amax(-1).sum(3) / log(2) if self.beta is not None else sums[..., -1, :].amax(-1)
        fades = F.pad(fades, (0, 1)).flatten(0, 1)
        if self.beta is not None:
            strengths = F.pad(self.beta, (0, padding)).unflatten(2, (call.chunks, C))
            below = (met(k) * strengths[..., None]).tril(-1)
            t = torch.linalg.inv(torch.eye(C).double() + below).flatten(0, 1).to(device, call.q.dtype).contiguous()
            beta = strengths.float().to(device)
        ends, fades = (x.float().to(device).contiguous() for x in (ends, fades))
        return Prepared(call.q, call.k, None, ends, None, fades, beta, a.to(device, call.q.dtype), None, t)

    def by_channel(self, g: Tensor) -> Tensor:
        return g

    def locals(self) -> tuple[Tensor, Tensor, Tensor | None]:
        added, totals, transition = super().locals()
        if transition is None:
            totals = self.nothing(*totals.shape[:2], self.case.head_dim, dtype=torch.float32)
        return added, totals, transition


@pytest.fixture(autouse=True)
def channels_of_their_own(monkeypatch):
    """For the checks of walks."""
    for name, own in (("Truth", Truth), ("WHOLE", CASES)):
        monkeypatch.setattr(walks, name, own)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, emulated):
    walks.check_forward(case, CPU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_segments(case, emulated):
    walks.check_segments(case, CPU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, emulated):
    walks.check_backward(case, CPU)


def check_found(case: Case, device: torch.device) -> None:
    """A walk that finds the last sums itself leaves out what tokens of fast chunks read of each other."""
    truth = Truth(case, device)
    call, known = truth.call, truth.prepared()
    assert known.ends is not None and known.a is not None
    made = replace(known, a=None, ends=truth.nothing(*known.ends.shape, dtype=torch.float32))
    true_o, starts = truth.states(truth.v, truth.per)
    o, end = truth.nothing(*true_o.shape), truth.nothing(*call.state, dtype=torch.float32)
    hopper.walk(call, made, truth.rows(starts[: call.segments]), o=o, end=end)
    assert made.ends is not None
    assert torch.allclose(made.ends, known.ends, rtol=2**-18, atol=0.0), "sums of 64 numbers in float32"
    v = F.pad(truth.v, (0, 0, 0, call.chunks * C - case.length)).unflatten(2, (call.chunks, C))
    inside = known.a.double().cpu().nan_to_num(0.0).unflatten(0, call.state[:2]) @ v * walks.SCALE
    assert truth.near(o.double().cpu() + inside.flatten(2, 3)[:, :, : case.length], true_o)
    assert truth.near(end, starts[-1])
    walks.check_segments(case, device, a=None, ends=None)


ADDING = [case for case in CASES if not case.delta]


@pytest.mark.parametrize("case", ADDING, ids=str)
def test_last_sums_are_found(case, emulated):
    check_found(case, CPU)


def test_what_they_take(monkeypatch):
    def call(
        head_dim=128,
        v_head_dim=128,
        dtype=torch.bfloat16,
        q_len=64,
        corrects=True,
        gates: torch.dtype = torch.float32,
    ):
        q, k, v = (
            torch.zeros(1, 1, *shape, dtype=dtype) for shape in ((q_len, head_dim), (64, head_dim), (64, v_head_dim))
        )
        g = torch.zeros(1, 1, 64, head_dim, dtype=gates)
        return Call.of(q, k, v, g, torch.zeros(1, 1, 64) if corrects else None, 1.0)

    assert not hopper.takes(call())  # on a CPU
    monkeypatch.setattr(hopper, "_hopper", lambda device: True)
    taken = call(), call(dtype=torch.float16, gates=torch.float16), call(64, 64, corrects=False)
    assert all(hopper.takes(each) for each in taken)
    others = (
        call(64, 64), call(256), call(v_head_dim=256, corrects=False), call(dtype=torch.float32), call(q_len=63),
        call(gates=torch.float64),
    )  # fmt: skip
    assert not any(hopper.takes(other) for other in others)


# ---- without a GPU ----

# Words: of what is kept from one part of a chunk to another.
SPILLED = {
    "back channels add 128": 72, "back channels delta 128": 80, "gradients channels add 128": 49,
    "gradients channels delta 128": 146, "walk channels outputs add 128 found": 11,
}  # fmt: skip
TWO = (228 // 2 - 1) * 1024  # bytes of shared memory where two programs fit: each has 1024 more


@pytest.mark.parametrize("name", [name for name, _ in compiled.channel_kernels() if not name.endswith("64")])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    kernel = dict(compiled.channel_kernels())[name]()
    made = compiled.read(kernel)
    assert not in_flight.overlaps(kernel.asm["ttgir"])
    limit = TWO if name.startswith("gradients") else compiled.LIMIT
    assert made.spilled <= SPILLED.get(name, 8) and made.hgmma > 0 and made.shared <= limit, made


def test_what_a_copy_still_reads_is_not_written_on():
    pytest.importorskip("triton.backends.nvidia")
    right = dict(compiled.channel_kernels())["gradients channels add 64"]().asm["ttgir"]
    wrong = "".join(line for line in right.splitlines(True) if "async_tma_store_wait" not in line)
    assert in_flight.overlaps(wrong) and not in_flight.overlaps(right)


# ---- on a GPU ----

on_a_gpu = walks.on_a_gpu


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("check", walks.CHECKS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_walks_equal_float64(self, case, check):
        walks.CHECKS[check](case, torch.device("cuda"))

    @pytest.mark.parametrize("case", ADDING, ids=str)
    def test_last_sums_are_found(self, case):
        check_found(case, torch.device("cuda"))
