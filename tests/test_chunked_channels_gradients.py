"""Gradients of recurrences whose channels decay by themselves, on Hopper GPUs, against eager: emulated, and on a
GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gluon_emulator as emulator

from manyheads.engines.triton.chunked import call as calls
from manyheads.engines.triton.chunked import hopper, tables
from manyheads.engines.triton.chunked.call import Call
from manyheads.engines.triton.chunked.hopper import gradients
from manyheads.engines.triton.hopper import launching
from tests.interpreter import interpret
from tests.test_chunked import Case, errors

CASES = {
    "add": [Case("channel", 130, 130, 64, 64), Case("channel", 70, 70, 64, 128, (2, 2), decay=20.0)],
    "correct": [Case("delta and channel", 130, 130, 128, 64, (2, 1), 2)],
    "fast": [Case("delta and channel", 70, 70, 128, 128, decay=20.0)],
    "slow": [Case("delta and channel", 70, 70, 64, 64, decay=0.02)],
}
SHARE = 2.4e-2  # of a gradient's length: numbers have 8 bits, which the interpreter cuts off, and differences of them


def emulated(group: str) -> None:
    """What a process of its own does: prints the errors of a group's cases, in bfloat16."""
    modules = emulator.load("parts", "gradients_channels", package=hopper.__name__)
    launched = []

    def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        launched.append(programs)
        emulator.Kernel(modules["gradients_channels"].gradients_channels)[(programs,)](*arguments)

    own: Any = gradients  # what it does not import where Triton interprets
    own.quick, own.of_channels = SimpleNamespace(launch=launch), SimpleNamespace(gradients_channels=None)
    own.descriptor, own.kind_of = launching.descriptor, launching.kind_of
    own.takes_channels = lambda call: True
    calls.on_hopper = SimpleNamespace(takes_channels=lambda call: False)  # the plain walks want all that is prepared
    found = [errors(case, torch.bfloat16, torch.device("cpu")) for case in CASES[group]]
    assert len(launched) == len(found)
    print(json.dumps(found))


@pytest.mark.parametrize("group", CASES)
def test_equal_eager(group):
    found = json.loads(interpret("test_chunked_channels_gradients", f"emulated({group!r})"))
    for case, of_case in zip(CASES[group], found, strict=True):
        assert max(of_case.values()) < SHARE, (case, of_case)


def prepared_again() -> None:
    """What a process of its own does: prints which chunks decay fast, and whether what `rapid` finds of them, and only
    of them, is what `pairs` does."""
    q, k, v = (F.normalize(torch.randn(1, heads, 130, 40), dim=-1).half() for heads in (4, 2, 2))
    g = -torch.rand(1, 4, 130, 40) * torch.tensor([2.0, 1e-3, 2.0, 1e-3])[:, None, None]
    call = Call.of(q, k, v, g, torch.rand(1, 4, 130), 1.0)
    first: Any = calls.prepare(call, keep=False)
    whole: Any = calls.prepare(call, True, first.solved)
    calls.on_hopper = SimpleNamespace(takes_channels=lambda call: True)
    calls.Call.like = lambda self, *shape: torch.full(shape, 7.0, dtype=torch.float16)  # type: ignore[method-assign]
    again: Any = calls.prepare(call, True, first.solved)
    sums = (x.g.view(4, 3, tables.CHUNK[2], 40) for x in (whole, again))
    written = (again.a != 7.0).flatten(2).any(2)
    same = [torch.equal(a[written], b[written]) for a, b in ((whole.a, again.a), tuple(sums))]
    print(json.dumps([written.tolist(), [*same, torch.equal(first.ends, again.ends), again.b is None]]))


def test_fast_chunks_are_prepared_again():
    written, same = json.loads(interpret("test_chunked_channels_gradients", "prepared_again()"))
    assert written == [[True, True, False], [False] * 3] * 2, "the last chunk has two tokens"
    assert all(same)


def adding(**options: Any) -> tuple[Call, Any]:
    """A call in which writes add, and what is prepared of it. Channels decay fast in two of four heads; one grows."""
    torch.manual_seed(1)
    q, k, v = (F.normalize(torch.randn(2, heads, 130, 40), dim=-1).half() for heads in (4, 2, 2))
    g = -torch.rand(2, 4, 130, 40) * torch.tensor([2.0, 1e-3, 2.0, 1e-3])[:, None, None]
    g[0, 1, 70, 3] = 0.1
    call = Call.of(q, k, v, g, None, 0.5)
    return call, calls.prepare(call, keep=False, **options)


def fades_alone() -> None:
    """What a process of its own does: how far fades are from those that `pairs` finds, if a way back follows and if
    not; which are infinite, and which are 0."""
    tables.LEAST = 1  # three segments of a chunk
    _, known = adding()
    calls.hopper = SimpleNamespace(takes=lambda call: True)
    found = []
    for returns in (True, False):
        call, made = adding(returns=returns)
        assert made.a is None and made.q is call.q, "nothing else is prepared"
        there = made.fades[:, :-1] != 0.0
        apart = ((made.fades - known.fades).abs() / known.fades.abs())[:, :-1][there & ~made.fades[:, :-1].isinf()]
        found.append([apart.max().item(), made.fades.isinf().tolist(), there.tolist(), made.fades[:, -1].tolist()])
    print(json.dumps(found))


def test_fades_alone():
    found = json.loads(interpret("test_chunked_channels_gradients", "fades_alone()"))
    for (apart, infinite, there, longer), last in zip(found, (True, False), strict=True):
        assert apart < 2**-18, "sums of 64 numbers in float32, in another order"
        assert infinite == [[head == 1 and c == 1 for c in range(4)] for head in range(8)]
        assert there == [[True, True, last]] * 8, "what follows the last segment asks for them on the way back alone"
        assert longer == [0.0, 1.0, *[0.0] * 6]


def fast_chunks_add() -> None:
    """What a process of its own does: which chunks `rapid` adds to o in, and how far from A v that is."""
    call, known = adding()
    before = (0.01 * torch.randn(2, 4, 130, 40)).half()
    o = before.clone()
    calls.fast_chunks(call, known.ends, None, o=o)
    v = F.pad(call.v.double(), (0, 0, 0, 62)).repeat_interleave(2, 1).view(8, 3, 64, 40)
    more = (0.5 * known.a.double() @ v).view(2, 4, 192, 40)[:, :, :130]
    written = [(part != 0.0).flatten(2).any(2).tolist() for part in (o - before).split(64, 2)]
    far = ((o - before.double()) - more)[:, ::2, :128].norm() / more[:, ::2, :128].norm()
    print(json.dumps([written, far.item()]))


def test_fast_chunks_add_to_outputs():
    written, far = json.loads(interpret("test_chunked_channels_gradients", "fast_chunks_add()"))
    assert written == [[[True, False, True, False]] * 2] * 2 + [[[False] * 4] * 2], "the last chunk has two tokens"
    assert far < 2**-9, "o, of the size of what is added, is rounded to 11 bits"


def test_what_they_take(monkeypatch):
    def call(dtype=torch.bfloat16, head_dim=128, channels=True):
        q = torch.zeros(1, 1, 64, head_dim, dtype=dtype)
        return Call.of(q, q, q, torch.zeros(q.shape if channels else q.shape[:3]), None, 1.0)

    assert not gradients.takes_channels(call())  # on a CPU
    monkeypatch.setattr(hopper, "_hopper", lambda device: True)
    assert gradients.takes_channels(call()) and gradients.takes_channels(call(head_dim=64))
    others = call(torch.float16), call(torch.float32), call(head_dim=256), call(channels=False)
    assert not any(gradients.takes_channels(other) for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", [case for group in CASES.values() for case in group], ids=str)
def test_equal_eager_on_a_gpu(case):
    assert max(errors(case, torch.bfloat16, torch.device("cuda")).values()) < SHARE
