"""The Hopper kernel, emulated, against eager; and the tables of tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator

from manyheads.core.expressions import EMPTY, FULL, PARTIAL
from manyheads.core.forms import Operand, Scores
from manyheads.core.inputs import Inputs, default_positions
from manyheads.engines import eager
from manyheads.engines.triton import hopper
from manyheads.engines.triton.hopper import backward, launching, tables

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
    "signed": Scores(mask=lambda b, h, i, j: j <= i, normaliser="signed"),
    "signed with score": Scores(score=lambda s, b, h, i, j: s - 0.3, normaliser="signed"),
    "sigmoid": Scores(
        mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: torch.sigmoid(s - 3.0), normaliser="none"
    ),
    "squared relu": Scores(score=lambda s, b, h, i, j: torch.relu(s) ** 2, normaliser="none"),
    "products": Scores(mask=lambda b, h, i, j: 0 <= i - j < WINDOW, normaliser="none"),
    "nothing": Scores(mask=lambda b, h, i, j: j > i + 10000),
}


@pytest.fixture
def emulated(monkeypatch):
    modules = emulator.load("common", "attend", "rows", "slopes", "keys", "queries")

    def run(kernel, programs, own, source, arguments):
        found = {} if source is None else emulator.functions(source.text)
        functions = [found.get(name) for name in kernel.functions]
        function = getattr(modules[kernel.name], kernel.name)
        assert len(own) == len(kernel.own)
        emulator.Kernel(lambda *args: function(*args[: len(own)], args[len(own) :], *functions))[(programs,)](
            *own, *arguments
        )

    monkeypatch.setattr(launching.Kernel, "run", run)
    monkeypatch.setattr(backward.rows, "rows", emulator.Kernel(modules["rows"].rows))


def inputs(q_len, kv_len, heads=4, kv_heads=2, batch=1, dim=64, dtype=torch.bfloat16, v_dim=None, device="cpu"):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, q_len, dim).to(device, dtype)
    k = torch.randn(batch, kv_heads, kv_len, dim).to(device, dtype)
    v = torch.randn(batch, kv_heads, kv_len, v_dim or dim).to(device, dtype)
    return Inputs(q, k, v, dim**-0.5, *default_positions(q_len, kv_len))


def check_gradients(form, x, apart=False, lse_too=True):
    """What the backward pass makes of the forward pass's o and lse, against float64."""
    torch.manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, lse = eager.run(form, wide)
    assert lse is not None
    do, dlse = torch.randn_like(o).to(x.q.dtype), torch.randn_like(lse).float()
    dlse = dlse * (lse > -torch.inf) if lse_too and form.normaliser != "none" else None
    loss = (o * do).sum() + (0 if dlse is None else (torch.where(lse > -torch.inf, lse, 0) * dlse).sum())
    true = torch.autograd.grad(loss, [wide.q, wide.k, wide.v])
    found_o, found_lse = hopper.run(form, x)
    tiling = backward.keys_tiling_of(form, x)
    found = backward.run(
        form, x, found_o, found_lse, do, dlse, keys_tiling=tiling._replace(apart=apart or tiling.apart)
    )
    for name, a, b in zip("qkv", found, true, strict=True):
        assert a is not None and a.dtype == x.q.dtype and a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-9)
        assert error < 1e-2 and torch.isfinite(a).all(), (name, error)


def check(form, x, scale=None):
    x = x if scale is None else x.with_(scale=scale)
    wide = x.with_(q=x.q.double(), k=x.k.double(), v=x.v.double())
    o, lse = eager.run(form, wide)
    assert lse is not None
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
    monkeypatch.setattr(tables, "table", getattr(tables, kind))
    tables._TABLES.clear()
    check(FORMS[name], inputs(400, 400))
    tables._TABLES.clear()


@pytest.mark.parametrize("kind", ["ranges", "lists"])
@pytest.mark.parametrize("name", FORMS)
def test_gradients(emulated, monkeypatch, name, kind):
    monkeypatch.setattr(tables, "table", getattr(tables, kind))
    tables._TABLES.clear()
    check_gradients(FORMS[name], inputs(400, 400))
    tables._TABLES.clear()


@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (65, 129), (1, 300), (130, 500), (200, 77)])
@pytest.mark.parametrize("name", ["full", "causal", "soft-cap"])
def test_gradients_at_lengths(emulated, name, lengths):
    check_gradients(FORMS[name], inputs(*lengths, batch=2, heads=2, kv_heads=1))


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (256, 256), (72, 72), (192, 128), (16, 40), (96, 24)])
def test_gradients_of_sizes(emulated, dim, v_dim):
    x = inputs(150, 330, heads=2, dim=dim, v_dim=v_dim)
    check(FORMS["window"], x)
    check_gradients(FORMS["window"], x)
    check_gradients(FORMS["soft-cap"], x, apart=True, lse_too=False)


def ragged(x):
    """Three rows of 300 tokens: padded on the left, padded on the right, with gaps and keys that are not in order."""
    at = torch.arange(300)
    left, right = (at - 130).clamp(min=-1), torch.where(at < 170, at, -1)
    gaps = torch.where(at % 3 > 0, at, -1)
    mixed = gaps[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    q_positions, kv_positions = torch.stack([left, right, gaps]), torch.stack([left, right, mixed])
    return x.with_(q_positions=q_positions.to(x.q.device), kv_positions=kv_positions.to(x.q.device))


@pytest.mark.parametrize("name", ["full", "causal", "window", "ALiBi", "documents", "sigmoid"])
def test_rows_of_their_own(emulated, name):
    x = ragged(inputs(300, 300, batch=3))
    check(FORMS[name], x)
    check_gradients(FORMS[name], x)
    check(FORMS[name], x.with_(q_positions=range(300)))


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


def test_sinks(emulated):
    form = Scores(mask=lambda b, h, i, j: j + 40 <= i, sink="sink", operands={"sink": Operand("heads")})
    x = inputs(200, 200)
    x = x.with_(operands={"sink": torch.tensor([-3.0, -1.0, 0.5, 8.0])})
    check(form, x)
    check_gradients(form, x)
    o, lse = hopper.run(form, x.with_(k=x.k[:, :, :0], v=x.v[:, :, :0], kv_positions=range(0)))
    assert (o == 0).all() and (lse == x.operands["sink"][None, :, None]).all()


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
    found = tables.ranges(tiles[None, None], 640, 128).values[0, 0]
    assert found[0].tolist() == [1, 4, 2, 4]
    assert found[1, 0] == found[1, 1] == 0
    assert found[2].tolist() == [0, 5, 2, 5]
    assert found[3, :2].tolist() == [0, 5] and found[3, 2] == found[3, 3]
    assert tables.ranges(tiles[None, None], 600, 128).values[0, 0, 2].tolist() == [0, 5, 2, 4]


def test_lists():
    e, p, f = EMPTY, PARTIAL, FULL
    tiles = torch.tensor([[e, p, f, f], [e, e, e, e], [f, f, f, f]], dtype=torch.uint8)
    found = tables.lists(tiles[None, None], 512, 128).values[0, 0]
    assert found.tolist() == [[3, 3, 4, 6, 1], [0, 1, 1, 1, 1], [4, 0, 2, 4, 6]]
    assert tables.lists(tiles[None, None], 500, 128).values[0, 0, 2].tolist() == [4, 0, 2, 4, 7]


def test_table_is_the_cheaper_one():
    e, f = EMPTY, FULL
    run, holes = torch.tensor([[[[f, f, e]]]], dtype=torch.uint8), torch.tensor([[[[f, e, f]]]], dtype=torch.uint8)
    assert tables.table(run, 384, 128).kind == tables.RANGES
    assert tables.table(holes, 384, 128).kind == tables.LISTS


# ---- on a GPU ----

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


@on_hopper
@pytest.mark.parametrize("name", FORMS)
def test_forms_on_a_gpu(name):
    x = inputs(700, 700, heads=8, batch=2, dim=128, device="cuda")
    check(FORMS[name], x)
    check_gradients(FORMS[name], x)


@on_hopper
@pytest.mark.parametrize("lengths", [(1, 1), (64, 128), (1, 1000), (130, 700), (200, 77), (2049, 2049)])
@pytest.mark.parametrize("name", ["full", "causal", "soft-cap"])
def test_lengths_on_a_gpu(name, lengths):
    x = inputs(*lengths, batch=2, heads=2, kv_heads=1, dim=128, device="cuda")
    check(FORMS[name], x)
    check_gradients(FORMS[name], x)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (256, 256), (72, 72), (80, 24), (192, 128), (16, 16)])
def test_sizes_on_a_gpu(dim, v_dim, dtype):
    x = inputs(333, 500, dim=dim, v_dim=v_dim, dtype=dtype, device="cuda")
    check(FORMS["causal"], x)
    check_gradients(FORMS["causal"], x)


@on_hopper
@pytest.mark.parametrize("name", ["full", "causal"])
def test_rows_of_their_own_on_a_gpu(name):
    x = ragged(inputs(300, 300, batch=3, dim=128, device="cuda"))
    check(FORMS[name], x)
    check_gradients(FORMS[name], x)


@on_hopper
@pytest.mark.parametrize("name", ["window", "ALiBi", "documents"])
def test_the_same_bits_every_run(name):
    x = inputs(4000, 4000, heads=16, kv_heads=4, dim=128, device="cuda")
    o, lse = hopper.run(FORMS[name], x)
    do = torch.randn_like(o)
    first = hopper.gradients(FORMS[name], x, o, lse, do, None)
    for _ in range(5):
        again = *hopper.run(FORMS[name], x), *hopper.gradients(FORMS[name], x, o, lse, do, None)
        for a, b in zip(again, (o, lse, *first), strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
