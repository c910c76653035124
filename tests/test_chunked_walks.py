"""The walks of recurrences for Hopper GPUs, launch by launch against a recurrence of tokens in float64: emulated, and
on a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled
import gluon_emulator as emulator
import in_flight

from manyheads.engines.triton.chunked import hopper, tables
from manyheads.engines.triton.chunked.call import Call, Prepared
from manyheads.engines.triton.chunked.kernels.common import FORGOTTEN

C, SCALE = 64, 0.3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_segments(request, monkeypatch):
    if "case" in request.fixturenames:
        monkeypatch.setattr(tables, "LEAST", request.getfixturevalue("case").least)


@pytest.fixture
def emulated(monkeypatch):
    modules = emulator.load("parts", "channels", "walking", "walk", "back", package=hopper.__name__)
    for name in ("walk", "back"):
        monkeypatch.setattr(getattr(hopper, f"{name}s"), name, emulator.Kernel(getattr(modules[name], name)))


@dataclass(frozen=True)
class Case:
    """decay: at most, a token; None: none. early: beside it, of the first half of the tokens. heads: of queries and of
    keys. least: chunks of a segment."""

    decay: float | None = 0.1
    delta: bool = True
    length: int = 200
    head_dim: int = 128
    v_head_dim: int = 128
    heads: tuple[int, int] = (1, 1)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    least: int = 2
    early: float = 0.0


STRONG = 5.0
CASES = [
    Case(), Case(None, least=1), Case(delta=False), Case(None, delta=False, length=330, least=3),
    Case(length=130, head_dim=64, heads=(2, 1)), Case(STRONG, length=330, least=1),
    Case(STRONG, delta=False, length=301), Case(delta=False, heads=(4, 2), batch=2, length=65, least=1),
    Case(length=128, dtype=torch.float16, least=1), Case(length=130, v_head_dim=64),
    Case(None, delta=False, v_head_dim=64), Case(length=130, v_head_dim=256, head_dim=64),
    Case(STRONG, delta=False, v_head_dim=256, heads=(2, 2)), Case(0.01, length=500, least=8),
    Case(0.01, delta=False, length=500, least=8),
    Case(None, delta=False, length=320, head_dim=64, v_head_dim=64, least=8), Case(length=384, early=2.0),
    Case(delta=False, length=384, early=2.0),
]  # fmt: skip
# Of which the kernels know what becomes of a state before a segment.
WHOLE = [case for case in CASES if not case.delta or case.head_dim == case.v_head_dim == 128]
BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of a correction, whose operands are rounded twice


class Truth:
    """All of it in float64, of each query head. Segments as the call has them."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        (heads, kv_heads), n = case.heads, case.length
        sizes = (heads, case.head_dim), (kv_heads, case.head_dim), (kv_heads, case.v_head_dim)
        q, k, v = (torch.randn(case.batch, h, n, d) for h, d in sizes)
        own = q.to(case.dtype), F.normalize(k, dim=-1).to(case.dtype), v.to(case.dtype)
        shape = case.batch, heads, n
        g = None if case.decay is None else -torch.rand(shape) * case.decay
        if g is not None:
            g[..., : n // 2] -= case.early
        beta = torch.rand(shape) if case.delta else None
        self.case = case
        self.call = Call.of(*(None if t is None else t.to(device) for t in (*own, g, beta)), SCALE)
        self.q = own[0].double()
        self.k, self.v = (t.double().repeat_interleave(heads // kv_heads, 1) for t in own[1:])
        self.g = torch.zeros(shape).double() if g is None else g.double()
        self.beta = None if beta is None else beta.double()
        self.state = torch.randn(case.batch, heads, case.head_dim, case.v_head_dim).double()
        self.per = -(-self.call.chunks // self.call.segments) * C

    def walked(self, state: Tensor, v: Tensor, tokens: range) -> tuple[Tensor, Tensor]:
        """What tokens read of the states behind them, [.., tokens, DV], and the last state."""
        found = []
        for t in tokens:
            state = state * self.g[:, :, t, None, None].exp()
            u = v[:, :, t]
            if self.beta is not None:
                u = self.beta[:, :, t, None] * (u - (self.k[:, :, t, :, None] * state).sum(2))
            state = state + self.k[:, :, t, :, None] * u[:, :, None]
            found.append((self.q[:, :, t, :, None] * state).sum(2) * SCALE)
        return torch.stack(found, 2), state

    def states(self, v: Tensor, step: int) -> tuple[Tensor, list[Tensor]]:
        """o, and the states before every `step` tokens and behind the last one."""
        parts, states = [], [self.state]
        for first in range(0, self.case.length, step):
            o, state = self.walked(states[-1], v, range(first, min(first + step, self.case.length)))
            parts.append(o)
            states.append(state.clone())  # which the tokens behind read, and the last one before does not
        return torch.cat(parts, 2), states

    def prepared(self) -> Prepared:
        """As call.prepare makes it."""
        call, device = self.call, self.call.q.device
        padding = call.chunks * C - self.case.length
        g = fades = beta = t = None
        sums = (F.pad(self.g, (0, padding)) / log(2)).unflatten(2, (call.chunks, C)).cumsum(3)
        if call.g is not None:
            ends = torch.cat([sums[..., -1], torch.zeros_like(sums[..., :1, -1])], 2)
            g, fades = sums.flatten(2).float().to(device), ends.flatten(0, 1).float().to(device)
        if self.beta is not None:
            k, beta = F.pad(self.k, (0, 0, 0, padding)), F.pad(self.beta, (0, padding))
            k, beta = (x.unflatten(2, (call.chunks, C)) for x in (k, beta))
            below = (k @ k.mT * beta[..., None] * torch.exp2(sums[..., :, None] - sums[..., None, :])).tril(-1)
            t = torch.linalg.inv(torch.eye(C).double() + below).flatten(0, 1).to(device, call.q.dtype).contiguous()
            beta = beta.float().to(device)
        return Prepared(call.q, call.k, None, g, g, fades, beta, None, None, t)

    def by_channel(self, g: Tensor) -> Tensor:
        """[.., channels], or one for all of them."""
        return g[..., None]

    def near(self, found: Tensor, true: Tensor) -> bool:
        return bool((found.double().cpu() - true).norm() <= BOUND[self.case.dtype] * true.norm())

    def rows(self, states: list[Tensor]) -> Tensor:
        return torch.stack(states, 2).flatten(0, 1).float().to(self.call.q.device)

    def nothing(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype or self.case.dtype, device=self.call.q.device)

    def locals(self) -> tuple[Tensor, Tensor, Tensor | None]:
        ahead = self.call.rows, self.call.segments - 1
        added, transition = (
            self.nothing(*ahead, self.case.head_dim, n, dtype=torch.float32) for n in (self.case.v_head_dim, 128)
        )
        return added, self.nothing(*ahead, 1, dtype=torch.float32), transition if self.case.delta else None


def put_together(local: tuple[Tensor, Tensor, Tensor | None], state: Tensor, n: int) -> Tensor:
    """As `carry` does."""
    added, totals, transition = (None if t is None else t[:, n].double().cpu() for t in local)
    assert added is not None and totals is not None
    if transition is None:
        return totals[..., None].exp2() * state.flatten(0, 1) + added
    return torch.where(totals[..., None] == 0, (transition @ state.flatten(0, 1)), 0.0).nan_to_num(0.0) + added


def check_forward(case: Case, device: torch.device) -> None:
    truth = Truth(case, device)
    call, made = truth.call, truth.prepared()
    true_o, starts = truth.states(truth.v, truth.per)
    o, end = (
        truth.nothing(*call.state[:2], case.length, case.v_head_dim),
        truth.nothing(*call.state, dtype=torch.float32),
    )
    hopper.walk(call, made, truth.rows(starts[: call.segments]), o=o, end=end)
    assert truth.near(o, true_o) and truth.near(end, starts[-1])

    states = truth.nothing(call.rows, call.chunks, *call.state[2:])
    u = truth.nothing(*call.state[:2], case.length, case.v_head_dim) if case.delta else None
    hopper.walk(call, made, truth.rows(starts[: call.segments]), u=u, states=states)
    true = truth.states(truth.v, C)[1]
    assert truth.near(states, truth.rows(true[:-1]).cpu())
    if u is not None:  # what it adds says that it is right
        for n, first in enumerate(range(0, case.length, C)):
            g, k = truth.g[:, :, first : first + C], truth.k[:, :, first : first + C]
            fall = truth.by_channel(g.sum(2, True) - g.cumsum(2)).exp()
            added = (k * fall).mT @ u[:, :, first : first + C].double().cpu()
            assert truth.near(truth.by_channel(g.sum(2)).exp()[..., None] * true[n] + added, true[n + 1])


def check_segments(case: Case, device: torch.device, **changes: Any) -> None:
    """changes: of what is prepared."""
    truth = Truth(case, device)
    call, local = truth.call, truth.locals()
    hopper.walk(call, replace(truth.prepared(), **changes), None, local=local)
    states = truth.states(truth.v, truth.per)[1]
    if case.decay == STRONG and case.delta:
        ends = range(0, truth.per * (call.segments - 1), truth.per)
        assert truth.per == C  # a segment is a chunk, and is forgotten in it or is not
        gone = [bool(truth.g[0, 0, at : at + C].sum() / log(2) < float(FORGOTTEN.value)) for at in ends]
        assert [float("-inf") if forgotten else 0.0 for forgotten in gone] == local[1][0, :, 0].tolist()
    for n in range(call.segments - 1):
        assert truth.near(put_together(local, states[n], n), states[n + 1].flatten(0, 1)), n


def check_backward(case: Case, device: torch.device) -> None:
    truth = Truth(case, device)
    call, made = truth.call, truth.prepared()
    v, d_end, do = truth.v.requires_grad_(), torch.randn(call.state).double(), torch.randn(truth.v.shape).to(case.dtype)
    truth.state.requires_grad_()
    o, states = truth.states(v, C)
    d_v, *d_states = torch.autograd.grad([o, states[-1]], [v, *states], [do.double(), d_end])
    do = do.to(device)

    at = [call.chunks - n * (truth.per // C) for n in range(call.segments)]  # segments count from the end
    behind = truth.nothing(call.rows, call.chunks, *call.state[2:])
    shape = *call.state[:2], case.length, case.v_head_dim
    dv = truth.nothing(*shape, dtype=case.dtype if call.group == 1 else torch.float32)
    z, end = truth.nothing(*shape) if case.delta else None, truth.nothing(*call.state, dtype=torch.float32)
    starts = truth.rows([d_states[n] for n in at])
    hopper.back(call, made, starts, do, end=end, z=z, dv=dv, states=behind)
    assert truth.near(behind, truth.rows(d_states[1:]).cpu()) and truth.near(end, d_states[0]) and truth.near(dv, d_v)
    if z is not None and truth.beta is not None:
        assert truth.near(z.cpu() * truth.beta[..., None], d_v)
    if case in WHOLE:
        local = truth.locals()
        hopper.back(call, made, None, do, local=local)
        for n in range(call.segments - 1):
            assert truth.near(put_together(local, d_states[at[n]], n), d_states[at[n + 1]].flatten(0, 1)), n


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, emulated):
    check_forward(case, CPU)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_segments(case, emulated):
    check_segments(case, CPU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, emulated):
    check_backward(case, CPU)


def test_what_they_take(monkeypatch):
    def call(n=64, head_dim=128, v_head_dim=128, dtype=torch.bfloat16, q_len=64, g=None):
        shapes = (q_len, head_dim), (n, head_dim), (n, v_head_dim)
        return Call.of(*(torch.zeros(1, 1, *shape, dtype=dtype) for shape in shapes), g, None, 1.0)

    assert not hopper.takes(call())  # on a CPU
    monkeypatch.setattr(hopper, "_hopper", lambda device: True)
    assert hopper.takes(call()) and hopper.takes(call(head_dim=64, dtype=torch.float16))
    assert hopper.takes(call(g=torch.zeros(1, 1, 64)))
    others = (
        call(head_dim=256), call(v_head_dim=32), call(dtype=torch.float32), call(q_len=63),
        call(v_head_dim=256, g=torch.zeros(1, 1, 64, 128)),
    )  # fmt: skip
    assert not any(hopper.takes(other) for other in others)


def test_segments_are_few_where_nothing_is_forgotten(monkeypatch):
    q = torch.zeros(1, 1, 100 * C, 128, dtype=torch.bfloat16)
    calls = [Call.of(q, q, q, g, None, 1.0) for g in (None, torch.zeros(1, 1, 100 * C), None)]
    monkeypatch.setattr(tables, "LEAST", 1)
    plain = calls[2].segments
    monkeypatch.setattr(hopper, "_hopper", lambda device: True)
    assert (plain, calls[1].segments, calls[0].segments) == (100, 100, 50)


# ---- without a GPU ----

SPILLED = 8  # words, at most, beside a warp group's loop


@pytest.mark.parametrize("name", ["walk outputs gated 128", "walk segments gated 128", "back gated 128"])
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    kernel = dict(compiled.walk_kernels())[name]()
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
CHECKS = {"forward": check_forward, "segments": check_segments, "backward": check_backward}


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_float64(self, case, check):
        if check != "segments" or case in WHOLE:
            CHECKS[check](case, torch.device("cuda"))
