"""A call that is repeated launches what it launched when it was computed, on the tensors that it is given now."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from test_quick import FORMS, inputs, recorder  # noqa: F401  a fixture
from triton import knobs

from manyheads.core.forms import Operand, Scores
from manyheads.engines.triton import hopper, replay
from manyheads.engines.triton.hopper import backward, forward, tables

SLOPES = torch.tensor([0.3, 0.05, 0.01, 0.2])


@pytest.fixture
def computed(recorder, monkeypatch) -> list:  # noqa: F811
    """A new entry for each call that went the ordinary way."""
    monkeypatch.setattr(replay, "_KNOWN", {})
    monkeypatch.setattr(tables, "KEPT", type(tables.KEPT)())
    found: list = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "run", lambda *a, f=module.run, **k: (found.append(f), f(*a, **k))[1])
    return found


def launches(recorder, call) -> list:  # noqa: F811
    """What each launch was handed, with places in memory by the order in which they come first."""
    recorder.launches.clear()
    recorder.encoded.clear()
    keep = call()
    numbers: dict = {}

    def renamed(x):
        if isinstance(x, tuple):
            if len(x) == 3 and x[0] == "tensor":
                return "tensor", numbers.setdefault(x[1], len(numbers)), x[2]
            return tuple(map(renamed, x))
        return numbers.setdefault(x, len(numbers)) if isinstance(x, int) and x > 2**32 else x

    found = [renamed(launch) for launch in recorder.launches]
    del keep
    return found


def forward_and_backward(form, x):
    o, lse = hopper.run(form, x)
    return o, lse, *hopper.gradients(form, x, o, lse, torch.ones_like(o), None)


@pytest.mark.parametrize("name", FORMS)
def test_repeats_what_was_computed(recorder, computed, name):  # noqa: F811
    for shape in ((130, 300), (512, 512), (1, 700)):
        computed.clear()
        first, second = inputs(*shape), inputs(*shape)
        for _ in range(2):  # compiled, then watched
            forward_and_backward(FORMS[name], first)
        count = len(computed)
        usual = launches(recorder, lambda x=first: forward_and_backward(FORMS[name], x))
        assert len(computed) == count, "repeated"
        again = launches(recorder, lambda x=second: forward_and_backward(FORMS[name], x))
        assert len(computed) == count and again == usual
        replay._KNOWN.clear()
        assert launches(recorder, lambda x=second: forward_and_backward(FORMS[name], x)) == usual
        assert len(computed) == count + 2


def test_results_are_those_of_the_ordinary_way(recorder, computed):  # noqa: F811
    x = inputs(300, 300, dim=128)
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        o, lse = hopper.run(FORMS["full"], x)
        usual = None
        for _ in range(4):
            found = hopper.gradients(FORMS["full"], x, o, lse, o, None, needed)
            assert [t is not None for t in found] == list(needed)
            seen = [(t.shape, t.dtype, t.stride()) for t in found if t is not None]
            usual = usual or seen
            assert seen == usual
    assert len({t.data_ptr() for t in hopper.run(FORMS["full"], x)} | {x.q.data_ptr()}) == 3


def settled(form, x) -> None:
    for _ in range(3):
        hopper.run(form, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.with_(scale=0.5),
        lambda x: x.with_(k=x.q[:, :2], v=x.q[:, :2]),
        lambda x: x.with_(k=x.v),
        lambda x: x.with_(q=x.q.half(), k=x.k.half(), v=x.v.half()),
        lambda x: x.with_(q=x.q.transpose(1, 2).contiguous().transpose(1, 2)),
        lambda x: x.with_(q_positions=range(5, 261), kv_positions=range(5, 261)),
    ],
    ids=["scale", "one tensor twice", "v as k", "dtype", "strides", "positions"],
)
def test_what_differs_is_computed(computed, change):
    x = inputs(256, 256)
    settled(FORMS["causal"], x)
    count = len(computed)
    hopper.run(FORMS["causal"], x)
    assert len(computed) == count
    hopper.run(FORMS["causal"], change(x))
    assert len(computed) == count + 1


def test_copies_are_never_repeated(computed):
    """Rows that do not lie as the hardware wants them are copied: what was copied once is not what it is now."""
    x = inputs(256, 256)
    strange = x.with_(q=torch.randn(1, 4, 64, 256, dtype=torch.bfloat16).mT)
    odd = torch.randn(1, 4, 256, 72, dtype=torch.bfloat16)[..., 1:65]
    negative = x.with_(scale=-0.1)
    for one in (strange, x.with_(q=odd), negative):
        count = len(computed)
        for _ in range(4):
            hopper.run(FORMS["causal"], one)
        assert len(computed) == count + 4


def test_captured_numbers_may_change(computed):
    slopes = SLOPES.clone()
    form = Scores(score=lambda s, b, h, i, j: s - slopes[h] * (i - j))
    x = inputs(256, 256)
    settled(form, x)
    count = len(computed)
    slopes.mul_(2)
    hopper.run(form, x)
    assert len(computed) == count + 1


def test_what_is_not_known_by_name_is_computed(computed):
    form = Scores(score=lambda s, b, h, i, j, gate: s * gate[b, h, j], operands={"gate": Operand("batch heads len")})
    x = inputs(256, 256).with_(operands={"gate": torch.rand(1, 4, 256)})
    count = len(computed)
    settled(form, x)
    ragged = inputs(256, 256).with_(q_positions=torch.arange(256)[None], kv_positions=torch.arange(256)[None])
    settled(FORMS["causal"], ragged)
    assert len(computed) == count + 6
    assert not replay._KNOWN


def test_hooks_see_every_launch(recorder, computed):  # noqa: F811
    x, seen = inputs(256, 256), []
    settled(FORMS["causal"], x)
    count = len(computed)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        hopper.run(FORMS["causal"], x)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(computed) == count + 1
    hopper.run(FORMS["causal"], x)
    assert len(computed) == count + 1, "still known"


def test_no_more_calls_are_kept_than(computed, monkeypatch):
    monkeypatch.setattr(replay, "CALLS", 3)
    for length in range(128, 134):
        settled(FORMS["causal"], inputs(length, length))
    assert len(replay._KNOWN) == 3
