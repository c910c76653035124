"""The Hopper kernel, emulated, against eager; and the tables of tiles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator

from manyheads.core.expressions import EMPTY, FULL, PARTIAL
from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, default_positions
from manyheads.engines import eager
from manyheads.engines.triton import hopper

SLOPES = torch.tensor([0.3, 0.05, 0.01, 0.2])
DOCUMENTS = torch.arange(700) // 150
CAP, WINDOW = 5.0, 100

FORMS = {
    "full": Scores(),
    "causal": Scores(mask=lambda b, h, i, j: j <= i),
    "window": Scores(mask=lambda b, h, i, j: 0 <= i - j < WINDOW),
    "sinks and window": Scores(mask=lambda b, h, i, j: (j <= i) & ((i - j < 40) | (j < 4))),
    "soft-cap": Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)),
    "ALiBi": Scores(score=lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j)),
    "documents": Scores(mask=lambda b, h, i, j: (DOCUMENTS[i] == DOCUMENTS[j]) & (j <= i)),
    "windows of heads": Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 30 * (h + 1))),
    # Queries 100 to 300 see nothing, a whole tile of them among them; others see nothing in their first tiles.
    "empty rows": Scores(mask=lambda b, h, i, j: (j <= i) & ((i < 100) | (i > 300)) & ((i < 350) | (j > 140))),
    "nothing": Scores(mask=lambda b, h, i, j: j > i + 10000),
}


@pytest.fixture
def emulated(monkeypatch):
    kernel = emulator.load(hopper.hopper_kernel.__file__, "manyheads.engines.triton.hopper_names")

    def entry(source):
        found = emulator.functions(source.text)
        functions = found.get("mask"), found.get("score")
        own = len(hopper.OWN)
        return emulator.Kernel(lambda *args: kernel.attend(*args[:own], args[own:], *functions))

    monkeypatch.setattr(hopper, "_entry", entry)
    monkeypatch.setattr(hopper, "hopper_kernel", SimpleNamespace(attend=emulator.Kernel(kernel.attend)))


def inputs(q_len, kv_len, heads=4, kv_heads=2, batch=1, dim=64, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim).to(dtype) for _ in range(2))
    return Inputs(q, k, v, dim**-0.5, *default_positions(q_len, kv_len))


def check(form, x, scale=None):
    x = x if scale is None else x.with_(scale=scale)
    wide = x.with_(q=x.q.double(), k=x.k.double(), v=x.v.double())
    o, lse = eager.run(form, wide)
    found_o, found_lse = hopper.run(form, x)
    assert found_o.dtype == x.q.dtype and found_lse.dtype == torch.float32
    assert torch.isfinite(found_o).all()
    seen = lse > -torch.inf
    assert torch.equal(found_lse > -torch.inf, seen)
    assert (found_o[~seen] == 0).all()
    torch.testing.assert_close(found_lse[seen].double(), lse[seen], atol=1e-4, rtol=1e-4)
    error = (found_o.double() - o).norm() / o.norm().clamp(min=1e-30)
    assert error < 5e-3, error


@pytest.mark.parametrize("kind", ["ranges", "lists"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(emulated, monkeypatch, name, kind):
    monkeypatch.setattr(hopper, "table", getattr(hopper, kind))
    hopper._TABLES.clear()
    check(FORMS[name], inputs(400, 400))
    hopper._TABLES.clear()


@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (65, 129), (1, 300), (130, 500), (256, 512), (200, 77)])
@pytest.mark.parametrize("name", ["full", "causal", "ALiBi"])
def test_lengths(emulated, name, lengths):
    check(FORMS[name], inputs(*lengths, batch=2, heads=2, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_sizes(emulated, dim, dtype):
    check(FORMS["window"], inputs(200, 330, heads=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("name", ["full", "causal", "sinks and window"])
def test_slots_are_used_again(emulated, name):
    check(FORMS[name], inputs(140, 1200, heads=2, dim=128))


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scales(emulated, scale):
    check(FORMS["causal"], inputs(100, 200), scale=scale)


def test_strides(emulated):
    x = inputs(150, 150)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v))
    o, lse = hopper.run(FORMS["causal"], x)
    again = hopper.run(FORMS["causal"], x.with_(q=q, k=k, v=v))
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)
    odd = torch.randn(1, 4, 150, 65).to(x.q.dtype)
    odd[..., 1:] = x.q
    assert torch.equal(hopper.run(FORMS["causal"], x.with_(q=odd[..., 1:]))[0], o)


def test_neighbours_are_not_read(emulated):
    x = inputs(100, 100, heads=2, kv_heads=2)
    o, _ = hopper.run(FORMS["causal"], x)
    x.k[:, 1], x.v[:, 1] = torch.nan, torch.nan
    assert torch.equal(hopper.run(FORMS["causal"], x)[0][:, 0], o[:, 0])


def test_a_changed_tensor_is_looked_at_again(emulated):
    limits = torch.tensor([30, 300])
    form = Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < limits[h]))
    x = inputs(300, 300, heads=2)
    check(form, x)
    limits.mul_(2)
    check(form, x)


def test_nothing_to_read():
    x = inputs(5, 0)
    o, lse = hopper.run(FORMS["causal"], x)
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_ranges():
    e, p, f = EMPTY, PARTIAL, FULL
    tiles = torch.tensor([[e, p, f, f, e], [e, e, e, e, e], [f, e, f, f, f], [p, e, e, e, p]], dtype=torch.uint8)
    found = hopper.ranges(tiles[None, None], 640, 128).values[0, 0]
    assert found[0].tolist() == [1, 4, 2, 4]
    assert found[1, 0] == found[1, 1] == 0
    assert found[2].tolist() == [0, 5, 2, 5]
    assert found[3, :2].tolist() == [0, 5] and found[3, 2] == found[3, 3]
    assert hopper.ranges(tiles[None, None], 600, 128).values[0, 0, 2].tolist() == [0, 5, 2, 4]


def test_lists():
    e, p, f = EMPTY, PARTIAL, FULL
    tiles = torch.tensor([[e, p, f, f], [e, e, e, e], [f, f, f, f]], dtype=torch.uint8)
    found = hopper.lists(tiles[None, None], 512, 128).values[0, 0]
    assert found.tolist() == [[3, 3, 4, 6, 1], [0, 1, 1, 1, 1], [4, 0, 2, 4, 6]]
    assert hopper.lists(tiles[None, None], 500, 128).values[0, 0, 2].tolist() == [4, 0, 2, 4, 7]


def test_table_is_the_cheaper_one():
    e, f = EMPTY, FULL
    run, holes = torch.tensor([[[[f, f, e]]]], dtype=torch.uint8), torch.tensor([[[[f, e, f]]]], dtype=torch.uint8)
    assert hopper.table(run, 384, 128).kind == hopper.RANGES
    assert hopper.table(holes, 384, 128).kind == hopper.LISTS
