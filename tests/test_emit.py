"""Derivatives of scores, and programs as kernel text: equal to the graph in Triton's interpreter, compiled for a GPU
that is not there, keyed by what changes the code.

What runs Triton runs in processes of its own: whether it interprets is decided when it is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_expressions import BATCH, HEADS, LENGTH, NASTY, SQUARE, grid, masks, scores

from manyheads.core.expressions import Program, trace

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ALL = ("mask", "score", "dscore", "gradients")


# ---- derivatives ----


def autograd(program: Program, s: torch.Tensor, at: tuple, weight: torch.Tensor, **operands: torch.Tensor) -> list:
    """Gradients of the weighted sum of scores: by s, and by each captured tensor and operand that is a float."""
    tensors = [t.clone().requires_grad_() if t.is_floating_point() else t for t in program.tensors]
    values = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in operands.items()}
    s = s.clone().requires_grad_()
    bound = program.rebind(program.numbers, tuple(tensors))
    leaves = [x for x in (*tensors, *values.values()) if x.requires_grad]
    total = (bound.score(s, *at, **values) * weight).sum()
    found = torch.autograd.grad(total, [s, *leaves], allow_unused=True, materialize_grads=True)
    return list(found)


def scattered(program: Program, s: torch.Tensor, at: tuple, weight: torch.Tensor, **operands: torch.Tensor) -> list:
    """The same out of `dscore` and `gradients`."""
    derived = program.derivative()
    tables = [t for t in program.tensors if t.is_floating_point()]
    tables += [x for x in operands.values() if x.is_floating_point()]
    sums = [torch.zeros_like(t) for t in tables]
    inputs = {"s": s, **dict(zip("bhij", at, strict=True))}
    for gradient in derived.gradients:
        table = derived.table(gradient.source, operands)
        at_zero = torch.zeros(s.shape, dtype=torch.int64)
        index = [at_zero + derived.evaluate(k, inputs, operands) for k in gradient.index]
        index = [torch.where(x < 0, x + n, x).clamp(0, n - 1) for x, n in zip(index, table.shape, strict=True)]
        factor = weight * derived.evaluate(gradient.factor, inputs, operands, s.dtype)
        total = next(total for total, other in zip(sums, tables, strict=True) if other is table)
        if index:
            total.index_put_(tuple(index), factor.to(total.dtype), accumulate=True)
        else:
            total += factor.sum()
    return [weight * derived.dscore(s, *at, **operands), *sums]


DOUBLE = torch.float64
FORGET = dict(forget=(3, "f"), gain=(0, "f"), length=(1, "i"))


def forgetting(s, b, h, i, j, gain, forget, length):
    return torch.where(j < length[b], s * gain * torch.exp(forget[b, h, i] - forget[b][h, j]), s * gain * gain)


def forgetting_operands(dtype):
    g = torch.Generator().manual_seed(1)
    forget = torch.randn(BATCH, LENGTH, HEADS, generator=g, dtype=dtype).transpose(1, 2)
    return dict(forget=forget, gain=torch.tensor(1.5, dtype=dtype), length=torch.tensor([70, 200]))


@pytest.mark.parametrize("name", [*scores(), "forgetting"])
def test_derivatives_equal_autograd(name):
    operands = forgetting_operands(DOUBLE) if name == "forgetting" else {}
    plain = forgetting if name == "forgetting" else scores(dtype=DOUBLE)[name]
    program = trace(score=plain, operands=FORGET)
    at = grid(torch.arange(0, LENGTH, 5), torch.arange(0, LENGTH, 7))
    shape = BATCH, HEADS, at[2].shape[2], at[3].shape[3]
    s, weight = torch.randn(shape, dtype=DOUBLE) * 3, torch.randn(shape, dtype=DOUBLE)
    found, expected = scattered(program, s, at, weight, **operands), autograd(program, s, at, weight, **operands)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_every_operation_has_its_derivative():
    plain = dict(
        add=lambda s, b, h, i, j: 3 + s + i, subtract=lambda s, b, h, i, j: i - s,
        multiply=lambda s, b, h, i, j: s * s * j * (s + 1), floor=lambda s, b, h, i, j: torch.floor(s) * s,
        divide=lambda s, b, h, i, j: (s + 9) / (s * s + 2), into=lambda s, b, h, i, j: 7 / (s + 20),
        modulo=lambda s, b, h, i, j: s % 1.7 + (s + 40) % (s * s + 3),
        absolute=lambda s, b, h, i, j: abs(s), powers=lambda s, b, h, i, j: (s * s) ** 1.5 + s**3 + s**-2,
        lesser=lambda s, b, h, i, j: torch.minimum(s, s * s), greater=lambda s, b, h, i, j: max(s, -s * 2, 1),
        clamp=lambda s, b, h, i, j: s.clamp(-1, 2), select=lambda s, b, h, i, j: torch.where(i < j, s, s * s),
        exp=lambda s, b, h, i, j: torch.exp(s), exp2=lambda s, b, h, i, j: torch.exp2(s),
        log=lambda s, b, h, i, j: torch.log(s * s + 1), log2=lambda s, b, h, i, j: torch.log2(s * s + 1),
        sqrt=lambda s, b, h, i, j: torch.sqrt(s * s + 1), tanh=lambda s, b, h, i, j: torch.tanh(s),
        erf=lambda s, b, h, i, j: torch.erf(s), sigmoid=lambda s, b, h, i, j: torch.sigmoid(s),
        sin=lambda s, b, h, i, j: torch.sin(s),
        cos=lambda s, b, h, i, j: torch.cos(s), whole=lambda s, b, h, i, j: s.long() * s,
        relu=lambda s, b, h, i, j: torch.relu(s), none=lambda s, b, h, i, j: i + s * 0,
        sign=lambda s, b, h, i, j: torch.sign(s) * s,
    )  # fmt: skip
    at = [torch.arange(50) % n for n in (2, 3, 5, 7)]
    s = torch.randn(50, dtype=DOUBLE) * 3
    for name, function in plain.items():
        program = trace(score=function)
        ours = scattered(program, s, at, torch.ones(50, dtype=DOUBLE))
        theirs = autograd(program, s, at, torch.ones(50, dtype=DOUBLE))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_steps_are_flat():
    at, s = [torch.zeros(3, dtype=torch.int64)] * 4, torch.tensor([-1.0, 0.0, 4.0])
    for plain in (lambda s, b, h, i, j: s // 2, lambda s, b, h, i, j: i, lambda s, b, h, i, j: (s > 1) * 3.0):
        assert trace(score=plain).derivative().dscore(s, *at).item() == 0


def test_a_branch_that_is_not_taken_does_not_reach_the_derivative():
    """Where autograd multiplies the infinite slope of a root at zero by zero."""
    program = trace(score=lambda s, b, h, i, j: torch.where(s > 0, torch.sqrt(s), s)).derivative()
    at = [torch.zeros(3, dtype=torch.int64)] * 4
    assert program.dscore(torch.tensor([-1.0, 0.0, 4.0]), *at).tolist() == [1.0, 1.0, 0.25]
    ties = trace(score=lambda s, b, h, i, j: torch.minimum(s, 2 * s)).derivative()
    assert ties.dscore(torch.tensor([-1.0, 0.0, 4.0]), *at).tolist() == [2.0, 1.0, 1.0]


def test_a_derivative_is_the_same_program_with_more():
    program = trace(masks()["causal"], scores()["pair_bias"])
    derived = program.derivative()
    assert derived is program.derivative() is derived.derivative()
    assert derived.key == program.key and derived.graph.nodes[: len(program.graph.nodes)] == program.graph.nodes
    s = torch.randn(LENGTH, LENGTH)
    assert torch.equal(derived.score(s, *SQUARE), program.score(s, *SQUARE))
    assert torch.equal(derived.tiles(range(256), range(256)), program.tiles(range(256), range(256)))
    assert [g.source for g in derived.gradients] == [0]
    with pytest.raises(ValueError, match="before derivative"):
        program.dscore(s, *SQUARE)
    nothing = trace().derivative()
    assert nothing.dscore(s, *SQUARE).item() == 1 and not nothing.gradients


# ---- identity ----


def window_mask(size):
    return lambda b, h, i, j: (j <= i) & (i - j < size)


def cap_score(cap):
    return lambda s, b, h, i, j: cap * torch.tanh(s / cap)


def same_document(ids):
    return lambda b, h, i, j: ids[i] == ids[j]


def test_numbers_and_tensors_leave_the_text_alone():
    texts = {
        trace(window_mask(size), cap_score(cap)).source().text for size, cap in ((1, 1.0), (4096, 30.0), (-5, 0.0))
    }
    assert len(texts) == 1
    ids = [torch.arange(9), torch.zeros(700, dtype=torch.int32), torch.full((3,), 200, dtype=torch.uint8)]
    assert len({trace(same_document(x)).source().key for x in ids}) == 1
    biases = [torch.zeros(5, 7, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert len({trace(score=lambda s, b, h, i, j, x=x: s + x[i, j]).source("gluon", ALL).key for x in biases}) == 1


def test_keys_differ_with_what_changes_the_code():
    block = lambda size: lambda b, h, i, j: i // size >= j // size  # noqa: E731
    product = lambda b, h, i, j: i * 3 * 1000 < j  # noqa: E731
    wide = torch.tensor([0, 2**40])
    sources = [
        trace(window_mask(5)).source(),
        trace(window_mask(5)).source("gluon"),
        trace(window_mask(5.0)).source(),
        trace(window_mask(5), cap_score(2.0)).source(),
        trace(window_mask(5), cap_score(2.0)).source(outputs=("score",)),
        trace(window_mask(5), cap_score(2.0)).source(outputs=ALL),
        trace(block(64)).source(),
        trace(block(96)).source(),
        trace(product).source(length=1024),
        trace(product).source(),
        trace(same_document(wide)).source(),
        trace(same_document(wide // 2**20)).source(),
        trace(lambda b, h, i, j, x: x[i] == x[j], operands={"x": (1, "i")}).source(),
        trace(lambda b, h, i, j, y: y[i] == y[j], operands={"y": (1, "i")}).source(),
    ]
    assert len({source.key for source in sources}) == len(sources)
    assert all(re.fullmatch("[0-9a-f]{16}", source.key) for source in sources)
    with pytest.raises(ValueError, match="no kernel language is called 'cuda'; there are triton, gluon"):
        trace(block(4)).source("cuda")
    with pytest.raises(ValueError, match="no output is called lse"):
        trace(block(4)).source(outputs=("mask", "lse"))


def test_integers_are_wide_where_they_must_be():
    assert "int64" not in trace(masks()["natten_2d_clamped"], scores()["softcap"]).source().text
    squares = trace(masks()["circle"])
    assert "int64" in squares.source().text and "int64" not in squares.source(length=2**12).text
    ids = torch.tensor([3, 5])
    program = trace(same_document(ids))
    assert "int64" not in program.source().text and program.source().arguments()[0].dtype == torch.int32
    ids[0] = 2**40  # what was looked at before has changed
    assert "int64" in program.source().text and program.source().arguments()[0].dtype == torch.int64


# ---- arguments ----


def test_arguments_are_tensors_sizes_strides_numbers():
    window, cap = 100, 30.0
    ids, bias = torch.arange(7), torch.randn(3, 5).T
    program = trace(
        lambda b, h, i, j, length: (ids[i] == ids[j]) & (i - j < window) & (j < length[b]),
        lambda s, b, h, i, j, gain, forget: cap * torch.tanh(s / cap) * gain + bias[h, i] + forget[b, h, j],
        operands=FORGET,
    )
    source = program.source()
    operands = forgetting_operands(torch.float32)
    values = dict(zip((a.name for a in source.signature), source.arguments(**operands), strict=True))
    tensors = {name: values.pop(name) for name in list(values) if isinstance(values[name], torch.Tensor)}
    assert list(tensors) == ["tensor0", "operand_length", "operand_gain", "tensor1", "operand_forget"]
    assert tensors["tensor0"].tolist() == ids.tolist() and tensors["operand_forget"] is not operands["forget"]
    assert tensors["operand_forget"].data_ptr() == operands["forget"].data_ptr()
    kinds = [a.kind for a in source.signature]
    assert kinds == sorted(kinds, key=["pointer", "size", "stride", "i32", "fp32", "inverse"].index)
    assert values["tensor0_size0"] == 7 and values["tensor1_stride0"] == 1 and values["tensor1_stride1"] == 5
    assert values["operand_forget_size2"] == LENGTH and values["operand_forget_stride1"] == 1
    assert list(values.values())[-3:] == [100, 30.0, 1 / 30]
    assert source.arguments(**operands)[0].data_ptr() == tensors["tensor0"].data_ptr()  # converted once
    with pytest.raises(TypeError, match="operand 'forget' is missing"):
        source.arguments(gain=operands["gain"], length=operands["length"])
    with pytest.raises(ValueError, match=r"operand 'length' is empty: \[0\]"):
        source.arguments(**{**operands, "length": operands["length"][:0]})
    with pytest.raises(ValueError, match="operand 'length' is too long"):
        source.arguments(**{**operands, "length": torch.zeros(1, dtype=torch.int32).expand(2**31)})


def test_numbers_are_computed_before_they_are_passed():
    size, cap = 7, 0.1
    program = trace(
        lambda b, h, i, j: (i - j < 2 * size + 1) & (torch.exp2(torch.tensor(1.0)) * size > j),
        lambda s, b, h, i, j: s * (cap * (cap + 0.2)) + torch.where(size < j, cap, 1.0),
    )
    numbers = program.source(outputs=("mask",)).arguments()
    assert 15 in numbers
    assert cap * (cap + 0.2) in program.source(outputs=("score",)).arguments()
    as_tensors = program.rebind(tuple(torch.tensor(n) for n in program.numbers), program.tensors)
    assert as_tensors.source(outputs=("mask",)).arguments() == numbers


def test_a_kernel_is_wrapped():
    source = trace(window_mask(5)).source(outputs=("mask", "score", "dscore"))
    text = source.wrap("some.where:forward", ["q", "BLOCK: tl.constexpr"], ("mask", "score", "dscore"), fixed=["q"])
    assert text.startswith(source.text)
    assert "from some.where import forward as kernel" in text
    assert "@jit(do_not_specialize=['q', 'number0'], do_not_specialize_on_alignment=[])" in text
    assert "def entry(q, BLOCK: tl.constexpr, number0: 'i32'):" in text
    assert "kernel(q, BLOCK, A=(number0, ), MASK=mask, SCORE=None, DSCORE=dscore)" in text
    with pytest.raises(ValueError, match="parameters of its own called MASK, number0"):
        source.wrap("some.where:forward", ["number0", "MASK"])


# ---- in the interpreter ----

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def everything(
    S, OUT, I, J, heads, BM: tl.constexpr, BN: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr,
    DSCORE: tl.constexpr, GRADIENTS: tl.constexpr, PLACES: tl.constexpr,
):
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    i = tl.load(I + tl.arange(0, BM))[:, None]
    j = tl.load(J + tl.arange(0, BN))[None, :]
    at = tl.program_id(0) * BM * BN + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    step = tl.num_programs(0) * BM * BN
    s = tl.load(S + at)
    tile = tl.zeros([BM, BN], tl.float32)
    if MASK is not None:
        tl.store(OUT + at, tl.where(MASK(b, h, i, j, A), 1.0, tile))
    if SCORE is not None:
        tl.store(OUT + step + at, SCORE(s, b, h, i, j, A))
    if DSCORE is not None:
        tl.store(OUT + 2 * step + at, tile + DSCORE(s, b, h, i, j, A))
    for n in tl.static_range(len(GRADIENTS)):
        tl.store(OUT + (3 + 2 * n) * step + at, tile + GRADIENTS[n](s, b, h, i, j, A))
        tl.store(OUT + (4 + 2 * n) * step + at, tile + PLACES[n](s, b, h, i, j, A))
"""
OWN = ["S", "OUT", "I", "J", "heads", "BM: tl.constexpr", "BN: tl.constexpr"]
FUNCTIONS = ("mask", "score", "dscore", "gradients", "places")


def unusual() -> dict[str, Program]:
    """What the common cases do not have."""
    g = torch.Generator().manual_seed(8)
    ids = torch.randint(0, 5, (LENGTH,), generator=g).sort().values
    other = {
        "wide": ids + 2**40,
        "uint8": ids.to(torch.uint8),
        "int32": ids.int(),
        "stride": ids.repeat_interleave(2)[::2],
    }
    turned = torch.randn(LENGTH, HEADS, generator=g).T
    spread = torch.randn(LENGTH, 1, generator=g).expand(LENGTH, LENGTH)
    keep = torch.rand(LENGTH, generator=g) < 0.5
    size, flag = 5, 3.0
    found = {f"ids_{name}": trace(same_document(x)) for name, x in other.items()}
    return found | dict(
        operands=trace(lambda b, h, i, j, length: j < length[b] - 3, forgetting, operands=FORGET),
        layouts=trace(lambda b, h, i, j: turned[h, i] < spread[j, i],
            lambda s, b, h, i, j: s * turned[h, j] * spread[i, j]),
        negative_index=trace(lambda b, h, i, j: keep[-1 - i] | keep[j - 3], lambda s, b, h, i, j: s + turned[h, j - i]),
        literal_index=trace(lambda b, h, i, j: (ids[0] < ids[i]) & keep[-2] | (ids[-1] == ids[j])),
        computed_index=trace(score=lambda s, b, h, i, j: s + turned[h, ids[i] + (s * 3).long()]),
        large_products=trace(lambda b, h, i, j: (i * 100003) * (j * 70001 + size) % 1009 < i * j // 17 - 2**33),
        divisions=trace(lambda b, h, i, j: ((i - j) // 7 + (j - i) % 11 > (i + j) // 5 % 3) & ((i - 2 * j) % -6 < -1)),
        floats=trace(lambda b, h, i, j: ((i - 2 * j) * 0.3 // 0.7 < (i * 0.1) % -0.35 * 90) | (i * 0.25 // 0.5 == j)),
        numbers=trace(lambda b, h, i, j: torch.where(j < i, size, 2 * size) < i - j,
            lambda s, b, h, i, j: s * size + flag),
        only_numbers=trace(lambda b, h, i, j: j * 0 + size > 3, lambda s, b, h, i, j: flag * 2),
        only_heads=trace(lambda b, h, i, j: h % 2 == b, lambda s, b, h, i, j: h * flag),
        only_keys=trace(lambda b, h, i, j: j > 9, lambda s, b, h, i, j: torch.log2(j + 1.0) - j),
        constants=trace(lambda b, h, i, j: True, lambda s, b, h, i, j: 0.5),
        never=trace(lambda b, h, i, j: False, lambda s, b, h, i, j: s),
        booleans=trace(lambda b, h, i, j: torch.where(keep[i], keep[j], i < j) ^ (keep[i] == (j < 5))),
        order=trace(lambda b, h, i, j: (keep[i] < keep[j]) | (keep[i] <= (i < 9))),
        functions=trace(score=lambda s, b, h, i, j: torch.exp2(s) + torch.log2(abs(s) + 1) * s.sin() + s.sign()),
        extremes=trace(score=lambda s, b, h, i, j: s * 1e-40 + torch.maximum(s * -torch.inf, s) + (s > 1e39)),
    )  # fmt: skip


def cases() -> dict[str, Program]:
    found = {f"mask_{name}": trace(plain) for name, plain in masks().items()}
    found |= {f"score_{name}": trace(score=plain) for name, plain in scores().items()}
    found |= {f"nasty_{name}": trace(plain) for name, plain in NASTY.items()}
    return found | unusual()


def launch(
    program: Program, s: torch.Tensor, i: torch.Tensor, j: torch.Tensor, operands: dict, language: str = "triton"
) -> tuple[dict, Program]:
    """What the emitted functions compute for s [BATCH, HEADS, rows, columns] at positions i [rows] and j [columns]."""
    source = program.source(language, outputs=ALL)
    module = "kernels" if language == "triton" else "gluon_kernels"
    entry = source.entry(f"{module}:everything", OWN, FUNCTIONS)
    count = len(source.program.gradients)
    out = torch.full((3 + 2 * count, *s.shape), torch.nan, device=s.device)
    operands = {name: x.to(s.device) for name, x in operands.items()}
    at = i.int().to(s.device), j.int().to(s.device)
    entry[(BATCH * HEADS,)](s, out, *at, HEADS, s.shape[2], s.shape[3], *source.arguments(s.device, **operands))
    names = ["mask", "score", "dscore", *(f"{what}_{n}" for n in range(count) for what in ("grad", "place"))]
    return dict(zip(names, out.cpu(), strict=True)), source.program


def compare(folder: str, device: str, language: str) -> None:
    """Compares all cases with the graph: the largest differences, in a JSON file."""
    sys.path.insert(0, folder)
    torch.manual_seed(0)
    s, i, j = torch.randn(BATCH, HEADS, 64, 128) * 3, torch.randperm(LENGTH)[:64], torch.randperm(LENGTH)[:128]
    report = {}
    for name, program in cases().items():
        operands = forgetting_operands(torch.float32) if program.graph.operands else {}
        try:
            found, derived = launch(program, s.to(device), i, j, operands, language)
            report[name] = differences(found, derived, s, grid(i, j), operands)
        except Exception as error:  # one report for all
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    found = {"cases": report, "outside": outside(device, language)}
    Path(folder, "report.json").write_text(json.dumps(found))


def differences(found: dict, program: Program, s: torch.Tensor, at: tuple, operands: dict) -> dict[str, float]:
    inputs = dict(zip("sbhij", (s, *at), strict=True))
    expected = {}
    if program.has_mask:
        expected["mask"] = program.mask(*at, **operands).float()
    if program.has_score:
        expected["score"] = program.score(s, *at, **operands)
        expected["dscore"] = program.dscore(s, *at, **operands)
    for n, gradient in enumerate(program.gradients):
        expected[f"grad_{n}"] = torch.as_tensor(program.evaluate(gradient.factor, inputs, operands), dtype=s.dtype)
        shape = program.table(gradient.source, operands).shape
        offset = torch.zeros((), dtype=torch.int64)
        for k, size in zip(gradient.index, shape, strict=True):
            index = torch.as_tensor(program.evaluate(k, inputs, operands))
            offset = offset * size + torch.where(index < 0, index + size, index).clamp(0, size - 1)
        expected[f"place_{n}"] = offset.float()
    result = {}
    for name, value in expected.items():
        value, ours = value.expand_as(s), found[name]
        same = (value == ours) | (value.isnan() & ours.isnan())
        gap = torch.where(same, 0.0, (value - ours).abs() / (1 + value.abs()))
        result[name] = gap.nan_to_num(torch.inf).max().item()
    return result


def outside(device: str, language: str) -> bool:
    """Whether positions far outside of all tensors read what is inside: their surroundings are poisoned."""
    ids, bias = torch.full((3000,), 77, dtype=torch.int32), torch.full((3, 40, 90), torch.nan)
    ids[1000:1064] = torch.arange(64) // 9
    bias[1, 10:20, 30:60] = 0.5
    ids, bias = ids.to(device), bias.to(device)
    inner, middle = ids[1000:1064], bias[1, 10:20, 30:60]
    program = trace(
        lambda b, h, i, j: (inner[i] < 70) & (inner[i - j] < 70) & (inner[i // 2] < 70) & (inner[2 * j] < 70),
        lambda s, b, h, i, j: middle[i, j] + middle[j - i, i - 40] + middle[h, b],
    )
    for first_i, first_j in ((-500, -30), (-1, 50), (700, 0), (0, 2**31 - 70), (-(2**31), 2**30)):
        s = torch.zeros(BATCH, HEADS, 64, 64, device=device)
        found, _ = launch(program, s, first_i + torch.arange(64), first_j + torch.arange(64), {}, language)
        if not (found["mask"] == 1).all() or not (found["score"] == 1.5).all():
            return False
    return True


# ---- for a GPU that is not there ----


def compiled(folder: str) -> None:
    """Spilled bytes of kernels for sm_90, what of a launch is specialised, and what the cache does, in a JSON file."""
    sys.path.insert(0, folder)
    report = {name: spills(name, folder) for name in COMPILED}
    report["launches"] = specialised()
    report["cache"] = cached(Path(folder))
    Path(folder, "report.json").write_text(json.dumps(report))


FORWARD = ("mask", "score")
COMPILED = dict(
    softcap=("gluon", FORWARD, 128, lambda: trace(window_mask(5), cap_score(30.0))),
    softcap_backward=("triton", ALL, 64, lambda: trace(window_mask(5), cap_score(30.0))),
    documents=("gluon", FORWARD, 128, lambda: trace(masks()["document_causal_batched"], scores()["alibi"])),
    neighbours=("gluon", FORWARD, 128, lambda: trace(masks()["natten_2d_clamped"], scores()["log_distance"])),
    operands=("gluon", ALL, 16, lambda: trace(lambda b, h, i, j, length: j < length[b], forgetting, FORGET)),
    wide=("triton", FORWARD, 64, lambda: trace(masks()["circle"], lambda s, b, h, i, j: s * (i * i * 9 < j))),
)  # fmt: skip
GLUON = "ml: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])"
DTYPES = {torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}


def gluon_kernels() -> str:
    """The same kernel in Gluon, for the layout that Hopper's matrix products have."""
    text = KERNELS.replace("import triton.language as tl", "from triton.experimental.gluon import language as tl")
    text = text.replace("import triton\n", "from triton.experimental import gluon\n").replace("@triton", "@gluon")
    text = text.replace("    b = tl", f"    {GLUON}\n    b = tl").replace("tl.float32)", "tl.float32, ml)")
    text = text.replace("arange(0, BM)", "arange(0, BM, tl.SliceLayout(1, ml))")
    text = text.replace("    at = tl", "    i, j = (i - 3, i * 0 + 3), (j + 5, j * 0 - 5)\n    at = tl", 1)
    return text.replace("arange(0, BN)", "arange(0, BN, tl.SliceLayout(0, ml))")


def spills(name: str, folder: str) -> str:
    """What ptxas says of registers that do not suffice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    language, outputs, width, make_program = COMPILED[name]
    program = make_program()
    source = program.source(language, outputs)
    module = "kernels" if language == "triton" else "gluon_kernels"
    entry = source.entry(f"{module}:everything", OWN, FUNCTIONS)
    operands = forgetting_operands(torch.float32) if program.graph.operands else {}
    types = dict.fromkeys(entry.arg_names, "i32") | dict(
        S="*fp32", OUT="*fp32", I="*i32", J="*i32", BM="constexpr", BN="constexpr"
    )  # fmt: skip
    constants = dict(BM=64, BN=width)
    for argument, value in zip(source.signature, source.arguments(**operands), strict=True):
        if argument.kind == "pointer":
            types[argument.name] = f"*{DTYPES[value.dtype]}"
        elif argument.kind == "stride" and value == 1:
            types[argument.name], constants[argument.name] = "constexpr", 1
        elif argument.kind != "size":
            types[argument.name] = "fp32" if isinstance(value, float) else "i32"
    make = ASTSource if language == "triton" else GluonASTSource
    target = GPUTarget("cuda", 90, 32)
    kernel = triton.compile(make(entry, types, constexprs=constants), target=target, options={"num_warps": 4})
    path = Path(folder, "kernel.ptx")
    path.write_text(kernel.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", path, "-o", os.devnull], capture_output=True, text=True, check=True
    )
    return " ".join(re.findall(r"\d+ bytes spill \w+", done.stderr))


def specialised() -> dict[str, list]:
    """What each launch of a kernel is compiled for, beside its source: the keys of Triton's own cache."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def key(size, cap, length, count):
        ids, bias = torch.arange(length), torch.zeros(4, length)
        program = trace(
            lambda b, h, i, j: window_mask(size)(b, h, i, j) & (ids[i] == ids[j]),
            lambda s, b, h, i, j: cap_score(cap)(s, b, h, i, j) + bias[h, i],
        )
        source = program.source(outputs=ALL)
        entry = source.entry("kernels:everything", OWN, FUNCTIONS, fixed=["heads"])
        bind = create_function_from_signature(entry.signature, entry.params, backend)
        s = torch.zeros(64)
        return [source.key, str(bind(s, s, ids, ids, count, 64, 64, *source.arguments())[1])]

    kinds = [(128, 30.0, 512, 16), (4096, 50.0, 777, 16), (1, 1.0, 16, 1), (0, 0.0, 5, 5), (-16, -3.5, 48, 2**20)]
    entry_of_its_own = [key(128, 30.0, 512, 16), *(key(*kind) for kind in kinds)]
    return {"keys": entry_of_its_own}


def cached(folder: Path) -> dict[str, bool]:
    """What lies in the cache folder and is not what was written is written again; nothing else is left there."""
    source = trace(lambda b, h, i, j: 17 * i < 3 * j).source()
    cache = Path(os.environ["MANYHEADS_CACHE"])
    path = cache / f"manyheads_kernels_{source.key}.py"
    path.write_text("half a ")
    module = source.module()
    return {
        "written": path.read_text() == source.text,
        "once": source.module() is module is trace(lambda x, y, row, key: 17 * row < 3 * key).source().module(),
        "named": module.__file__ == str(path) and callable(module.mask.fn),
        "clean": all(file.suffix == ".py" or file.is_dir() for file in cache.iterdir()),
    }


# ---- positions as pairs ----

WINDOWS: dict[str, Any] = {
    "causal": lambda i, j: j <= i, "strict": lambda i, j: i > j, "later": lambda i, j: i <= j,
    "same": lambda i, j: i == j, "after": lambda i, j: i < j, "window": lambda i, j: 0 <= i - j < 100,
    "at": lambda i, j: i - j == 9, "beyond": lambda i, j: i - j > -5, "turned": lambda i, j: j - i < 7,
    "between": lambda i, j: (i - j <= 100) & (i - j >= 8), "rows": lambda i, j: i - j < i - 40,
    "wide": lambda i, j: i - j < 2**40, "every": lambda i, j: (i - j) % 3 == 0,
}  # fmt: skip
DISTANCES: dict[str, Any] = {
    "apart": lambda i, j: i - j, "turned": lambda i, j: j - i, "size": lambda i, j: abs(i - j),
    "size of turned": lambda i, j: abs(j - i), "sum": lambda i, j: i - j + i,
}  # fmt: skip


@pytest.mark.parametrize("length", [2**20, 2**23, 2**24, 2**30])
def test_gluon_takes_positions_as_pairs(length):
    emulator = pytest.importorskip("gluon_emulator")
    i = torch.cat([torch.arange(64), torch.arange(length - 64, length)])[:, None]
    j = torch.cat([torch.arange(128), torch.arange(length - 128, length)])[None]
    at = [emulator.Array.of(x.numpy().astype("int32")) for x in (i, j)]
    pairs = [(x - (x & far), x & far) for x, far in zip(at, (8, 249), strict=True)]
    s = torch.zeros(i.shape[0], j.shape[1])
    for name, mask in WINDOWS.items():
        program = trace(lambda b, h, i, j, mask=mask: mask(i, j))
        source = program.source("gluon", length=length)
        found = emulator.functions(source.text)["mask"](0, 0, *pairs, source.arguments())
        assert torch.equal(torch.from_numpy(np.array(found)), program.mask(s, s, i, j)), name
    for name, distance in DISTANCES.items():
        program = trace(score=lambda s, b, h, i, j, distance=distance: s + distance(i, j))
        source = program.source("gluon", length=length)
        found = emulator.functions(source.text)["score"](emulator.Array.of(s.numpy()), 0, 0, *pairs, source.arguments())
        assert torch.equal(torch.from_numpy(np.array(found)), distance(i, j).float()), name


# ---- the processes ----


def elsewhere(call: str, folder: Path, interpreted: bool = False) -> dict:
    (folder / "kernels.py").write_text(KERNELS)
    (folder / "gluon_kernels.py").write_text(gluon_kernels())
    environment = {**os.environ, "MANYHEADS_CACHE": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = f"import test_emit; test_emit.{call.format(folder=str(folder))}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("interpreted")
    return elsewhere("compare({folder!r}, 'cpu', 'triton')", folder, interpreted=True)


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict:
    return elsewhere("compiled({folder!r})", tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory) -> dict:
    """By language; side by side, as most of the time goes into compiling."""
    languages = ("triton", "gluon")
    with ThreadPoolExecutor() as pool:
        folders = [tmp_path_factory.mktemp(language) for language in languages]
        calls = [f"compare({{folder!r}}, 'cuda', '{language}')" for language in languages]
        return dict(zip(languages, pool.map(elsewhere, calls, folders), strict=True))


@needs_triton
@pytest.mark.parametrize("name", cases())
def test_the_text_computes_what_the_graph_does(interpreted, name):
    report = interpreted["cases"][name]
    assert agrees(report), report


def agrees(report: dict) -> bool:
    """Masks and places bit for bit; the others as float32 rounds."""
    exact = all(x == 0 for name, x in report.items() if name == "mask" or name.startswith("place_"))
    return exact and "error" not in report and max(report.values()) <= 1e-5


@needs_triton
def test_lanes_outside_read_nothing_outside(interpreted):
    assert interpreted["outside"]


# Masks that a GPU computes otherwise.
INEXACT = {
    "nasty_nan_in_exponential",  # ptxas takes for granted that ex2 is at least 0, even of a NaN
    "nasty_rounded_constant",  # the remainder of a division is lost in rounding if the quotient is some billions
}


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("language", ["triton", "gluon"])
def test_a_gpu_computes_what_the_graph_does(on_gpu, language):
    wrong = {name: report for name, report in on_gpu[language]["cases"].items() if not agrees(report)}
    assert not wrong.keys() - INEXACT
    assert on_gpu[language]["outside"]


@needs_triton
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_hopper_without_spills(offline, name):
    assert offline[name] == "0 bytes spill stores 0 bytes spill loads"


@needs_triton
def test_other_numbers_and_lengths_compile_nothing(offline):
    keys = offline["launches"]["keys"]
    assert all(key == keys[0] for key in keys)


@needs_triton
def test_modules_are_written_whole_and_imported_once(offline):
    assert offline["cache"] == dict.fromkeys(("written", "once", "named", "clean"), True)


def test_sources_are_frozen():
    source = trace(window_mask(5)).source()
    assert source is not trace(window_mask(5)).source()
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.text = ""
