"""The operators that torch.compile sees: torch's own checks of them, one graph, and one graph for many masks.

On a CPU the kernels run in Triton's interpreter, and so in processes of their own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.core import Operand, Scores, Selection
from manyheads.core.attending import Operators, given, scores_of, with_captured
from manyheads.core.checks import build_inputs
from manyheads.core.forms import form_of
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import choose
from manyheads.engines import eager, sdpa
from manyheads.engines.triton import op
from tests.interpreter import interpret


def causal(b, h, i, j):
    return j <= i


def window(size: int) -> Scores:
    return Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < size))


def sloped(slopes: Tensor) -> Scores:
    return Scores(mask=causal, score=lambda s, b, h, i, j: s - slopes[h] * (i - j))


def forgetful(**more) -> Scores:
    return Scores(
        mask=causal, score=lambda s, b, h, i, j, g: s + g[b, h, i] - g[b, h, j],
        operands={"g": Operand("batch heads len"), **more.pop("operands", {})}, **more,
    )  # fmt: skip


def cases() -> dict[str, tuple[Scores, dict[str, Tensor]]]:
    """A form, and its operands and positions."""
    slopes = torch.tensor([0.3, 0.1], requires_grad=True)
    g = torch.randn(2, 2, 12, requires_grad=True)
    c = torch.ones(2, requires_grad=True)
    at = torch.stack([torch.arange(12), (torch.arange(12) - 4).clamp(min=-1)])
    return {
        "causal": (Scores(mask=causal), {}),
        "window": (window(5), {}),
        "soft-cap": (manyheads.get("gemma2")(window=9, cap=2.0), {}),
        "ALiBi": (sloped(slopes), {}),
        "tokens": (forgetful(), {"g": g}),
        "sink": (forgetful(sink="c", operands={"c": Operand("heads")}), {"g": g, "c": c}),
        "padding": (forgetful(), {"g": g, "q_positions": at[:, 3:], "kv_positions": at}),
    }  # fmt: skip


def selections() -> dict[str, tuple[Selection, dict[str, Tensor]]]:
    """The score of the third one reads a captured tensor and an operand, which learn."""
    slopes, c = torch.tensor([0.3, 0.1], requires_grad=True), torch.tensor([0.7, 1.2], requires_grad=True)
    learns = Scores(
        mask=causal, score=lambda s, b, h, i, j, c: s * c[h] - slopes[h] * (i - j), operands={"c": Operand("heads")}
    )
    moba = manyheads.get("moba")(block_size=4, top_k=2)
    return {
        "moba": (moba, {}),
        "flexprefill": (manyheads.get("flexprefill")(gamma=0.6, tau=0.0, block_size=3, min_budget=3), {}),
        "learns": (
            Selection(select=moba.select, scores=learns, query_block=1, key_block=4, operands=learns.operands),
            {"c": c},
        ),
    }  # fmt: skip


def leaves(q_len: int = 9, kv_len: int = 12, kv_heads: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, q_len, 2, 16).transpose(1, 2)
    k, v = torch.randn(2, kv_heads, kv_len, 16), torch.randn(2, kv_heads, kv_len, 8)
    return [t.requires_grad_() for t in (q, k, v)]


# ---- what processes of their own do ----


def checked() -> None:
    """torch's checks: the schema, what is foretold of shapes and strides, autograd, and all of it traced."""
    for name, (form, operands) in cases().items():
        print(name, file=sys.stderr)
        at = [operands.pop(which, None) for which in ("q_positions", "kv_positions")]
        x = build_inputs(form, *leaves(), None, *at, None, operands)
        check(op.ATTEND, form, x)
    for name, (form, operands) in selections().items():
        print(name, file=sys.stderr)
        check(op.ATTEND, form, build_inputs(form, *leaves(), None, None, None, None, operands))


def check(engine: Operators, form: Scores | Selection, x: Inputs) -> None:
    x = x.with_(operands={name: t.detach().requires_grad_() for name, t in x.operands.items()})  # leaves
    what = given(form, x, choose(form, x) if isinstance(form, Selection) else None)
    torch.library.opcheck(engine.forward, what)
    o, lse = (t.detach() for t in engine.forward(*what))
    needed = [True] * (3 + len(what[4]) + len(what[5]))
    tests = "test_schema", "test_faketensor"  # it has no derivative of its own
    torch.library.opcheck(engine.backward, (o, lse, o, lse, needed, *what), test_utils=tests)


def whole() -> None:
    one_graph("triton", cases())


def selected() -> None:
    one_graph("triton", selections())


def one_graph(engine: str, forms: Mapping[str, tuple[Scores | Selection, dict[str, Tensor]]]) -> None:
    """One graph: outputs and gradients as without torch.compile, the lse's included."""
    for name, (form, rest) in forms.items():
        print(name, file=sys.stderr)
        inputs = leaves()
        read = [t for t in (*scores_of(form).program.tensors, *rest.values()) if t.requires_grad]

        def layer(q: Tensor, k: Tensor, v: Tensor, form=form, rest=rest) -> tuple[Tensor, Tensor]:
            if engine == "sdpa":
                return manyheads.attention(2 * q, k, v, form, engine=engine, **rest), q.new_zeros(1)
            o, lse = manyheads.attention(2 * q, k, v, form, engine=engine, return_lse=True, **rest)
            return o + 1, lse

        found = []
        torch._dynamo.reset()
        for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            o, lse = function(*inputs)
            weighed = (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum()
            loss = weighed + torch.where(lse.isneginf(), 0.0, lse).square().sum()
            found.append([o, lse, *torch.autograd.grad(loss, [*inputs, *read])])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), (name, (a - b).abs().max())
        with torch.no_grad():
            assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)[0], found[0][0])


def shared() -> None:
    """A hundred masks of all kinds in one graph; others, with one or another number of captured tensors, in their
    own. Never more than torch allows, behind which it would stop to compile."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    q, k, v = leaves(9, 9)

    def attend(form: Scores) -> Tensor:
        return manyheads.attention(q, k, v, form, engine="triton")

    compiled = torch.compile(attend, backend=counter, fullgraph=True)

    def steps(n: int) -> Scores:
        def mask(b, h, i, j):
            seen = j <= i
            for step in range(n % 10):
                seen = seen & (i - j != step + 2)
            return seen if n < 50 else seen | (j == n % 7)

        return Scores(mask=mask)

    for form in (*map(steps, range(80)), *map(window, range(1, 21))):
        assert torch.equal(compiled(form), attend(form))
    assert counter.frame_count == 1, counter.frame_count
    for slopes in torch.rand(11, 2):
        form = sloped(slopes)
        assert torch.equal(compiled(form), attend(form))
    assert counter.frame_count == 2, counter.frame_count


def lengths() -> None:
    """A form or a name, at one length after the other: two graphs, and one more for steps of decoding."""
    from torch._dynamo.testing import CompileCounterWithBackend

    form = manyheads.get("sliding_window")(window=5)
    ways = (
        lambda q, k: manyheads.attention(q, k, k, form, engine="triton"),
        lambda q, k: manyheads.attention(q, k, k, "sliding_window", window=5, engine="triton"),
    )
    for attend in ways:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attend, backend=counter, fullgraph=True)
        for q_len, kv_len in ((9, 9), (12, 12), (17, 17), (30, 30), (1, 9), (1, 12), (1, 23)):
            q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 1, kv_len, 16)
            assert torch.equal(compiled(q, k), attend(q, k))
        assert counter.frame_count == 3, counter.frame_count


def backward_later() -> None:
    """Between a forward pass and its backward pass come those of other forms; the first form is gone by then."""
    q, k, v = leaves(12, 9)  # keys begin at 3

    def attend(form: Scores) -> Tensor:
        return manyheads.attention(q, k, v, form, engine="triton")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    outputs = [compiled(window(size)) for size in (3, 9)]
    expected = [attend(window(size)) for size in (3, 9)]
    for a, b in zip(outputs, expected, strict=True):
        pairs = zip(torch.autograd.grad(a.sum(), (q, k, v)), torch.autograd.grad(b.sum(), (q, k, v)), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def keys_alone() -> None:
    """Gradients of some of the inputs; none through o."""
    q, k, v = leaves()
    form = window(5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return manyheads.attention(q, k, v, form, engine="triton", return_lse=True)

    found = [
        torch.autograd.grad(function(q.detach(), k, v.detach())[1].square().sum(), k)[0]
        for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True))
    ]
    assert torch.equal(*found) and found[0].any()


# ---- tests ----


@pytest.mark.parametrize("what", ["checked", "whole", "selected", "shared", "lengths", "backward_later", "keys_alone"])
def test_in_the_interpreter(what):
    interpret("test_op", f"{what}()", strict=False)


def test_copies_are_forms_of_their_own():
    form = window(5)
    assert form_of(form.handle.shape[0]) is form
    other = copy.deepcopy(form)
    assert form_of(other.handle.shape[0]) is other and other.program is not None
    with pytest.raises(KeyError):
        form_of(0)


def test_other_tensors_are_what_is_read():
    """An operator computes with the tensors that it is given, not with those of the form."""
    slopes = torch.tensor([0.3, 0.1])
    form = sloped(slopes)
    assert with_captured(form, [slopes]) is form and with_captured(form, [slopes.detach()]) is form
    other = with_captured(form, [slopes + 1])
    assert other.program.tensors[0].tolist() == (slopes + 1).tolist() and form.program.tensors[0] is slopes
    assert with_captured(form, [slopes.clone()]) is not form


def test_what_an_operator_is_given_is_read():
    """Not what the form captured, in either pass."""
    select = manyheads.get("moba")(block_size=4, top_k=2).select

    def chosen(slopes: Tensor) -> Selection:
        return Selection(select=select, scores=sloped(slopes), query_block=1, key_block=4)

    for make in (sloped, chosen):
        form = make(torch.tensor([0.3, 0.1]))
        x = build_inputs(form, *leaves(), None, None, None, None, {})
        what = list(given(form, x, choose(form, x) if isinstance(form, Selection) else None))
        what[4] = [other := torch.tensor([1.3, 1.1], requires_grad=True)]
        found, true = eager.COMPILED.forward(*what)[0], eager.run(make(other), x)[0]
        assert torch.equal(found, true) and not torch.equal(found, eager.run(form, x)[0])
        assert torch.equal(*(torch.autograd.grad(o.square().sum(), other)[0] for o in (found, true)))


@pytest.mark.parametrize("engine", [eager, sdpa])
def test_engines_of_torch_are_operators(engine):
    forms = {**cases(), **selections()}
    if engine is sdpa:  # which takes no score function
        forms = {name: forms[name] for name in ("window", "moba", "flexprefill")}
    for form, operands in forms.values():
        at = [operands.get(which) for which in ("q_positions", "kv_positions")]
        rest = {name: value for name, value in operands.items() if name in form.operands}
        check(engine.COMPILED, form, build_inputs(form, *leaves(), None, *at, None, rest))
    half = [t.detach().bfloat16().requires_grad_() for t in leaves()]
    check(engine.COMPILED, form := window(5), build_inputs(form, *half, None, None, None, None, {}))
    one_graph(engine.__name__.split(".")[-1], forms)


def settings_of(name: str) -> dict[str, Any]:
    return dict(manyheads.get(name).examples[0])


def test_a_selection_at_any_length_is_two_graphs():
    from torch._dynamo.testing import CompileCounterWithBackend

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return manyheads.attention(q, k, k, "moba", block_size=4, top_k=2)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for length in (9, 12, 17, 30):
        q, k = torch.randn(1, 2, length, 16), torch.randn(1, 1, length, 16)
        assert torch.equal(compiled(q, k), attend(q, k))
    assert counter.frame_count == 2, counter.frame_count


SELECTIONS = [name for name in manyheads.names() if isinstance(manyheads.get(name)(**settings_of(name)), Selection)]


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_is_one_graph(name):
    """By its name, with the engine that is taken without being asked for: the choice is traced."""
    inputs, settings = leaves(40, 40), settings_of(name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return manyheads.attention(q, k, v, name, **settings)

    torch._dynamo.reset()
    # Compiled first: what a form finds out later would not be there.
    found = [f(*inputs) for f in (torch.compile(attend, backend="aot_eager", fullgraph=True), attend)]
    assert torch.equal(*found)
    assert all(map(torch.equal, *(torch.autograd.grad(o.square().sum(), inputs) for o in found)))
