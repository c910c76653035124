"""MaTVLM: what becomes of a trained layer's weights, and what the new layer is trained on."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.layers.linear.matvlm import MaTVLM, distillation_losses

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 6, "dim": 16}


def weights(dtype=torch.float32):
    """q, k, v and o of a layer of SIZES."""
    shapes = (24, 16), (12, 16), (12, 16), (16, 24)
    return [torch.randn(shape, dtype=dtype) / 4 for shape in shapes]


def test_equals_a_llama_layer_whose_softmax_is_gone():
    """Its four weights, in a layer with time steps of 1 that forgets nothing; the law is the same for `Attention`."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    teacher = llama.LlamaAttention(config, 0)
    made = MaTVLM.from_attention(
        teacher.q_proj.weight, teacher.k_proj.weight, teacher.v_proj.weight, teacher.o_proj.weight, heads=4,
        conv_size=0, gated=False,
    )  # fmt: skip
    assert {name: getattr(made, name) for name in ("heads", "kv_heads", "dim")} == {
        "heads": 4,
        "kv_heads": 2,
        "dim": 16,
    }
    with torch.no_grad():
        made.in_proj.weight[-4:] = 0
        made.dt_bias.fill_(math.log(math.e - 1))
        made.A_log.fill_(-math.inf)
        made.D.zero_()
    x = torch.randn(2, 9, 16)
    q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (teacher.q_proj, teacher.k_proj, teacher.v_proj))
    k, v = (llama.repeat_kv(t, 2) for t in (k, v))
    o = teacher.o_proj(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x), o, atol=1e-5, rtol=1e-5)  # 1e-5 is what is asked of a conversion


@pytest.mark.parametrize("settings", [{}, {"conv_size": 0}, {"gated": False}], ids=str)
def test_weights_are_copied_to_where_they_belong(settings):
    q, k, v, o = weights(torch.bfloat16)
    made = MaTVLM.from_attention(q, k, v, o, heads=4, **settings)
    assert all(p.dtype == torch.bfloat16 for p in made.parameters())
    x = torch.randn(1, 3, 16, dtype=torch.bfloat16)
    _, mixed, _ = made.in_proj(x).split(made.widths, -1)
    value, key, query = mixed.split([12, 12, 24], -1)
    for have, weight in ((value, v), (key, k), (query, q)):
        assert have.equal(F.linear(x, weight))
    assert made.out_proj.weight.equal(o)
    made.out_proj.weight.data.zero_()
    assert o.abs().sum() > 0, "a copy"


def test_the_convolution_starts_as_one_that_copies():
    conv = MaTVLM.from_attention(*weights(), heads=4).conv1d
    x = torch.randn(1, conv.in_channels, 7)
    torch.testing.assert_close(conv(F.pad(x, (3, 0))), x)


def test_refuses_weights_of_other_shapes():
    q, k, v, o = weights()
    for wrong in ((q, k, v[:6], o), (q, k, v, o.T), (q, k[:5], v[:5], o), (q[:, :5], k, v, o)):
        with pytest.raises(ValueError, match="q, k, v and o of 4 heads cannot have the shapes"):
            MaTVLM.from_attention(*wrong, heads=4)


def test_losses_are_those_written_out():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    ours, theirs = ([torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    present = torch.tensor([[True, True, False], [True, True, True]])
    kl, lengths = [], []
    for b, t in present.nonzero().tolist():
        p, s = torch.softmax(teacher[b, t] / 2, 0), torch.softmax(student[b, t] / 2, 0)
        kl.append((p * (p / s).log()).sum() * 4)
        lengths.append(
            sum((one[b, t] - other[b, t]).square().sum().sqrt() for one, other in zip(ours, theirs, strict=True))
        )
    got = distillation_losses(student, teacher, ours, theirs, present=present, temperature=2.0)
    torch.testing.assert_close(got, {"logits": sum(kl) / 5, "layers": sum(lengths) / 5})
    same = distillation_losses(teacher, teacher, theirs, theirs)
    assert same["logits"].abs() < 1e-12 and same["layers"] == 0


def test_distillation_brings_a_layer_to_its_teacher():
    """A layer that has strayed from its teacher, and a readout behind; all of its numbers learn."""
    made = MaTVLM.from_attention(*weights(), heads=4)
    teacher = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    readout, optimizer = torch.randn(16, 7) / 4, torch.optim.Adam(made.parameters(), lr=0.01)
    first, last = None, None
    for _ in range(60):
        x = torch.randn(8, 12, 16)
        with torch.no_grad():
            wanted = teacher(x)
        got = made(x)
        last = distillation_losses(got @ readout, wanted @ readout, [got], [wanted])
        first = first or {name: value.item() for name, value in last.items()}
        optimizer.zero_grad()
        sum(last.values()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
        optimizer.step()
    assert last["logits"] < 0.6 * first["logits"] and last["layers"] < 0.8 * first["layers"]


def test_trains_under_autocast():
    module, x = MaTVLM.from_attention(*weights(), heads=4), torch.randn(2, 21, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert (y - module(x)).abs().max() < 0.1 * module(x).abs().max()  # eight bits, and sums of both signs
