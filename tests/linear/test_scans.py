"""The selective scan equals its step, chunk by chunk, in every gradient; it neither overflows nor outgrows a row."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.core import scans
from manyheads.core.scans import CHUNK, SelectiveState, selective_scan
from tests.test_mechanisms import Memory


def inputs(length, dtype=torch.float64, batch=2, channels=3, n=4):
    x, dt = torch.randn(2, batch, length, channels, dtype=dtype)
    b, c = torch.randn(2, batch, length, n, dtype=dtype)
    return [x, torch.nn.functional.softplus(dt), -torch.rand(channels, n, dtype=dtype).exp(), b, c]


def steps(x, dt, a, b, c, state=None):
    h = x.new_zeros(len(x), *a.shape) if state is None else state
    out = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + torch.einsum("bd,bn->bdn", dt[:, t] * x[:, t], b[:, t])
        out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
    return torch.stack(out, 1), h


def close(got, wanted, **bounds):
    torch.testing.assert_close(got, wanted, **(bounds or {"atol": 1e-12, "rtol": 1e-10}))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 29])
def test_equals_the_steps_with_every_gradient(length, monkeypatch):
    """From a state on, over chunks of 8."""
    monkeypatch.setattr(scans, "CHUNK", 8)
    leaves = [t.requires_grad_() for t in (*inputs(length), torch.randn(2, 3, 4, dtype=torch.float64))]
    got, wanted = selective_scan(*leaves), steps(*leaves)
    weights = [torch.randn_like(t) for t in wanted]
    close(got, wanted)
    close(*(torch.autograd.grad(o, leaves, weights) for o in (got, wanted)))


def test_a_row_of_several_real_chunks_equals_the_steps():
    given = inputs(2 * CHUNK + 37, batch=1)
    close(selective_scan(*given), steps(*given))


@pytest.mark.parametrize("step", [1, 5])
def test_going_on_from_a_state_equals_the_whole(step):
    x, dt, a, b, c = inputs(14)
    whole, last = selective_scan(x, dt, a, b, c)
    state, outputs = None, []
    for at in range(0, 14, step):
        cut = slice(at, at + step)
        y, state = selective_scan(x[:, cut], dt[:, cut], a, b[:, cut], c[:, cut], state)
        outputs.append(y)
    close((torch.cat(outputs, 1), state), (whole, last))


def test_a_token_without_time_is_not_there():
    x, dt, a, b, c = inputs(12)
    there = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    dt[:, ~there] = 0
    y, state = selective_scan(x, dt, a, b, c)
    alone, last = selective_scan(x[:, there], dt[:, there], a, b[:, there], c[:, there])
    close((y[:, there], state), (alone, last))


@pytest.mark.parametrize("strength", [1e-8, 1e4])
def test_neither_strong_nor_weak_decays_overflow(strength):
    """Of exp(-10^4) a step, whose inverse no dtype holds; to float32's rounding over 300 tokens, or its least."""
    leaves = [t.requires_grad_() for t in inputs(CHUNK + 44, torch.float32)]
    leaves[2] = (leaves[2].detach() * strength).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, wanted = selective_scan(*leaves)[0], steps(*exact)[0]
    for ours, theirs in [
        (got, wanted),
        *zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), exact), strict=True),
    ]:
        info = torch.finfo(torch.float32)
        assert (ours - theirs).abs().max() < 300 * info.eps * theirs.abs().max() + info.tiny


def test_computes_in_float32_whatever_it_is_given():
    narrow = [t.bfloat16() for t in inputs(20)]
    y, state = selective_scan(*narrow)
    assert y.dtype == state.dtype == torch.float32
    assert y.equal(selective_scan(*(t.float() for t in narrow))[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert y.equal(selective_scan(*narrow)[0])


class Work(TorchDispatchMode):
    """How many numbers all operations give, together."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


def test_work_is_linear_in_length():
    counts = []
    for length in (4 * CHUNK, 8 * CHUNK):
        with Work() as work:
            selective_scan(*inputs(length))
        counts.append(work.numbers)
    assert counts[1] < 2.02 * counts[0]


def test_states_are_not_kept_for_the_backward_pass(monkeypatch):
    """Gradients, inputs and one chunk take the memory of one and a half times all states; all steps at once, of ten."""
    monkeypatch.setattr(scans, "CHUNK", 16)
    leaves = [t.requires_grad_() for t in inputs(640, channels=8, n=16)]
    with Memory() as used:
        sum(t.sum() for t in selective_scan(*leaves)).backward()
    states = 2 * 640 * 8 * 16 * 8
    assert used.peak < 2 * states


@pytest.mark.parametrize("norms", [False, True])
def test_a_path_of_mamba_equals_the_one_in_transformers(norms):
    """Mamba's, and with norms Jamba's, whose states load but for the norms' names."""
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    sizes = {"hidden_size": 6, "num_hidden_layers": 1}
    if norms:
        config = jamba.JambaConfig(**sizes, mamba_d_state=5, mamba_d_conv=3, mamba_expand=2, mamba_dt_rank=2)
        theirs = jamba.JambaMambaMixer(config, 0)
    else:
        config = mamba.MambaConfig(**sizes, state_size=5, conv_kernel=3, expand=2, time_step_rank=2)
        theirs = mamba.MambaMixer(config, 0)
    ours = SelectiveState(12, state_dim=5, conv_size=3, dt_rank=2, norms=norms)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    names = {f"{kind}_layernorm.weight": f"norms.{n}" for n, kind in enumerate(("dt", "b", "c"))}
    state = {names.get(name, name): t for name, t in theirs.state_dict().items()}
    missing, unused = ours.load_state_dict(state, strict=False)
    assert not missing and sorted(n.split(".")[0] for n in unused) == ["in_proj", "out_proj"]
    u = torch.randn(2, 9, 6)
    x, z = theirs.in_proj(u).chunk(2, -1)
    out = theirs.out_proj(ours(x) * torch.nn.functional.silu(z))
    torch.testing.assert_close(out, theirs(u), atol=1e-5, rtol=1e-5)  # both in float32
