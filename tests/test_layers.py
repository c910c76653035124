"""What every layer must do, written once: a new file in manyheads/layers is tested without a line here."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import nn

from manyheads import layers
from manyheads.core.layer import Layer, layer
from manyheads.core.published import find

CASES = [(name, dict(settings)) for name in layers.names() for settings in layers.get(name).examples]
LAWS = [(name, law) for name in layers.names() for law in layers.get(name).laws]
LENGTH = 13  # no block or group of an example divides it

# Nothing but rounding in float64 stands between two ways to the same number.
EXACT = {"atol": 1e-11, "rtol": 1e-9}


def label(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return getattr(value, "__name__", str(value))


def cases(keep=lambda found, settings: True):
    chosen = [(name, settings) for name, settings in CASES if keep(layers.get(name), settings)]
    return pytest.mark.parametrize(("name", "settings"), chosen, ids=label)


def causal(found: Layer, settings) -> bool:
    return settings.get("causal", found.causal)


def made(name, settings, dtype=torch.float64) -> nn.Module:
    """The module, with every parameter moved off values such as 0 and 1, where much would hold by chance."""
    module = layers.get(name)(**settings).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def example_x(settings, length=LENGTH, batch=2, dtype=torch.float64):
    return torch.randn(batch, length, settings["dim"], dtype=dtype)


def takes_present(module) -> bool:
    return "present" in inspect.signature(module.forward).parameters


def close(a, b, found, **bounds):
    torch.testing.assert_close(a, b, **{k: v * found.tolerance for k, v in (bounds or EXACT).items()})


# ---- right ----


@pytest.mark.parametrize("length", [1, 2, 7, LENGTH])
@cases()
def test_equals_its_reference(name, settings, length):
    """Outputs, and the gradients of x and of every parameter, in float64."""
    found = layers.get(name)
    module = made(name, settings)
    x = example_x(settings, length).requires_grad_()
    check_same(found, module, x, module(x), found.reference(module, x), all_used=found.losses is None)


@cases(lambda found, settings: found.losses is not None)
def test_every_parameter_changes_outputs_or_losses(name, settings):
    """A choice that passes no gradient is learned from a loss alone."""
    module = made(name, settings)
    x = example_x(settings)
    (module(x).square().sum() + sum(module.losses(x).values())).backward()
    for parameter, value in module.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, f"{parameter} changes nothing"


@cases(lambda found, settings: found.losses is not None)
def test_losses_equal_their_reference(name, settings):
    found = layers.get(name)
    module = made(name, settings)
    x = example_x(settings).requires_grad_()
    got, wanted = module.losses(x), found.losses(module, x)
    assert list(got) == list(wanted)
    for one in got:
        assert got[one].ndim == 0
        check_same(found, module, x, got[one], wanted[one], all_used=False)


def check_same(found, module, x, got, wanted, all_used=True):
    close(got, wanted, found)
    leaves = {"x": x, **dict(module.named_parameters())}
    weight = torch.randn_like(got)
    several = [
        torch.autograd.grad(y, list(leaves.values()), weight, retain_graph=True, allow_unused=True)
        for y in (got, wanted)
    ]
    for leaf, ours, theirs in zip(leaves, *several, strict=True):
        zero = torch.zeros_like(leaves[leaf])
        ours, theirs = (zero if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(
            ours, theirs, **{k: v * found.tolerance for k, v in EXACT.items()}, msg=lambda m, leaf=leaf: f"{leaf}: {m}"
        )
        assert not all_used or x.shape[1] < 7 or theirs.abs().sum() > 0, f"{leaf} changes nothing"


@pytest.mark.parametrize(("name", "law"), LAWS, ids=label)
@pytest.mark.parametrize("length", [1, LENGTH])
def test_laws(name, law, length):
    found = layers.get(name)
    torch.set_default_dtype(torch.float64)  # what a law multiplies out must not be rounded
    try:
        one, other = law()
    finally:
        torch.set_default_dtype(torch.float32)
    x = example_x(found.examples[0], length)
    close(one(x), other(x), found)


@cases(lambda found, settings: found.weights is not None)
def test_has_as_many_weights_as_the_paper_says(name, settings):
    found = layers.get(name)
    assert sum(p.numel() for p in found(**settings).parameters()) == found.weights(**settings)


# ---- the future, and padding ----


@cases(lambda found, settings: causal(found, settings) and not found.sees_future)
def test_ignores_the_future(name, settings):
    """Up to rounding: products of another number of rows may be summed in another order."""
    module = made(name, settings)
    x = example_x(settings)
    before = module(x)
    for cut in (1, 7, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:]) * 10
        after = module(changed)
        close(after[:, :cut], before[:, :cut], layers.get(name))
        assert not torch.allclose(after[:, cut:], before[:, cut:])


@cases(lambda found, settings: not causal(found, settings) or bool(found.sees_future))
def test_says_that_it_sees_the_future_only_if_it_does(name, settings):
    module = made(name, settings)
    x = example_x(settings)
    changed = x.clone()
    changed[:, -1] = 10 * torch.randn_like(changed[:, -1])
    assert not torch.allclose(module(x)[:, :-1], module(changed)[:, :-1])


@pytest.mark.parametrize("side", ["left", "right"])
@cases()
def test_a_padded_row_equals_the_row_alone(name, settings, side):
    """With garbage where no token is."""
    found, module = layers.get(name), made(name, settings)
    assert takes_present(module)
    lengths = [LENGTH, 7, 1, 0]
    x = example_x(settings, batch=4)
    present = torch.zeros(4, LENGTH, dtype=torch.bool)
    rows = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
    for b, row in enumerate(rows):
        present[b, row] = True
    x[~present] = 1e3
    out = module(x, present=present)
    assert out[~present].eq(0).all()
    for b, row in enumerate(rows[:3]):
        close(out[b, row], module(x[b : b + 1, row])[0], found)


@pytest.mark.parametrize("side", ["left", "right"])
@cases(lambda found, settings: found.losses is not None)
def test_padding_changes_no_losses(name, settings, side):
    """Two rows and an empty one give what the two give without padding: a loss may mix a row's tokens."""
    found, module = layers.get(name), made(name, settings)
    x = example_x(settings, batch=3)
    row = slice(LENGTH - 7, None) if side == "left" else slice(0, 7)
    present = torch.zeros(3, LENGTH, dtype=torch.bool)
    present[:2, row] = True
    x[~present] = 1e3
    alone = module.losses(x[:2, row])
    for loss, value in module.losses(x, present=present).items():
        close(value, alone[loss], found)


# ---- what single layers promise ----


@pytest.mark.parametrize("head_dim", [3, 16])
def test_a_narrow_head_cannot_have_every_attention_matrix(head_dim):
    """The theorem of fixed_head_size: with 16 channels a head fits any matrix over 16 tokens, with 3 it does not."""
    n = 16
    torch.manual_seed(1)
    wanted = (2 * torch.randn(n, n, dtype=torch.float64)).log_softmax(-1)
    x = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q  # linearly independent tokens
    w_q, w_k = (torch.randn(n, head_dim, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizer = torch.optim.LBFGS([w_q, w_k], max_iter=400, line_search_fn="strong_wolfe")

    def divergence():
        s = (x @ w_q @ (x @ w_k).T / head_dim**0.5).log_softmax(-1)
        return (wanted.exp() * (wanted - s)).sum(-1).mean()

    def closure():
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert divergence() < 1e-4 if head_dim == n else divergence() > 0.05


def test_an_f_step_of_mae_leaves_one_head_out():
    module = made("mae", {"dim": 12, "heads": 3, "hidden": 5})
    x = example_x({"dim": 12}, batch=3)
    out = module(x, expert=torch.tensor([0, 1, 2]))
    for i in range(3):
        without = made("mae", {"dim": 12, "heads": 3, "hidden": 5}).attention
        without.load_state_dict(module.attention.state_dict())
        with torch.no_grad():
            without.o.weight[:, 4 * i : 4 * i + 4] = 0
        torch.testing.assert_close(out[i], 1.5 * without(x[i : i + 1])[0])


def test_bam_shares_keys_and_values_only_if_asked():
    sizes = {"dim": 8, "heads": 2, "experts": 3}
    own, shared = (sum(p.numel() for p in layers.get("bam")(**sizes, shared_kv=s).parameters()) for s in (False, True))
    assert (own, shared) == (3 * 4 * 64 + 24, (3 * 2 + 2) * 64 + 24)


def test_compressed_convolutional_attention_equals_zaya():
    """The authors' layer as transformers has it."""
    zaya = pytest.importorskip("transformers.models.zaya.modeling_zaya")
    config = zaya.ZayaConfig(
        hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = zaya.ZayaAttention(config, 0).double()
    theta = config.rope_parameters["hybrid"]["rope_theta"]
    sizes = {"dim": 12, "heads": 4, "kv_heads": 2, "head_dim": 8, "rotated": 0.5, "rope_theta": float(theta)}
    module = made("compressed_convolutional_attention", sizes)
    names = {
        "q": "qkv_proj.q_proj", "k": "qkv_proj.k_proj", "v_now": "qkv_proj.v_proj_current",
        "v_before": "qkv_proj.v_proj_delayed", "conv_channels": "qkv_proj.conv_qk_depthwise",
        "conv_heads": "qkv_proj.conv_qk_grouped", "temperature": "qk_norm.temp", "o": "o_proj",
    }  # fmt: skip
    renamed = {}
    for name, value in module.state_dict().items():
        mine, _, rest = name.partition(".")
        renamed[f"{names[mine]}.{rest}" if rest else names[mine]] = value
    theirs.load_state_dict(renamed)
    x = example_x(sizes)
    turn = zaya.ZayaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None], "hybrid")
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out, _ = theirs(x, attention_mask={"causal": mask}, position_embeddings=turn)
    torch.testing.assert_close(module(x), out, atol=1e-6, rtol=1e-5)  # they take the softmax in float32


# ---- as a module ----


@cases()
def test_runs_in_bfloat16(name, settings):
    module = made(name, settings, torch.bfloat16)
    x = example_x(settings, dtype=torch.bfloat16).requires_grad_()
    y = module(x)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape and y.isfinite().all()
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@cases()
def test_is_saved_and_loaded(name, settings):
    one, other = made(name, settings), made(name, settings)
    x = example_x(settings)
    assert not torch.allclose(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert one(x).equal(other(x))


SPIKES = {"spikformer_v2_ssa"}  # whose outputs are, so that a small step moves none, or one that it should not


@cases()
def test_a_new_one_trains(name, settings):
    """From its own start, not from numbers that the test has moved: some step downhill lowers a loss."""
    module = layers.get(name)(**settings).double()
    x, wanted = (example_x(settings) for _ in range(2))

    def loss():
        return (module(x) - wanted).square().mean()

    before = loss()
    before.backward()
    distance = 0.1 if name in SPIKES else 1e-3
    step = distance / max(p.grad.norm() for p in module.parameters() if p.grad is not None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= step * parameter.grad
    assert loss() < before


@cases()
def test_refuses_another_shape(name, settings):
    module = made(name, settings)
    with pytest.raises(ValueError, match=rf"x must be a tensor \[batch, len, {settings['dim']}\], not \(2, 3, 99\)"):
        module(torch.randn(2, 3, 99, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"present must be a bool tensor \(2, 3\), not torch.int64"):
        module(example_x(settings, 3), present=torch.ones(2, 3, dtype=torch.long))


# ---- what it says of itself ----


@pytest.mark.parametrize("name", layers.names())
def test_says_what_it_is(name):
    found = layers.get(name)
    assert found.name == name and found.family in found.factory.__module__
    assert found.summary.endswith(".") and "    " in found.text and found.arxiv in found.text
    assert found.factory.published is found and found.factory.__doc__
    assert found.tolerance == 1.0 or found.tolerance_reason
    for law in found.laws:
        assert law.__doc__
    names = list(inspect.signature(found.factory).parameters)
    assert names[0] == "dim" and set(found.required) <= set(found.examples[0])
    assert (found.losses is None) == (not hasattr(found.factory, "losses"))


@pytest.mark.parametrize("name", layers.names())
def test_bad_settings_are_one_clear_sentence(name):
    found, good = layers.get(name), dict(layers.get(name).examples[0])
    with pytest.raises(TypeError, match="'no_such_thing' is no setting of"):
        found(**good, no_such_thing=1)
    with pytest.raises(ValueError, match="dim"):
        found(**{**good, "dim": 0})
    with pytest.raises(TypeError, match="dim"):
        found(**{**good, "dim": "8"})


def test_unknown_name():
    with pytest.raises(KeyError, match=r"'moj' is no layer\. Did you mean 'moh'"):
        layers.get("moj")


def test_a_layer_is_published_under_its_files_name():
    made = type("Thing", (nn.Module,), {"__module__": "manyheads.layers.heads.some_thing"})
    assert layer(reference=lambda m, x: x, arxiv="", examples=())(made) is made
    assert (made.published.name, made.published.family) == ("some_thing", "heads")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes files into a package of its own, `one__in__square` as one/square.py; returns what `find` makes of them."""

    def walk(**files):
        root = tmp_path / "some_layers"
        for name, source in {"__init__": "", **files}.items():
            file = root / f"{name.replace('__in__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return find("some_layers", [str(root)], Layer, "a class under @layer(...)")

    yield walk
    for name in [name for name in sys.modules if name.startswith("some_layers")]:
        del sys.modules[name]


SOURCE = """
from torch import nn
from manyheads.core.layer import layer
@layer(reference=None, arxiv="", examples=())
class {name}(nn.Module):
    "A layer."
"""


def test_a_file_is_found_by_its_name_and_helpers_beside_the_layer_are_not(package):
    found = package(one__in__square=SOURCE.format(name="Square") + "class Helper(nn.Module): pass")
    assert list(found) == ["square"] and found["square"].family == "one"
    assert found["square"].factory.__name__ == "Square"


@pytest.mark.parametrize("source", ["class Square: pass", "from manyheads.layers.heads.mhe import MultiHeadEmbedding"])
def test_a_file_without_a_layer_of_its_own_is_an_error(package, source):
    with pytest.raises(TypeError, match=r"some_layers\.one\.square must define square, a class under @layer"):
        package(one__in__square=source)


def test_a_name_that_stands_twice_is_an_error(package):
    with pytest.raises(TypeError, match=r"square is defined twice, the second time in some_layers\.two\.square"):
        package(one__in__square=SOURCE.format(name="Square"), two__in__square=SOURCE.format(name="Other"))
