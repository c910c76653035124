"""The Hopper kernel, emulated, against eager; and the tables of tiles."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import manyheads

pytest.importorskip("triton.experimental.gluon")

import gluon_emulator as emulator

from manyheads.core.expressions import EMPTY, FULL, PARTIAL
from manyheads.core.forms import Operand, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.selection import CHOSEN, as_scores
from manyheads.engines import eager
from manyheads.engines.triton import hopper, launch, lists
from manyheads.engines.triton.hopper import backward, launching, tables
from manyheads.layers.linear.mega import form_of

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
    "laplace": form_of("laplace", 150, True),
    "squared relu": Scores(score=lambda s, b, h, i, j: torch.relu(s) ** 2, normaliser="none"),
    "products": Scores(mask=lambda b, h, i, j: 0 <= i - j < WINDOW, normaliser="none"),
    "nothing": Scores(mask=lambda b, h, i, j: j > i + 10000),
}


@pytest.fixture
def emulated(monkeypatch):
    modules = emulator.load(
        "common", "listed", "gathered", "several", "dropping", "softmax", "attend", "rows", "slopes", "keys", "queries",
        "brackets", "newton", "levels",
    )  # fmt: skip

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
    divided_o = None if form.normaliser == "none" else found_o
    found = backward.run(
        form, x, divided_o, found_lse, do, dlse, keys_tiling=tiling._replace(apart=apart or tiling.apart)
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
    tables.KEPT.found.clear()
    check(FORMS[name], inputs(400, 400))
    tables.KEPT.found.clear()


@pytest.mark.parametrize("kind", ["ranges", "lists"])
@pytest.mark.parametrize("name", FORMS)
def test_gradients(emulated, monkeypatch, name, kind):
    monkeypatch.setattr(tables, "table", getattr(tables, kind))
    tables.KEPT.found.clear()
    check_gradients(FORMS[name], inputs(400, 400))
    tables.KEPT.found.clear()


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
    assert isinstance(x.kv_positions, torch.Tensor)
    check(FORMS[name], x.with_(kv_positions=x.kv_positions.mT.contiguous().mT))


@pytest.mark.parametrize(
    "lengths", [(1, 1), (64, 128), (65, 129), (1, 300), (130, 500), (256, 512), (200, 77), (128, 77)]
)
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


@pytest.mark.parametrize(("name", "settings"), [
    ("moba", {"block_size": 40, "top_k": 3}), ("moba", {"block_size": 128, "top_k": 2}),
    ("flexprefill", {"block_size": 32, "min_budget": 64, "gamma": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("lengths", [(400, 400), (70, 520)])
def test_chosen_blocks(emulated, name, settings, lengths):
    selection, x = manyheads.get(name)(**settings), inputs(*lengths)
    assert isinstance(selection, Selection)
    form, y = as_scores(selection, x)
    assert (y.operands[CHOSEN].float().mean() < 0.9) and not y.operands[CHOSEN].requires_grad
    o, lse = eager.run(selection, x)
    again, again_lse = eager.run(form, y)
    torch.testing.assert_close(again, o)
    torch.testing.assert_close(again_lse, lse)
    check(form, y)
    check_gradients(form, y)


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
    for size, first in (
        (72, 1),
        (68, 0),
    ):  # rows begin at odd addresses; steps between them are no multiple of 16 bytes
        odd = torch.randn(1, 4, 150, size).to(x.q.dtype)
        odd[..., first : first + 64] = x.q
        assert torch.equal(hopper.run(FORMS["causal"], x.with_(q=odd[..., first : first + 64]))[0], o)
    gaps = torch.randn(1, 4, 150, 128).to(x.q.dtype)
    gaps[..., ::2] = x.q
    assert torch.equal(hopper.run(FORMS["causal"], x.with_(q=gaps[..., ::2]))[0], o)
    shared = inputs(40, 60, batch=2)
    shared = shared.with_(k=shared.k[:1].expand(2, -1, -1, -1), v=shared.v[:1].expand(2, -1, -1, -1))
    check(FORMS["causal"], shared)
    check_gradients(FORMS["causal"], shared)


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
    assert (hopper.run(FORMS["products"], x)[1] == 0).all()


@pytest.mark.parametrize("dim", [64, 256])
def test_gradients_that_are_needed(emulated, dim):
    x = inputs(70, 70, heads=2, dim=dim)
    o, lse = hopper.run(FORMS["causal"], x)
    do = torch.randn_like(o)
    whole = hopper.gradients(FORMS["causal"], x, o, lse, do, None)
    q, k, v, do = (t.mT.contiguous().mT for t in (x.q, x.k, x.v, do))  # nobody's hardware writes them like this
    for only in range(3):
        needed = only == 0, only == 1, only == 2
        found = hopper.gradients(FORMS["causal"], x.with_(q=q, k=k, v=v), o, lse, do, None, needed)
        assert [grad is not None for grad in found] == list(needed)
        a, b = found[only], whole[only]
        assert a is not None and b is not None and torch.equal(a, b)


def test_infinite_derivatives_beyond_the_end(emulated):
    """What is read there is 0, where a root has none."""
    form = Scores(score=lambda s, b, h, i, j: torch.sqrt(abs(s)))
    check_gradients(form, inputs(100, 70))
    check_gradients(form, inputs(100, 128))
    check_gradients(form, inputs(128, 70))


def test_autograd(emulated, monkeypatch):
    """From loss to leaves: gradients of some inputs, through o, through the lse, and from a do of stride 0."""
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    x = inputs(150, 200, heads=2)
    wide = {name: getattr(x, name).double().requires_grad_() for name in "qkv"}
    own = {name: getattr(x, name).clone().requires_grad_(name != "k") for name in "qkv"}
    true = eager.run(FORMS["causal"], x.with_(**wide))
    found = launch.attend(FORMS["causal"], x.with_(**own))
    for part in (lambda o, lse: o.sum(), lambda o, lse: lse.square().sum(), lambda o, lse: o.sum() - lse.sum()):
        given = [torch.autograd.grad(part(*found), [own["q"], own["v"]], retain_graph=True)]
        given += [torch.autograd.grad(part(*true), [wide["q"], wide["v"]], retain_graph=True, materialize_grads=True)]
        for a, b in zip(*given, strict=True):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_what_a_backward_pass_reads_must_not_change(emulated, monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda form, x: None)
    slopes = torch.full((2,), 0.1, requires_grad=True)
    form = Scores(score=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))
    o, _ = launch.attend(form, inputs(40, 40, heads=2))
    with torch.no_grad():
        slopes.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


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


# ---- tables that are kept ----


def kept(mask, tile=(128, 64), turned=False, **changes):
    """The table of a new form. 400 queries and keys, 2 rows, 4 heads."""
    x = inputs(400, 400, batch=changes.pop("batch", 2), heads=changes.pop("heads", 4)).with_(**changes)
    found = tables.table_of(Scores(mask=mask).program, x, tile, {}, turned)
    assert found is not None
    return found


def window(size):
    return lambda b, h, i, j: abs(i - j) < size


@pytest.mark.parametrize(("first", "second"), [
    (lambda: kept(window(40)), lambda: kept(window(200))),
    (lambda: kept(lambda b, h, i, j: i < 40), lambda: kept(lambda b, h, i, j: j < 40)),
    (lambda: kept(window(40)), lambda: kept(window(40), q_positions=range(100, 500))),
    (lambda: kept(window(40)), lambda: kept(window(40), kv_positions=range(100, 500))),
    (lambda: kept(window(40)), lambda: kept(window(40), (128, 128))),
    (lambda: kept(FORMS["causal"].mask, (128, 128)), lambda: kept(FORMS["causal"].mask, (128, 128), True)),
    (lambda: kept(FORMS["windows of heads"].mask), lambda: kept(FORMS["windows of heads"].mask, heads=2)),
    (lambda: kept(lambda b, h, i, j: i - j < 50 * b), lambda: kept(lambda b, h, i, j: i - j < 50 * b, batch=3)),
], ids=["numbers", "structure", "queries", "keys", "tile", "turned", "heads", "batch"])  # fmt: skip
def test_a_kept_table_is_that_of_the_call(first, second):
    tables.KEPT.found.clear()
    made = first()
    assert first() is made, "the same call has the same table"
    after = second()
    tables.KEPT.found.clear()
    assert torch.equal(after.values, second().values)


def test_the_mask_looks_at_tiles_that_stick_out():
    """400 queries are no whole tiles of 128, 400 keys are four of 100."""
    everything = lambda b, h, i, j: i >= 0  # noqa: E731
    assert kept(everything, (128, 100)).values[0, 0].tolist() == [[0, 4, 0, 4]] * 4
    assert kept(everything, (128, 100), turned=True).values[0, 0].tolist() == [[0, 4, 0, 3]] * 4


def test_tensors_without_a_version_are_looked_at_again():
    with torch.inference_mode():
        limit = torch.tensor([30])
        form, x = Scores(mask=lambda b, h, i, j: abs(i - j) < limit[0 * b]), inputs(400, 400)
        before = tables.table_of(form.program, x, (128, 64), {})
        limit.add_(300)
        after = tables.table_of(form.program, x, (128, 64), {})
    assert before is not None and after is not None and not torch.equal(before.values, after.values)


def test_operands_that_a_mask_reads_are_looked_at_again():
    form = Scores(mask=lambda b, h, i, j, g: abs(i - j) < g[h], operands={"g": Operand("heads")})
    x = inputs(400, 400)
    found = [tables.table_of(form.program, x, (128, 64), {"g": torch.full((4,), size)}) for size in (30.0, 300.0)]
    assert found[0] is not None and found[1] is not None and not torch.equal(found[0].values, found[1].values)


def test_a_table_keeps_what_it_was_made_of():
    """Else another tensor might get its id."""
    limit = torch.tensor([30])
    alive = weakref.ref(limit)
    kept(lambda b, h, i, j, limit=limit: abs(i - j) < limit[0 * b])
    del limit
    gc.collect()
    assert alive() is not None
    tables.KEPT.found.clear()
    gc.collect()
    assert alive() is None


def test_the_latest_used_are_kept():
    few = lists.Kept(sets=2, elements=10)
    for key in "ab":
        few.put((key,), key, 4, None)
    assert few.get(("a",)) == "a"
    few.put(("c",), "c", 4, None)
    assert few.get(("b",)) is None and few.get(("a",)) == "a"
    few.put(("d",), "d", 8, None)
    assert list(few.found) == [("d",)], "too large together, though not too many"


def test_a_table_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        tables.steps_of(kept(window(40)), (2, 4, 5))


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
