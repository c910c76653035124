"""A call that is repeated launches what it launched when it was computed, on the tensors that it is given now."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import test_quick
from test_quick import FORMS, inputs, small
from triton import knobs

from manyheads import attention, dispatch
from manyheads.core import alike
from manyheads.core.forms import Operand, Recurrence, Scores
from manyheads.engines import triton
from manyheads.engines.triton import hopper, launch, quick, replay
from manyheads.engines.triton.chunked import autograd, op
from manyheads.engines.triton.hopper import backward, forward, tables

recorder, threads = test_quick.recorder, test_quick.threads  # fixtures
SLOPES = torch.tensor([0.3, 0.05, 0.01, 0.2])


@pytest.fixture
def computed(recorder, monkeypatch) -> list:
    """A new entry for each call that went the ordinary way."""
    monkeypatch.setattr(replay, "_KNOWN", {})
    monkeypatch.setattr(tables, "KEPT", type(tables.KEPT)())
    found: list = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "run", lambda *a, f=module.run, **k: (found.append(f), f(*a, **k))[1])
    return found


def launches(recorder, call) -> list:
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
        return numbers.setdefault(x, len(numbers)) if isinstance(x, int) and x > 2**20 else x

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
def test_repeats_what_was_computed(recorder, computed, name):
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


def test_results_are_those_of_the_ordinary_way(recorder, computed):
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
def test_calls_that_want_gradients(recorder, computed, monkeypatch, name, learned):
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


def test_operands_lie_somewhere_else_each_time(recorder, computed):
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


def test_hooks_see_every_launch(recorder, computed):
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


# ---- recurrences ----

DECAYS = {"none": (None, None), "step": ("step", None), "channel, delta": ("channel", "beta")}


@pytest.fixture
def prepared(recorder, threads, monkeypatch) -> list:
    """A new entry for each forward or backward pass that went the ordinary way, whose tensors are kept: memory that
    torch gave back would be taken once more."""
    monkeypatch.setattr(replay, "_KNOWN", {})
    found, kept = [], []
    monkeypatch.setattr(quick, "together", lambda compute, f=quick.together: (found.append(f), f(compute))[1])

    def keep(t):
        kept.append(t)
        return t

    noted, makes = quick._noted, (torch.empty_like, torch.zeros_like)
    keeping = {make: lambda t, make=make: keep(make(t)) for make in makes}
    monkeypatch.setattr(quick, "_noted", lambda make, made: keep(noted(keeping[make], made)))
    return found


def recurrence(decays, tokens=512, dim=16, turned=False):
    """q, k, v, g, beta and state, which want gradients. Keys of length 1: longer ones let a state grow without end."""
    q, k, v = torch.randn(3, 1, 2, tokens, dim, dtype=torch.bfloat16)
    k = torch.nn.functional.normalize(k, dim=-1)
    if turned:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    g = {None: None, "step": -torch.rand(1, 2, tokens), "channel": -torch.rand(1, 2, tokens, dim)}[decays[0]]
    beta = None if decays[1] is None else torch.rand(1, 2, tokens)
    given = q, k, v, g, beta, torch.randn(1, 2, dim, dim)
    return [None if t is None else t.requires_grad_() for t in given]


def run_and_differentiate(given):
    o, end = autograd.recur(*given, 0.5)
    leaves = [t for t in given if t is not None]
    return o, end, *torch.autograd.grad((o, end), leaves, (torch.ones_like(o), torch.ones_like(end)))


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("name", DECAYS)
def test_recurrences_repeat_what_was_computed(recorder, prepared, name, turned):
    first, second = (recurrence(DECAYS[name], turned=turned) for _ in range(2))
    for _ in range(2):  # compiled, then watched
        made = run_and_differentiate(first)
    count = len(prepared)
    usual = launches(recorder, lambda: run_and_differentiate(first))
    assert len(prepared) == count, "repeated"
    again = launches(recorder, lambda: run_and_differentiate(second))
    assert len(prepared) == count and again == usual
    found = run_and_differentiate(second)
    seen = [[(t.shape, t.dtype, t.stride()) for t in every] for every in (found, made)]
    assert seen[0] == seen[1] and seen[0][0][2] == second[0].stride()
    replay._KNOWN.clear()
    assert launches(recorder, lambda: run_and_differentiate(second)) == usual
    assert len(prepared) == count + 2
    with torch.no_grad():
        for _ in range(3):
            autograd.recur(*second, 0.5)
    assert len(prepared) == count + 3, "without gradients it is another kind"


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, g, beta, state: ((q, k, v, g, beta, None), 0.5),
        lambda q, k, v, g, beta, state: ((q, k, v, None, beta, state), 0.5),
        lambda q, k, v, g, beta, state: ((q, k, v, g.bfloat16(), beta, state), 0.5),
        lambda q, k, v, g, beta, state: ((q, k, v, g.expand(1, 2, -1), beta, state), 0.25),
        lambda q, k, v, g, beta, state: ((q, k, k, g, beta, state), 0.5),
        lambda q, k, v, g, beta, state: ((q[:, :, 64:], k, v, g, beta, state), 0.5),
        lambda q, k, v, g, beta, state: ((q.mT.contiguous().mT, k, v, g, beta, state), 0.5),
    ],
    ids=["no state", "no decays", "decays' dtype", "scale", "v as k", "fewer queries", "a copy"],
)
def test_recurrences_that_differ_are_computed(prepared, change):
    given = [None if t is None else t.detach() for t in recurrence(DECAYS["step"])]
    for _ in range(3):
        autograd.recur(*given, 0.5)
    count = len(prepared)
    autograd.recur(*given, 0.5)
    assert len(prepared) == count
    other, scale = change(*given)
    autograd.recur(*other, scale)
    assert len(prepared) == count + 1


def test_operators_of_torch_compile_side_by_side_too(prepared):
    given = [None if t is None else t.detach() for t in recurrence(DECAYS["step"])]
    o, _ = op.recur(*given, 0.5)
    assert len(prepared) == 1
    op.differentiate(o, None, True, *given, 0.5)
    assert len(prepared) == 2


@pytest.mark.parametrize("wants_grad", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("has_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("order", [("g", "beta"), ("beta", "g")], ids=" ".join)
def test_whole_calls_of_recurrences(recorder, prepared, monkeypatch, order, has_state, wants_grad):
    chosen: list = []
    monkeypatch.setattr(triton, "_unable", lambda x: None)
    monkeypatch.setattr(dispatch, "_fast", lambda t: True)
    monkeypatch.setattr(dispatch, "_KNOWN", {})
    monkeypatch.setattr(dispatch, "_choose", lambda *a, f=dispatch._choose: (chosen.append(a), f(*a))[1])
    declared = {name: Operand("batch heads len") for name in ("g", "beta")}
    form = Recurrence(write="delta", operands=declared, default_scale=lambda head_dim: 0.5)

    def whole(given):
        q, k, v, g, beta, state = given
        operands = {name: {"g": g[:, :1], "beta": beta}[name] for name in order}  # one decay for all heads
        return attention(
            q, k, v, form, engine="triton", state=state if has_state else None, return_state=True, **operands
        )  # fmt: skip

    def parts(given):
        q, k, v, g, beta, state = given
        return autograd.recur(q, k, v, g[:, :1].expand(g.shape), beta, state if has_state else None, 0.5)

    first, second = ([t.requires_grad_(wants_grad) for t in recurrence(("step", "beta"))] for _ in range(2))
    for _ in range(3):
        whole(first)
    assert len(chosen) == 2, "compiled, then watched"
    found, usual = (launches(recorder, lambda run=run: run(second)) for run in (whole, parts))
    assert found == usual and len(chosen) == 2
    assert [t.requires_grad for t in whole(second)] == [wants_grad] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DECAYS)
def test_kernels_compiled_side_by_side_give_the_same_bits(threads, monkeypatch, tmp_path, name):
    given = [None if t is None else t.detach().cuda().requires_grad_() for t in recurrence(DECAYS[name], 2048, 128)]
    usual = run_and_differentiate(given)
    for entry in {key[0] for key in quick._KNOWN}:
        entry.device_caches.clear()
    compiled: list = []
    monkeypatch.setattr(quick, "_ready", lambda compile, f=quick._ready: (compiled.append(compile), f(compile))[1])
    monkeypatch.setattr(quick, "_KNOWN", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    replay.forget()
    found = run_and_differentiate(given)
    assert len(compiled) > 4
    for one, other in zip(found, usual, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("name", DECAYS)
def test_repeated_recurrences_give_the_same_bits(name, turned):
    first, second = (
        [None if t is None else t.detach().cuda().requires_grad_() for t in recurrence(DECAYS[name], 300, 64, turned)]
        for _ in range(2)
    )  # fmt: skip
    for _ in range(3):
        run_and_differentiate(first)
    found = run_and_differentiate(second)
    replay.forget()
    true = run_and_differentiate(second)
    assert all(t.isfinite().all() for t in true)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, true, strict=True))


# ---- what is made ----


def repeated(compute) -> tuple[list, int]:
    """What four calls gave, and how often it was computed."""
    given, computed = (torch.zeros(16),), []

    def counted():
        computed.append(compute(*given))
        return computed[-1]

    return [replay.replayed(("kind",), given, (), tuple, counted) for _ in range(4)], len(computed)


def test_tensors_are_made_as_they_were(prepared):
    like = torch.empty(3, 4, 2).transpose(0, 1)

    def compute(given):
        made = quick.empty_like(like), quick.zeros((5, 2), torch.int32, like.device), given
        quick.launch(small, 1, (made[0], 1, 1, 2.0, None, True, 8), num_warps=1)
        return made

    found, count = repeated(compute)
    assert count == 2
    strided, zeros, given = found[-1]
    assert strided.stride() == torch.empty_like(like).stride() == (2, 8, 1)
    assert zeros.dtype is torch.int32 and zeros.shape == (5, 2) and not zeros.any()
    assert given is found[0][2] and strided.data_ptr() != found[-2][0].data_ptr()


@pytest.mark.parametrize(
    "result",
    [lambda made: made.zero_(), lambda made: made[:2], lambda made: made.view(2, 4), lambda made: made + 1],
    ids=["torch wrote to it", "a part", "a view", "a copy"],
)
def test_what_torch_did_beside_launches_is_not_repeated(prepared, result):
    def compute(given):
        made = quick.empty((8,), torch.float32, given.device)
        quick.launch(small, 1, (made, 1, 1, 2.0, None, True, 8), num_warps=1)
        return (result(made),)

    assert repeated(compute)[1] == 4


def test_what_nobody_sees_is_made_together(prepared):
    def compute(given):
        made, few, many = (quick.empty((n,), torch.float32, given.device) for n in (8, 16, 300))
        for t in (made, few, quick.zeros((16,), torch.float32, given.device), many):
            quick.launch(small, 1, (t, 1, 1, 2.0, None, True, 8), num_warps=1)
        return (made,)

    assert repeated(compute)[1] == 2
    call = replay._KNOWN[("kind",)]
    assert [(like.numel(), begins) for _, like, begins in call.scratch] == [(512 + 1536, (0, 512)), (512, (0,))]
    likes = [like for _, like, *_ in (*call.fresh, *call.scratch)]
    assert len(likes) == 3 and all(like.untyped_storage().nbytes() <= 4 for like in likes)
