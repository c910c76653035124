"""Maps of tiles made by kernels: what the rules on tensors give, in the interpreter and on a GPU, in two launches.

Triton decides at import whether it interprets, so those cases run in processes of their own.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import manyheads
from manyheads.core.expressions import FULL, PARTIAL, Program, trace
from manyheads.core.expressions import source as sources
from manyheads.core.forms import Operand, Scores, Selection
from manyheads.core.inputs import Inputs, Positions, default_positions
from manyheads.core.selection import as_scores, why_no_scores
from manyheads.core.tiling import position_operands
from tests.conftest import _make_inputs
from tests.interpreter import interpret
from tests.test_expressions import BATCH, BOUNDED, HEADS, LENGTH, NASTY, check_tiles, layouts, masks

pytest.importorskip("triton.experimental.gluon")

from manyheads.engines import eager
from manyheads.engines.triton import hopper, quick
from manyheads.engines.triton.hopper import maps, tables

RUNS = ("tails", "padded")  # as far as there are tokens; then the maps are the same
ROWS = ("scattered",)  # where a tile may be a run though the row is none: then maps may know more
TILE = (32, 16)


def inputs(i: Positions, j: Positions, device: str = "cpu", **operands: Tensor) -> Inputs:
    """Of BATCH rows and HEADS heads on 2."""
    lengths = [p.shape[-1] if isinstance(p, Tensor) else len(p) for p in (i, j)]
    at = [torch.atleast_2d(p).to(device) if isinstance(p, Tensor) else p for p in (i, j)]
    q, k = (torch.zeros(BATCH, n, length, 8, device=device) for n, length in zip((HEADS, 2), lengths, strict=True))
    return Inputs(q, k, k, 1.0, at[0], at[1], operands)


def check(program: Program, x: Inputs, tile: tuple[int, int] = TILE, more: bool = False, **changes) -> None:
    """The map equals the one of the rules on tensors. more: or knows more, and what it knows is so."""
    found = maps.map_of(program, x, tile, dict(x.operands), **changes)
    at = [p if isinstance(p, range) else p.cpu() for p in (x.q_positions, x.kv_positions)]
    operands = {name: t.cpu() for name, t in x.operands.items()}
    expected = program.tiles(*at, tile=tile, batch=x.batch, heads=x.heads, device=torch.device("cpu"), **operands)
    assert found.shape == expected.shape and found.dtype == torch.uint8 and found.is_contiguous()
    differ = found.cpu() != expected
    if more:
        assert (expected[differ] == PARTIAL).all()
        known = Program(program.graph, program.numbers, program.tensors)
        known.tiles = lambda *_, **__: found.cpu()  # type: ignore[method-assign]
        check_tiles(known, *at, tile, **operands)
    else:
        assert not differ.any(), f"{int(differ.sum())} of {differ.numel()}, first {differ.nonzero()[0].tolist()}"


# ---- what processes of their own do ----


def all_masks(device: str = "cpu", only: str = "") -> None:
    for name, plain in masks().items():
        if only in name:
            print(name, file=sys.stderr)
            for layout in (*RUNS, *ROWS):
                check(trace(plain), inputs(*layouts()[layout], device=device), more=layout in ROWS)


def nasty_masks(device: str = "cpu") -> None:
    for name, plain in {**NASTY, **BOUNDED}.items():
        print(name, file=sys.stderr)
        check(trace(plain), inputs(range(56, LENGTH), range(170), device=device))


def reads() -> dict[str, tuple[Program, dict[str, Tensor]]]:
    """What masks read: captured, or operands; of all widths; at indices that are bounded only."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 6, (BATCH, LENGTH), generator=g).sort().values
    line = torch.randint(0, 50, (64,), generator=g).sort().values
    square = torch.rand(40, 40, generator=g).sort(0).values
    level = torch.rand(HEADS, LENGTH, generator=g).sort().values
    of, spread, wide, small = ids[0].int(), torch.stack([ids, ids], -1)[..., 1], ids * 2**40, ids.to(torch.uint8)
    cells = torch.rand(LENGTH // 8, LENGTH // 8, generator=g) < 0.85
    head_sees = torch.rand(HEADS, generator=g) < 0.5
    ends = torch.tensor([2**31 - 1, -(2**31), 7, 0] * 64, dtype=torch.int32)

    def per_token(b, h, i, j, ids):
        return (ids[b, i] == ids[b, j]) & (j <= i)

    given = trace(per_token, operands={"ids": (2, "i")})
    floats = trace(per_token, operands={"ids": (2, "f")})
    captured = {
        "int32": lambda b, h, i, j: (of[i] == of[j]) & (j <= i),
        "int32 that may overflow": lambda b, h, i, j: (ends[i] + 1 > ends[j] - 1) & (ends[i] * 2 != ends[j]),
        "strided": lambda b, h, i, j: spread[b, i] == spread[b, j],
        "wide": lambda b, h, i, j: (wide[b, i] == wide[b, j]) | (wide[b, i] + 1 < wide[b, j]),
        "uint8": lambda b, h, i, j: small[b, i] == small[b, j],
        "floats": lambda b, h, i, j: level[h, i] > level[h, j] * 1.5,
        "a line": lambda b, h, i, j: line[(i + j) // 8 - 20] < 25,
        "a line of five": lambda b, h, i, j: line[(i + j) // 12] < 25,  # one more than is searched
        "cells": lambda b, h, i, j: cells[i // 8, j // 8],
        "heads alone": lambda b, h, i, j: (h % 2 == b) | (head_sees[h] & (b > 7)),
        "everything": lambda b, h, i, j: True,
        "nothing": lambda b, h, i, j: False,
        "a square": lambda b, h, i, j: square[(i + j) // 32, (i - 2 * j) // 32 + 10] < 0.4,
    }
    return {name: (trace(mask), {}) for name, mask in captured.items()} | {
        "an operand": (given, {"ids": ids}),
        "an operand in 32 bits": (given, {"ids": ids.int()}),
        "an operand of floats": (floats, {"ids": ids.half()}),
    }


def what_masks_read(device: str = "cpu") -> None:
    for name, (program, operands) in reads().items():
        print(name, file=sys.stderr)
        there = program.rebind(program.numbers, tuple(t.to(device) for t in program.tensors))
        here = {name: t.to(device) for name, t in operands.items()}
        check(there, inputs(range(200), range(LENGTH), device=device, **here))
        check(there, inputs(*layouts()["padded"], device=device, **here))


def random_documents(device: str = "cpu") -> None:
    """Odd lengths, tiles of both shapes, parts of the map that stick out, and documents that come back."""
    g = torch.Generator().manual_seed(8)
    for n, kv, tile, block in ((1, 1, (16, 32), 4), (77, 203, (32, 16), 4), (250, 250, (16, 16), 8)):
        ids = torch.randint(0, 300, (BATCH, kv), generator=g)
        for of in (ids.sort().values, ids, ids[:, :1].expand(-1, kv)):
            of = of.int().to(device)
            program = trace(lambda b, h, i, j, of=of: (of[b, i] == of[b, j]) & (j <= i))
            check(program, inputs(*default_positions(n, kv), device=device), tile, block=block)


def registry(device: str = "cpu") -> None:
    """The masks of all mechanisms, and their choices as masks that read a map of blocks."""
    for name in manyheads.names():
        for settings in manyheads.get(name).examples:
            form = manyheads.get(name)(**dict(settings))
            made = _make_inputs(form, 70, 90, batch=BATCH, heads=HEADS, dtype=torch.float32)
            x = Inputs(*made.tensors, 1.0, *default_positions(70, 90), made.operands)
            if isinstance(form, Selection) and why_no_scores(form) is None:
                form, x = as_scores(form, x)
            if isinstance(form, Scores) and form.program.has_mask:
                print(name, settings, file=sys.stderr)
                x = x.with_(q=x.q.to(device), operands=position_operands(form, x))
                x = x.with_(operands={name: t.to(device) for name, t in x.operands.items()})
                check(form.program, x)


def whole_lists(device: str = "cpu") -> None:
    """LISTS from maps, and from turned ones, longer than what a program reads at a time."""
    g = torch.Generator().manual_seed(9)
    for rows, columns in ((1, 1), (3, 140), (7, 5)):
        own = torch.randint(0, 3, (2, 2, rows, columns), generator=g, dtype=torch.uint8)
        own[0, 0, 0] = 0
        own[1, 1, -1] = FULL
        for turned in (False, True):
            states = own.mT.contiguous() if turned else own
            for length in (columns * 16, columns * 16 - 5):
                expected = tables.lists(own, length, 16).values
                found = maps.lists_of(states.to(device), length // 16 if length % 16 else -1, turned).cpu()
                assert found.shape == expected.shape and torch.equal(found[..., 0], expected[..., 0])
                # Behind the last one of a row is one 1 at the least.
                said = torch.arange(found.shape[-1]) <= expected[..., :1] + 1
                assert torch.equal(found[said], expected[said]), (rows, columns, turned, length)


@pytest.mark.parametrize(
    "call", ["all_masks()", "nasty_masks()", "what_masks_read()", "random_documents()", "registry()", "whole_lists()"]
)
def test_in_the_interpreter(call):
    interpret("test_maps", call, strict=False)  # numbers are nasty on purpose, and numpy says so


# ---- what a new table takes ----


def documents(n: int, device: str = "cpu") -> tuple[Scores, Tensor]:
    of = (torch.arange(n, device=device) // 300).int()
    return Scores(mask=lambda b, h, i, j: (of[i] == of[j]) & (j <= i)), of


def test_two_launches_and_nothing_waited_for(monkeypatch):
    """Besides them, two tensors are made; and what the documents are is not asked."""
    form, of = documents(1000)
    x = inputs(range(1000), range(1000))
    launches, made = [], []
    monkeypatch.setattr(quick, "launch", lambda entry, programs, *_, **__: launches.append((entry, programs)))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    def table():
        maps.lists_of(maps.map_of(form.program, x, (128, 128), {}), -1)

    table()  # which writes the text
    launches.clear()
    of.add_(1)
    with Watch():
        table()
    assert [programs for _, programs in launches] == [1, 8]
    assert [name for name in made if "detach" not in name] == ["aten.empty.memory_format"] * 2


def test_integers_of_32_bits_are_not_looked_at(monkeypatch):
    def look(*_):
        raise AssertionError("somebody waits for the device")

    monkeypatch.setattr(sources.Tables, "_is_small", look)
    form, of = documents(1000)
    for outputs in (("mask", "score"), ("bounds",)):
        source = form.program.source("triton", outputs)
        assert "int64" not in source.text.split("def bounds")[0].split("def leaf")[-1]
        of.add_(1)
        assert (
            form.program.source("triton", outputs) is source and source.arguments("cpu")[0].data_ptr() == of.data_ptr()
        )


def test_a_function_that_is_traced_anew_has_the_same_text():
    (form, _), (other, _) = documents(1000), documents(2000)
    a, b = (f.program.source("triton", ("bounds",)) for f in (form, other))
    assert a.text is b.text and a.program is form.program and b.program is other.program


def test_only_what_the_mask_reads_counts(monkeypatch):
    """A score that learns would else make another table in each step."""
    slopes, made = torch.zeros(HEADS), []
    sloped = Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: s - slopes[h])
    form, of = documents(300)
    x = inputs(range(300), range(300))
    assert form.program.mask_reads == {0} and sloped.program.mask_reads == frozenset()
    assert tables._reads_there(form.program, x, {}) and not tables._reads_there(sloped.program, x, {})
    monkeypatch.setattr(tables, "KEPT", type(tables.KEPT)())
    tiles_of = tables.tiles_of
    monkeypatch.setattr(tables, "tiles_of", lambda *given: made.append(given) or tiles_of(*given))
    for program, changed, times in ((sloped.program, slopes, 1), (form.program, of, 2)):
        made.clear()
        for _ in range(2):
            tables.table_of(program, x, (128, 128), {})
            changed.add_(1)
        assert len(made) == times


# ---- on a GPU ----

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


@on_hopper
@pytest.mark.parametrize("call", [all_masks, what_masks_read, random_documents, registry, whole_lists])
def test_on_a_gpu(call):
    call("cuda")


@on_hopper
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_new_documents_on_a_gpu(dtype):
    """Outputs follow the ids, captured or operands. With ids in 32 bits, or as operands, nobody waits for them."""
    n = 3000
    of = (torch.arange(n, device="cuda") // 700).to(dtype)
    captured = Scores(mask=lambda b, h, i, j: (of[i] == of[j]) & (j <= i))
    given = Scores(
        mask=lambda b, h, i, j, ids: (ids[b, i] == ids[b, j]) & (j <= i), operands={"ids": Operand("batch len")}
    )
    q = torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16)
    for form in (captured, given):
        for size in (700, 300, 1100):
            of.copy_(torch.arange(n, device="cuda") // size)
            x = Inputs(q, q, q, 0.125, range(n), range(n), {"ids": of[None].float()} if form is given else {})
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if size == 300 and (form is given or dtype == torch.int32) else 0)
            try:
                o, _ = hopper.run(form, x)
            finally:
                torch.cuda.set_sync_debug_mode(0)
            true, _ = eager.run(form, x.with_(q=q.double(), k=q.double(), v=q.double()))
            assert (o.double() - true).norm() <= 5e-3 * true.norm()
