"""The operators that torch.compile sees: torch's own checks of them, one graph, and one graph for many masks.

On a CPU the kernels run in Triton's interpreter, and so in processes of their own.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.core import Operand, Scores
from manyheads.core.forms import form_of
from manyheads.engines.triton import op

ROOT = Path(__file__).parent.parent


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


def leaves(q_len: int = 9, kv_len: int = 12, kv_heads: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, q_len, 2, 16).transpose(1, 2)
    k, v = torch.randn(2, kv_heads, kv_len, 16), torch.randn(2, kv_heads, kv_len, 8)
    return [t.requires_grad_() for t in (q, k, v)]


# ---- what processes of their own do ----


def checked() -> None:
    """torch's checks: the schema, what is foretold of shapes and strides, autograd, and all of it traced."""
    from manyheads.core.checks import build_inputs

    for name, (form, operands) in cases().items():
        print(name, file=sys.stderr)
        at = [operands.pop(which, None) for which in ("q_positions", "kv_positions")]
        x = build_inputs(form, *leaves(), None, *at, None, operands)
        given = op._given(form, x)
        torch.library.opcheck(op._attend, given)
        o, lse = (t.detach() for t in op._attend(*given))
        needed = [True] * (3 + len(given[4]) + len(given[5]))
        tests = "test_schema", "test_faketensor"  # it has no derivative of its own
        torch.library.opcheck(op._backward, (o, lse, o, lse, needed, *given), test_utils=tests)


def whole() -> None:
    """One graph: outputs and gradients as without torch.compile, the lse's included."""
    for name, (form, given) in cases().items():
        print(name, file=sys.stderr)
        inputs = leaves()
        read = [t for t in (*form.program.tensors, *given.values()) if t.requires_grad]

        def layer(q: Tensor, k: Tensor, v: Tensor, form=form, given=given) -> tuple[Tensor, Tensor]:
            o, lse = manyheads.attention(2 * q, k, v, form, engine="triton", return_lse=True, **given)
            return o + 1, lse

        found = []
        torch._dynamo.reset()
        for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            o, lse = function(*inputs)
            weighed = (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum()
            loss = weighed + torch.where(lse.isneginf(), 0.0, lse).square().sum()
            found.append([o, lse, *torch.autograd.grad(loss, [*inputs, *read])])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), (a - b).abs().max()
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


@pytest.mark.parametrize("what", ["checked", "whole", "shared", "lengths", "backward_later", "keys_alone"])
def test_in_the_interpreter(what):
    code = f"from tests import test_op; test_op.{what}()"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


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
    assert op._with(form, [slopes]) is form and op._with(form, [slopes.detach()]) is form
    other = op._with(form, [slopes + 1])
    assert other.program.tensors[0].tolist() == (slopes + 1).tolist() and form.program.tensors[0] is slopes
    assert op._with(form, [slopes.clone()]) is not form
