"""A call that is repeated launches what it launched when it was computed, on the tensors that it is given now."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from test_quick import FORMS, inputs, recorder  # noqa: F401  a fixture
from triton import knobs

from manyheads.core import alike
from manyheads.core.forms import Operand, Scores
from manyheads.engines.triton import hopper, launch, replay
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
    """What each launch was handed, tensors and their addresses by the order in which they come first."""
    recorder.launches.clear()
    recorder.encoded.clear()
    keep = call()
    numbers: dict = {}

    def renamed(x):
        if isinstance(x, tuple):
            if len(x) == 3 and x[0] == "tensor":
                return renamed(x[1])
            return tuple(map(renamed, x))
        return numbers.setdefault(x, len(numbers)) if isinstance(x, int) and x > 2**32 else x

    found = [renamed(launch) for launch in recorder.launches]
    del keep
    return found


def forward_and_backward(form, x):
    o, lse = hopper.run(form, x)
    return o, lse, *hopper.gradients(form, x, o, lse, torch.ones_like(o), None)


READING = {
    **FORMS,
    "gate": Scores(
        mask=FORMS["causal"].mask, score=lambda s, b, h, i, j, gate, bias: s * gate[b, h, j] + bias[h] - SLOPES[h],
        operands={"gate": Operand("batch heads len"), "bias": Operand("heads")},
    ),
    "sink": Scores(sink="sink", operands={"sink": Operand("heads")}),
}  # fmt: skip


def given_to(form, q_len, kv_len):
    x = inputs(q_len, kv_len)
    return x.with_(operands={name: torch.rand(operand.shape(x.sizes)) for name, operand in form.operands.items()})


@pytest.mark.parametrize("name", READING)
def test_repeats_what_was_computed(recorder, computed, name):  # noqa: F811
    form = READING[name]
    for shape in ((130, 300), (512, 512), (1, 700)):
        computed.clear()
        first, second = given_to(form, *shape), given_to(form, *shape)
        for _ in range(2):  # compiled, then watched
            forward_and_backward(form, first)
        count = len(computed)
        usual = launches(recorder, lambda x=first: forward_and_backward(form, x))
        assert len(computed) == count, "repeated"
        again = launches(recorder, lambda x=second: forward_and_backward(form, x))
        assert len(computed) == count and again == usual
        replay._KNOWN.clear()
        assert launches(recorder, lambda x=second: forward_and_backward(form, x)) == usual
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


def differentiated(attend, x):
    tensors = x.q, x.k, x.v, *x.operands.values()
    o, lse = attend(x, tensors)
    return o, lse, *torch.autograd.grad(o, [t for t in tensors if t.requires_grad], torch.ones_like(o))


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned"])
@pytest.mark.parametrize("name", READING)
def test_calls_that_want_gradients(recorder, computed, monkeypatch, name, learned):  # noqa: F811
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, (first, second) = READING[name], (given_to(READING[name], 256, 256) for _ in range(2))
    for x in (first, second):
        for t in (x.q, x.v, *(x.operands.values() if learned else ())):
            t.requires_grad_()

    def usual(x, _):
        return launch.attend(form, x)

    assert launch.again(form, first) is None
    for _ in range(2):
        differentiated(usual, first)
    count, run_again = len(computed), launch.again(form, first)
    expected = launches(recorder, lambda: differentiated(usual, first))
    found = launches(recorder, lambda: differentiated(lambda _, tensors: run_again(tensors), second))
    assert len(computed) == count and len(found) == len(expected)
    if learned:  # places in memory that torch gave back are taken once more, or not
        found, expected = ([launch[:5] for launch in every] for every in (found, expected))
    assert found == expected
    with torch.no_grad():
        unlike = launch.again(form, first)
        assert not unlike((second.q, second.k, second.v, *second.operands.values()))[0].requires_grad


def test_nothing_that_was_given_is_kept(computed, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    form, x = READING["gate"], given_to(READING["gate"], 256, 256)
    x.q.requires_grad_()
    for _ in range(3):
        differentiated(lambda x, _: launch.attend(form, x), x)
    run_again = launch.again(form, x)
    made = run_again((x.q, x.k, x.v, *x.operands.values()))
    seen = [weakref.ref(t) for t in (x.q, x.k, x.v, *x.operands.values(), *made)]
    del x, made
    gc.collect()
    assert [ref() for ref in seen] == [None] * 7


def test_captured_tensors_may_begin_to_learn(computed, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    slopes = SLOPES.clone()
    form, x = Scores(score=lambda s, b, h, i, j: s - slopes[h] * (i - j)), inputs(256, 256)
    settled(form, x)
    run_again = launch.again(form, x)
    assert run_again((x.q, x.k, x.v)) is not None
    slopes.requires_grad_()
    assert run_again((x.q, x.k, x.v)) is None
    with torch.no_grad():
        assert run_again((x.q, x.k, x.v)) is not None
        slopes.mul_(2)
        assert run_again((x.q, x.k, x.v)) is None


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


def test_operands_lie_somewhere_else_each_time(recorder, computed):  # noqa: F811
    form, x = READING["gate"], given_to(READING["gate"], 256, 256)
    settled(form, x)
    count = len(computed)
    other = {**x.operands, "bias": torch.rand(4)}
    settled(form, x.with_(operands=other))
    assert len(computed) == count, "repeated"
    recorder.launches.clear()
    hopper.run(form, x.with_(operands=other))
    read = {a for launch in recorder.launches for part in launch if isinstance(part, tuple) for a in part}
    assert {t.data_ptr() for t in other.values()} <= read and x.operands["bias"].data_ptr() not in read
    strided = {**other, "bias": torch.rand(8)[::2]}
    hopper.run(form, x.with_(operands=strided))
    hopper.run(form, x.with_(operands={**other, "bias": torch.rand(5)[1:]}))
    hopper.run(form, x.with_(operands={**other, "bias": torch.rand(4).double()}))
    assert len(computed) == count + 3


def test_what_is_not_known_by_name_is_computed(computed):
    counts, x = [len(computed)], inputs(256, 256)
    masked = Scores(mask=lambda b, h, i, j, of: of[b, i] == of[b, j], operands={"of": Operand("batch len")})
    moved = given_to(READING["gate"], 256, 256).with_(q_positions=range(5, 261), kv_positions=range(5, 261))
    sink = x.with_(operands={"sink": torch.rand(4).half()})
    both = torch.rand(4)
    twice = Scores(
        score=lambda s, b, h, i, j, bias: s + bias[h] * both[h], operands={"bias": Operand("heads")}
    )  # fmt: skip
    for form, given in (
        (FORMS["causal"], x.with_(q_positions=torch.arange(256)[None], kv_positions=torch.arange(256)[None])),
        (masked, x.with_(operands={"of": torch.zeros(1, 256)})),
        (READING["gate"], moved),
        (READING["sink"], sink),
        (twice, x.with_(operands={"bias": both})),
    ):  # fmt: skip
        settled(form, given)
        counts.append(len(computed))
    assert [b - a for a, b in pairwise(counts)] == [3] * 5
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
    monkeypatch.setattr(alike, "CALLS", 3)
    for length in range(128, 134):
        settled(FORMS["causal"], inputs(length, length))
    assert len(replay._KNOWN) == 3
