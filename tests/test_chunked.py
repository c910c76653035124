"""Recurrences in Triton: in the interpreter against eager in float64, compiled for Hopper without a GPU, and on a GPU.

Triton decides at import whether it interprets, so those cases run in processes of their own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.core import Operand, Recurrence
from manyheads.core.checks import build_inputs
from manyheads.core.forms import identity
from manyheads.core.recurrence import state_shape
from manyheads.engines import eager, triton
from tests.interpreter import interpret

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compiled

CPU = torch.device("cpu")
G, BETA, GC = Operand("batch heads len"), Operand("batch heads len"), Operand("batch heads len head_dim")
WRITES = {
    "more_keys": Operand("batch kv_heads len 1 head_dim"),
    "more_values": Operand("batch kv_heads len 1 v_head_dim"),
    "beta": Operand("batch heads len 2"),
}


def slow(h: Tensor, heads: int) -> Tensor:
    return -(h + 1.0) / heads


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def twice(x: Tensor) -> Tensor:
    return torch.cat([x.sigmoid(), x.exp()], -1)


GROWING = "delta that grows"
FORMS: dict[str, Callable[[], Recurrence]] = {
    "none": Recurrence,
    "head": lambda: Recurrence(decay=slow),
    "step": lambda: Recurrence(operands={"g": G}),
    "head and step": lambda: Recurrence(decay=slow, operands={"g": G}),
    "channel": lambda: Recurrence(operands={"g": GC}),
    "head and channel": lambda: Recurrence(decay=slow, operands={"g": GC}),
    "delta": lambda: Recurrence(key_feature=unit, write="delta", operands={"beta": BETA}),
    # Overwriting nine times over makes a state longer than decays make it short.
    GROWING: lambda: Recurrence(
        key_feature=lambda k: 3 * unit(0 * k + 1), write="delta", operands={"g": G, "beta": BETA}
    ),
    "delta and head": lambda: Recurrence(key_feature=unit, decay=slow, write="delta", operands={"beta": BETA}),
    "delta and step": lambda: Recurrence(key_feature=unit, write="delta", operands={"g": G, "beta": BETA}),
    "delta and channel": lambda: Recurrence(key_feature=unit, write="delta", operands={"g": GC, "beta": BETA}),
    "features": lambda: Recurrence(
        query_feature=torch.exp, key_feature=lambda k: torch.cat([k.sigmoid(), k.cos()], -1)[..., : k.shape[-1]]
    ),
    "sum": lambda: Recurrence(query_feature=twice, key_feature=twice, normaliser="sum", operands={"g": G}),
    "sum and channel": lambda: Recurrence(
        query_feature=torch.exp, key_feature=torch.exp, normaliser="sum", least=9.0, operands={"g": GC}
    ),
    "delta twice and head": lambda: Recurrence(key_feature=unit, write="delta", decay=slow, operands=WRITES),
    "delta twice and channel": lambda: Recurrence(key_feature=unit, write="delta", operands={"g": GC, **WRITES}),
    "delta twice and sum": lambda: Recurrence(
        query_feature=torch.exp, key_feature=lambda k: k.softmax(-1), write="delta", normaliser="sum", operands=WRITES
    ),
    "slots": lambda: Recurrence(write="slots", operands={"g": Operand("batch heads len 32")}),
}
USUAL = [form for form in FORMS if form != GROWING]


@dataclass(frozen=True)
class Case:
    """heads: of queries and of keys. decay: how much is forgotten a step, at most, by the first
    `decaying` tokens or by all. segments: how many chunks one has at
    least, if not as many as the table says."""

    form: str = "step"
    q_len: int = 70
    kv_len: int = 70
    head_dim: int = 16
    v_head_dim: int = 16
    heads: tuple[int, int] = (1, 1)
    batch: int = 1
    decay: float = 0.5
    state: bool = True
    scale: float | None = None
    least: int | None = None
    decaying: int | None = None


SMALL = {
    "additive": [
        *[Case(form, 40, 40, heads=(2, 2)) for form in ("head", "head and step", "features")],
        *[Case("step", n, n, state=n > 64) for n in (1, 17, 63, 64, 65, 130)],
        Case("step", 40, 130, 24, 40, (4, 2)),
        Case("step", 33, 50, 16, 72, (2, 1), 2, state=False, scale=-0.3),
        Case("step", 160, 160, 16, 24, least=2),
        Case("none", 9, 140, least=1, state=False),
    ],
    "channels": [
        *[Case("channel", n, n, state=n > 64) for n in (1, 33, 64)],
        Case("head and channel", 30, 70, 24, 40, (2, 1)),
        Case("channel", 160, 160, 16, 24, least=2),
        Case("channel", 40, 70, 24, 40, decay=20.0),  # too strong for one product of a whole chunk
    ],
    "delta": [
        Case("delta", 40, 40, heads=(2, 2), state=False),
        Case("delta and head", 30, 65),
        *[Case("delta and step", n, n, state=n > 64) for n in (1, 17, 63, 64, 65)],
        Case("delta and step", 40, 100, 24, 40, (2, 1), 2, scale=-0.3),
        # What is left of a state behind a segment shows: little is forgotten and half of it overwritten.
        Case("delta", 100, 100, 32, 24, least=1),
        Case("delta and step", 100, 100, 32, 24, decay=0.02, least=1),
    ],
    "delta and channels": [
        *[Case("delta and channel", n, n, state=n > 64) for n in (1, 33, 65)],
        Case("delta and channel", 40, 70, 24, 40, (2, 1)),
        Case("delta and channel", 100, 100, 32, 24, decay=0.02, least=1),
        Case("delta and channel", 40, 70, 40, 24, decay=20.0),  # and its halves meet 32 channels at a time
    ],
    # Segments of three chunks of 32: behind the first one its last chunk is remembered, or three, or what was before;
    # and from the end, all of it.
    "forgotten": [
        *[Case(form, 192, 192, decay=decay, least=3) for form in ("step", "channel") for decay in (4.0, 1.2, 0.4)],
        *[Case(f"delta and {of}", 192, 192, decay=n, least=3) for of in ("step", "channel") for n in (4.0, 0.4)],
        *[Case(form, 192, 192, decay=4.0, decaying=96, least=3) for form in ("step", "delta and channel")],
    ],
    "growing": [Case(GROWING, 192, 192, decay=2.2, least=3)],
    "sums and several writes": [
        Case("sum", 40, 70, 24, 40, (4, 2), 2),
        Case("sum", 20, 20, state=False),
        Case("sum and channel", 30, 70, 16, 24, (2, 1)),
        *[Case("delta twice and head", n, n, state=n > 32) for n in (1, 17, 33)],
        Case("delta twice and channel", 30, 40, 24, 40, (2, 1), 2),
        Case("delta twice and sum", 30, 40, 16, 24, (2, 1), scale=0.3),
    ],
    "slots": [
        Case("slots", 40, 70, 24, 40, (2, 1), scale=0.7),
        Case("slots", 1, 1, state=False),
    ],
}


def computed(case: Case, engine, dtype: torch.dtype, device: torch.device, like: torch.dtype) -> dict[str, Tensor]:
    """Outputs, the state behind them and the gradients, in a dtype, of numbers that `like` holds exactly."""
    draw = torch.Generator().manual_seed(0)
    heads, kv_heads = case.heads

    def leaf(*shape: int, make=lambda x: x) -> Tensor:
        return make(torch.randn(shape, generator=draw)).to(like).to(device, dtype)

    form = FORMS[case.form]()
    # Heads behind tokens, as layers have them.
    q = leaf(case.batch, case.q_len, heads, case.head_dim).transpose(1, 2).requires_grad_()
    k = leaf(case.batch, case.kv_len, kv_heads, case.head_dim).transpose(1, 2).requires_grad_()
    v = leaf(case.batch, case.kv_len, kv_heads, case.v_head_dim).transpose(1, 2).requires_grad_()
    leaves = {"q": q, "k": k, "v": v}
    x = build_inputs(form, q, k, v, case.scale, None, None, None, {})
    ranges = {"g": lambda x: -case.decay * x.sigmoid(), "beta": torch.sigmoid}
    operands = {
        n: leaf(*o.shape(x.sizes), make=ranges.get(n, identity)).requires_grad_() for n, o in form.operands.items()
    }
    if case.decaying is not None:
        still = torch.arange(case.decaying, case.kv_len, device=device)
        operands["g"] = operands["g"].detach().index_fill(2, still, 0).requires_grad_()
    leaves |= operands
    if case.state:
        # Positive where it is divided by.
        make = torch.exp if form.normaliser == "sum" else identity
        leaves["state"] = leaf(*state_shape(form, x), make=make).requires_grad_()
    x = build_inputs(form, q, k, v, case.scale, None, None, leaves.get("state"), operands)
    assert engine.why_not(form, x) is None
    o, end = engine.run(form, x)
    assert o.dtype == q.dtype and end.dtype == torch.promote_types(q.dtype, torch.float32)
    loss = (o * leaf(*o.shape)).sum() + (end * leaf(*end.shape)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "end": end.detach()} | dict(zip((f"d{n}" for n in leaves), grads, strict=True))


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative to the size of the whole; infinite where something is not finite."""
    if case.least is not None:
        from manyheads.engines.triton.chunked import tables

        tables.LEAST = case.least
    ours = computed(case, triton, dtype, device, dtype)
    truth = computed(case, eager, torch.float64, device, dtype)
    found = {}
    for name, true in truth.items():
        # What is forgotten altogether is left out: its size says nothing.
        error = ((ours[name].double() - true).norm() / true.norm().clamp(min=1e-3)).item()
        found[name] = error if error == error else float("inf")
    return found


# ---- in the interpreter ----


def interpreted(group: str) -> None:
    """What a process of its own does: prints the errors of a group's cases."""
    torch.set_num_threads(1)
    print(json.dumps([errors(case, torch.float32, CPU) for case in SMALL[group]]))


@pytest.mark.parametrize("group", SMALL)
def test_equals_eager(group):
    found = json.loads(interpret("test_chunked", f"interpreted({group!r})"))
    for case, errors in zip(SMALL[group], found, strict=True):
        # A float32 sum over a hundred products, and exp2 of a rounded multiple of the decay; what grows a hundredfold
        # and fades again loses two digits.
        assert max(errors.values()) < (2e-4 if group == "growing" else 5e-6), (case, errors)


def strong() -> None:
    """Decays of exp(-50) a step: nothing overflows, and what is left is right. The sum of a chunk's log decays reaches
    -1600, of which float32 has 1e-4; what hangs on it alone is as far off."""
    for name in STRONG:
        found = errors(Case(name, 70, 70, decay=100.0), torch.float32, CPU)
        assert max(found.values()) < 1e-3 and found["o"] < 1e-5, found
    print("done")


def shut() -> None:
    """Gates that are shut: log decays of -inf. Every other channel and token forgets all that was before."""
    for name in STRONG:
        form, n = FORMS[name](), 70
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
        sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "len": n, "head_dim": 16, "v_head_dim": 16}
        operands = {m: torch.rand(o.shape(sizes)) for m, o in form.operands.items()}
        operands["g"] = -operands["g"]
        operands["g"].flatten()[::7] = -torch.inf
        leaves = [*(t.requires_grad_() for t in (q, k, v)), *(t.requires_grad_() for t in operands.values())]
        grads = {}
        for engine, wide in ((triton, torch.float32), (eager, torch.float32), (None, torch.float64)):
            of = {m: t.to(wide) for m, t in operands.items()}
            if engine is None:
                features = form.query_feature(q.to(wide)), form.key_feature(k.to(wide))
                o = by_tokens(*features, v.to(wide), of["g"], of.get("beta"))
            else:
                o, _ = engine.run(form, build_inputs(form, q, k, v, 1.0, None, None, None, of))
            grads[engine] = [o, *torch.autograd.grad(o.square().sum(), leaves)]
        for engine in (triton, eager):
            for found, true in zip(grads[engine], grads[None], strict=True):
                error = (found - true).norm() / true.norm()
                assert error < 1e-4, (name, engine, error)  # sums up to -5000: float32 has 5e-4 of one of them
    print("done")


def by_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
    state, found = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]), []
    for t in range(k.shape[2]):
        state = state * (g[:, :, t, :, None] if g.ndim == 4 else g[:, :, t, None, None]).exp()
        u = v[:, :, t]
        if beta is not None:
            u = beta[:, :, t, None] * (u - (k[:, :, t, :, None] * state).sum(2))
        state = state + k[:, :, t, :, None] * u[:, :, None]
        found.append((q[:, :, t, :, None] * state).sum(2))
    return torch.stack(found, 2)


def grown() -> None:
    """What overwriting three times over has made long before decays make it short again shows behind them."""
    form = FORMS["delta and step"]()
    q, k, v = (torch.zeros(1, 1, 256, 16) for _ in range(3))
    g, beta = torch.zeros(1, 1, 256), torch.zeros(1, 1, 256)
    q[..., 0] = k[..., 0] = v[:, :, 0] = 1
    beta[..., 0], beta[..., 1:64], g[..., 96:128] = 1, 3, -66 * math.log(2) / 32
    x = build_inputs(form, q, k, v, 1.0, None, None, None, {"g": g, "beta": beta})
    true, _ = eager.run(form, x.with_(**{n: getattr(x, n).double() for n in "qkv"}, operands={
        n: t.double() for n, t in x.operands.items()
    }))  # fmt: skip
    o, _ = triton.run(form, x)
    assert true[..., -1, :].abs().max() > 0.1
    assert (o - true)[:, :, 128:].norm() < 1e-3 * true[:, :, 128:].norm(), (o[..., -1, 0], true[..., -1, 0])
    print("done")


def halves() -> None:
    """Two calls, the second with the state of the first, equal one; a call repeats bit by bit."""
    for name in STRONG:
        torch.manual_seed(0)
        form, n, at = FORMS[name](), 45, 33
        q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
        sizes = {"batch": 1, "heads": 1, "len": n, "head_dim": 16}
        operands = {name: -torch.rand(o.shape(sizes)) for name, o in form.operands.items()}
        operands = {name: (t if name == "g" else -t).requires_grad_() for name, t in operands.items()}
        leaves = [q, k, v, *operands.values()]

        def part(cut: slice, state: Tensor | None, form=form, q=q, k=k, v=v, operands=operands):
            own = {name: t[:, :, cut] for name, t in operands.items()}
            x = build_inputs(form, q[:, :, cut], k[:, :, cut], v[:, :, cut], None, None, None, state, own)
            return triton.run(form, x)

        def made(outputs, leaves=leaves) -> list[Tensor]:
            o, end = outputs
            return [o, end, *torch.autograd.grad(o.square().sum() + end.square().sum(), leaves)]

        whole, again = made(part(slice(None), None)), made(part(slice(None), None))
        first, state = part(slice(at), None)
        second, end = part(slice(at, None), state)
        for a, b, c in zip(whole, again, made((torch.cat([first, second], 2), end)), strict=True):
            assert torch.equal(a, b), name
            assert (a - c).norm() < 2e-6 * a.norm(), name
    print("done")


def narrow() -> None:
    """In 16 bits, near: the interpreter cuts bits off where a GPU rounds."""
    for name in (*STRONG, "sum", "slots"):
        case = Case(name, 40, 70, 16, 24)
        assert max(errors(case, torch.bfloat16, CPU).values()) < 3e-2
        assert max(errors(case, torch.float16, CPU).values()) < 5e-3
    print("done")


def single() -> None:
    """A token after the other, each in one launch, equals all of them at once; so does one without a state."""
    for name in FORMS:
        torch.manual_seed(0)
        form, n = FORMS[name](), 3
        q, k, v = torch.randn(2, 2, n, 16), torch.randn(2, 1, n, 16), torch.randn(2, 1, n, 24)
        sizes = {"batch": 2, "heads": 2, "kv_heads": 1, "len": n, "head_dim": 16, "v_head_dim": 24}
        operands = {m: torch.rand(o.shape(sizes)) * (-1 if m == "g" else 1) for m, o in form.operands.items()}
        state, found = None, []
        for at in range(n):
            cut = slice(at, at + 1)
            own = {m: t[:, :, cut] for m, t in operands.items()}
            x = build_inputs(form, q[:, :, cut], k[:, :, cut], v[:, :, cut], None, None, None, state, own)
            before = None if state is None else state.clone()
            o, end = triton.run(form, x)
            assert state is None or torch.equal(state, before), "the state that was given stays"
            state, _ = end, found.append(o)
        o, end = triton.run(form, build_inputs(form, q, k, v, None, None, None, None, operands))
        assert (torch.cat(found, 2) - o).norm() < 1e-6 * o.norm() and (state - end).norm() < 1e-6 * end.norm(), name
    print("done")


def operators() -> None:
    """torch's checks: the schema, what is foretold of shapes and strides, autograd, and all of it traced."""
    from manyheads.engines.triton.chunked import op

    torch.manual_seed(0)
    some = {"test_utils": ("test_schema", "test_faketensor")}
    for n, width in ((20, 16), (1, 24)):
        several = n > 1
        leaves = [
            torch.randn(2, n, 2, 16).transpose(1, 2), torch.randn(2, 1, n, 16), torch.randn(2, 1, n, width),
            -torch.rand(2, 2, n, 16) if several else None, torch.rand(2, 2, n),
            torch.randn(2, 2, 16, width) if several else None,
        ]  # fmt: skip
        given = (*(t if t is None else t.requires_grad_() for t in leaves), 0.25)
        torch.library.opcheck(op.recur, given, **({} if several else some))
        do, d_end = (t.detach() for t in op.recur(*given))
        # It has no derivative of its own.
        torch.library.opcheck(op.differentiate, (do, d_end if several else None, several, *given), **some)
    print("done")


def whole() -> None:
    """One graph: outputs, states and gradients as without torch.compile; one more for all other lengths, and one for
    steps of decoding. A row is cut into segments."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from manyheads.engines.triton.chunked import tables

    tables.LEAST = 1
    form = FORMS["delta twice and sum"]()

    def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor, **operands: Tensor) -> tuple[Tensor, Tensor]:
        given: dict = {"engine": "triton", "state": state, "return_state": True}
        return manyheads.attention(2 * q, k, v, form, **given, **operands)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for n in (9, 7, 40, 1):
        q, k, v = torch.randn(1, 2, n, 16), torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
        x = build_inputs(form, q, k, v, None, None, None, None, {})
        operands = {name: torch.rand(o.shape(x.sizes)).requires_grad_() for name, o in form.operands.items()}
        leaves = [t.requires_grad_() for t in (q, k, v, torch.rand(state_shape(form, x)))]
        found = []
        for function in (attend, compiled):
            with torch.set_grad_enabled(n > 1):  # a single token has a kernel of its own where none are wanted
                o, end = function(*leaves, **operands)
            loss, read = o.square().sum() + end.square().sum(), [*leaves, *operands.values()]
            found.append([o, end, *(torch.autograd.grad(loss, read) if n > 1 else ())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), n
    assert counter.frame_count == 3, counter.frame_count
    print("done")


def published() -> None:
    """Mechanisms by their names, through the front door, against their references, and with the state they return."""
    names = [name for name in manyheads.names() if causal(name)]
    assert {"kimi_delta_attention", "deltaproduct", "gated_slot_attention", "fastmax"} <= set(names)
    for name in names:
        torch.manual_seed(0)
        form, n, at = manyheads.get(name)(), 9, 7
        q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
        sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "len": n, "head_dim": 16, "v_head_dim": 16}
        operands = {m: o.activation(torch.randn(o.shape(sizes))) for m, o in form.operands.items()}
        call = partial(manyheads.attention, mechanism=name, engine="triton")
        true = manyheads.get(name).reference(*(t.double() for t in (q, k, v)), **operands)
        o = call(q, k, v, **operands)
        cuts = slice(at), slice(at, None)
        state, parts = None, []
        for cut in cuts:
            own = {m: t[:, :, cut] for m, t in operands.items()}
            part, state = call(q[:, :, cut], k[:, :, cut], v[:, :, cut], state=state, return_state=True, **own)
            parts.append(part)
        for found in (o, torch.cat(parts, 2)):
            assert (found - true).norm() < 5e-6 * true.norm(), name
    print("done")


def causal(name: str) -> bool:
    """Whether the kernels say that they run it."""
    form = manyheads.get(name)()
    if not isinstance(form, Recurrence):
        return False
    q = torch.zeros(1, 2, 8, 16)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "len": 8, "head_dim": 16, "v_head_dim": 16}
    operands = {m: torch.zeros(o.shape(sizes)) for m, o in form.operands.items()}
    return triton.why_not(form, build_inputs(form, q, q, q, None, None, None, None, operands)) is None


STRONG = ["step", "channel", "delta and step", "delta and channel"]


@pytest.mark.parametrize(
    "what", ["strong", "shut", "grown", "halves", "narrow", "single", "operators", "whole", "published"]
)
def test_in_the_interpreter(what):
    assert interpret("test_chunked", f"{what}()") == "done"


# ---- without a GPU and without the interpreter ----


def objection(form: Recurrence, dtype=torch.float32, head_dim=16, q_len=8, **operands: Tensor) -> str | None:
    q, k = (torch.zeros(1, 2, n, head_dim, dtype=dtype) for n in (q_len, 8))
    return triton.why_not(form, build_inputs(form, q, k, k, None, None, None, None, operands))


def test_says_what_it_cannot_do(monkeypatch):
    plain = Recurrence()
    assert "not on cpu" in objection(plain)
    monkeypatch.setattr(triton, "_interprets", lambda: True)
    assert objection(plain) is None
    assert objection(FORMS["delta and channel"](), g=torch.zeros(1, 2, 8, 16), beta=torch.zeros(1, 2, 8)) is None
    assert "float64" in objection(plain, torch.float64)
    assert "head_dim up to 256" in objection(plain, head_dim=257)
    assert "causal" in objection(Recurrence(causal=False))
    assert "q_len is 0" in objection(plain, q_len=0)
    doubled = Recurrence(query_feature=lambda q: torch.cat([q, q], -1), key_feature=lambda k: torch.cat([k, k], -1))
    assert objection(doubled) is None and "up to 256, not 260" in objection(doubled, head_dim=130)
    q, at = torch.zeros(1, 2, 8, 16), torch.arange(8)[None]
    assert "absent" in triton.why_not(plain, build_inputs(plain, q, q, q, None, at, at, None, {}))
    assert "by name" in triton.hesitates(plain, build_inputs(plain, q, q, q, None, None, None, None, {}))


# Words that a kernel spills, at most, with Triton 3.6 and 3.7: addresses of states, needed again behind the loop, and
# accumulators while others are read. Tiles half as wide, which spill less, would read the keys twice as often.
SPILLED = {
    "walk add 128": 26, "walk delta 128": 44, "walk delta channels 128": 8, "back add 128": 4, "back delta 128": 16,
    "back segments delta 128": 64, "gradients channels 128": 8, "gradients delta 128": 128,
    "gradients delta channels 128": 76, "inner delta channels 128": 24, "inner blocks channels 128": 88,
    "inner blocks delta channels 128": 236, "pairs channels 128": 57, "pairs delta channels 128": 150,
    "walk delta channels 256": 40, "back delta channels 256": 16, "solve delta 128": 6, "solve delta channels 128": 6,
}  # fmt: skip
CHECKED = [
    *SPILLED, "walk segments add 128", "gradients add 128", "inner channels 128",
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_uses_what_a_hopper_has(name):
    pytest.importorskip("triton.backends.nvidia")
    made = compiled.read(dict(compiled.recurrence_kernels())[name]())
    assert made.spilled <= SPILLED.get(name, 0) and made.shared <= compiled.LIMIT, made
    assert (made.hgmma > 0) != name.startswith("solve"), made  # one warp has a chunk, and HGMMA is for four


# ---- on a GPU ----

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
REAL = [
    *[Case(form, 1000, 1000, 64, 64, (4, 2), 2) for form in USUAL],
    *[Case(form, 777, 1100, 128, 128, (4, 4)) for form in STRONG],
    *[Case(form, 4100, 4100, 128, 128, (1, 1)) for form in STRONG],
    *[Case(form, 300, 300, 256, 128, (2, 2)) for form in ("step", "delta and channel")],
    *[Case(form, 300, 300, 128, 128, (2, 2)) for form in ("step", "delta and step")],  # states of 16 bits, one segment
    *[Case("delta and channel", n, n, 64, 64, state=False) for n in (1, 17, 63, 64, 65)],
]
# Each dtype and head_dim is compiled anew: a second or two a kernel.
PAIRS = [(case, dtype) for case in REAL for dtype in BOUNDS if case.head_dim == 64 or dtype == torch.bfloat16]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_equals_eager_on_a_gpu(case, dtype):
    found = errors(case, dtype, torch.device("cuda"))
    # A correction is a difference of numbers that were rounded.
    assert max(found.values()) < BOUNDS[dtype] * (2 if "delta" in case.form else 1), found


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", USUAL)
def test_repeats_bit_by_bit_on_a_gpu(form):
    case = Case(form, 2048, 2048, 128, 128, (4, 2), 2)
    runs = [computed(case, triton, torch.bfloat16, torch.device("cuda"), torch.bfloat16) for _ in range(3)]
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]) and torch.equal(first, runs[2][name]), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", STRONG)
def test_strong_decays_on_a_gpu(form):
    case = Case(form, 2048, 2048, 128, 128, (2, 2), decay=100.0)
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 2.4e-2)):  # of float32, as in the interpreter
        assert max(errors(case, dtype, torch.device("cuda")).values()) < bound


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", USUAL)
def test_a_token_at_a_time_on_a_gpu(form):
    form, device, n = FORMS[form](), torch.device("cuda"), 3
    q, k, v = (torch.randn(2, heads, n, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "len": n, "head_dim": 64, "v_head_dim": 64}
    operands = {
        m: torch.rand(o.shape(sizes), device=device) * (-1 if m == "g" else 1) for m, o in form.operands.items()
    }
    state, found = None, []
    for at in range(n):
        cut = slice(at, at + 1)
        own = {m: t[:, :, cut] for m, t in operands.items()}
        x = build_inputs(form, q[:, :, cut], k[:, :, cut], v[:, :, cut], None, None, None, state, own)
        o, state = triton.run(form, x)
        found.append(o)
    x = build_inputs(form, *(t.double() for t in (q, k, v)), None, None, None, None, operands)
    o, end = eager.run(form, x)
    assert (torch.cat(found, 2) - o).norm() < 5e-3 * o.norm() and (state - end).norm() < 5e-3 * end.norm()


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("form", STRONG)
def test_waits_for_nothing_and_new_lengths_compile_nothing(form):
    from manyheads.engines.triton.chunked.kernels import back, gates, gradients, inner, pairs, solve, walk

    kernels = walk.walk, walk.carry, back.back, gradients.gradients, inner.inner, pairs.pairs, solve.solve, gates.gates
    counts = []
    for n in (2048, 1999, 2048, 1984, 1983):  # of whole chunks and of others
        torch.cuda.set_sync_debug_mode("error" if len(counts) > 1 else "default")
        try:
            computed_on_device(form, n)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()))
    assert counts[1] == counts[2] == counts[3] == counts[4]


def computed_on_device(name: str, n: int) -> None:
    form = FORMS[name]()
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sizes = {"batch": 1, "heads": 2, "len": n, "head_dim": 64}
    operands = {
        m: torch.rand(o.shape(sizes), device="cuda") * (-1 if m == "g" else 1) for m, o in form.operands.items()
    }
    o, end = triton.run(form, build_inputs(form, q, k, v, None, None, None, None, operands))
    torch.autograd.grad((o.float().sum() + end.sum()), (q, k, v))
