"""manyheads.Attention: every mechanism trains in it, and padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import manyheads
from manyheads import Attention, get, names
from manyheads.core import Operand, Projections
from manyheads.nn import OperandSource, rotate

DIM, HEADS, LENGTH = 16, 4, 12


def layer(name: str, **more) -> Attention:
    """The mechanism's first example, in a small layer."""
    by_position = get(name)().projections.scores_from == "positions"
    return Attention(DIM, HEADS, name, **({"max_len": LENGTH} if by_position else {}), **get(name).examples[0], **more)


@pytest.mark.parametrize("name", names())
def test_trains(name):
    """One layer learns to say the token before: the loss halves, and every parameter gets a gradient."""
    vocabulary = 8
    attend = layer(name)
    embed, head = nn.Embedding(vocabulary, DIM), nn.Linear(DIM, vocabulary)
    parameters = [*embed.parameters(), *attend.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    tokens = torch.randint(vocabulary, (16, LENGTH))
    losses = []
    for _ in range(60):
        x = embed(tokens)
        logits = head(x + attend(x))[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for parameter_name, parameter in attend.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", names())
def test_a_padded_row_equals_the_row_alone(name, side):
    attend = layer(name).double()
    with torch.no_grad():  # projections of operands start at zero: move them off it
        for parameter in attend.operands.parameters():
            parameter += torch.randn_like(parameter)
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    lengths = [LENGTH, 7, 1]
    rows = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
    present = torch.zeros(3, LENGTH, dtype=torch.bool)
    for b, row in enumerate(rows):
        present[b, row] = True
    out = attend(x, present=present)
    for b, row in enumerate(rows):
        torch.testing.assert_close(out[b, row], attend(x[b : b + 1, row])[0])
    assert out[~present].eq(0).all()


@pytest.mark.parametrize("name", names())
def test_shares_key_heads(name):
    attend = layer(name, kv_heads=1, head_dim=6)
    assert attend.v.out_features == 6
    assert attend(torch.randn(2, 5, DIM)).shape == (2, 5, DIM)


def test_sparse_query_attention_has_fewer_query_heads():
    attend = Attention(DIM, 8, "sparse_query_attention", head_dim=4)
    assert attend.q.out_features == attend.k.out_features == attend.o.in_features == 4 * 4
    assert Attention(DIM, 8, "sparse_query_attention", query_share=0.25, kv_heads=1, head_dim=4).heads == 2
    assert get("sparse_query_attention")().projections == Projections(query_share=0.5)


def test_positional_attention_attends_alike_for_every_input():
    attend = layer("positional_attention")
    x, y = torch.randn(2, 1, LENGTH, DIM)
    # What is linear in the values, with weights that no input changes, is linear.
    torch.testing.assert_close(attend(x + 2 * y), attend(x) + 2 * attend(y), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"13 tokens, more than max_len {LENGTH}"):
        attend(torch.randn(1, 13, DIM))


def test_multi_token_attention_starts_as_causal_attention():
    plain = Attention(DIM, HEADS)
    attend = Attention(DIM, HEADS, "multi_token_attention")
    attend.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, LENGTH, DIM)
    torch.testing.assert_close(attend(x), plain(x))


@pytest.mark.parametrize("rope_theta", [None, 500.0])
def test_projects_rotates_attends_and_projects(rope_theta):
    attend = Attention(DIM, HEADS, kv_heads=2, rope_theta=rope_theta, bias=True)
    x, at = torch.randn(2, LENGTH, DIM), torch.arange(LENGTH)[None]
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (attend.q, attend.k, attend.v))
    if rope_theta is not None:
        q, k = rotate(q, at, rope_theta), rotate(k, at, rope_theta)
    o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(x), attend.o(o.transpose(1, 2).flatten(2)))


def test_rotary_positions_are_relative():
    """Scores of rotated vectors depend on the distance alone, and a padded row may start anywhere."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        at = torch.tensor([[i]]), torch.tensor([[j]])
        return (rotate(q, at[0], 10000.0) * rotate(k, at[1], 10000.0)).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_a_form_does_what_its_name_does():
    named, x = Attention(DIM, HEADS, "kimi_delta_attention"), torch.randn(2, 5, DIM)
    given = Attention(DIM, HEADS, get("kimi_delta_attention")())
    given.load_state_dict(named.state_dict())
    assert given(x).equal(named(x)) and "a Recurrence, heads=4" in repr(given)


def test_operands_come_in_their_declared_order():
    x = torch.randn(2, 5, DIM)
    sizes = {"heads": 4, "head_dim": 6}
    for dims, shape in {
        "batch heads len head_dim": (2, 4, 5, 6),
        "batch len": (2, 5),
        "batch len heads": (2, 5, 4),
        "batch heads 3 len": (2, 4, 3, 5),
        "heads 3": (4, 3),
    }.items():
        assert OperandSource(Operand(dims), DIM, sizes)(x).shape == shape
    with pytest.raises(ValueError, match="batch in front"):
        Operand("heads len")


BAD = {
    "an unknown mechanism": ({"mechanism": "casual"}, KeyError, "'casual' is no mechanism.*'causal'"),
    "an unknown setting": (
        {"mechanism": "moba", "topk": 2}, TypeError, "'topk' is no setting of moba or argument of Attention.*'top_k'",
    ),
    "a setting of a form": (
        {"mechanism": get("moba")(), "top_k": 2}, TypeError, "'top_k' is no setting of a Selection or argument.*none",
    ),
    "a setting of the wrong type": ({"mechanism": "moba", "top_k": "2"}, TypeError, "top_k of moba must be int.*'2'"),
    "a dim that heads do not divide": ({"heads": 3}, ValueError, "dim 16 is not a multiple of heads 3; give head_dim"),
    "no heads": ({"heads": 0}, ValueError, "heads must be a positive integer, not 0"),
    "kv_heads that do not divide": ({"kv_heads": 3}, ValueError, "kv_heads 3 must divide the 4 query heads"),
    "no kv_heads": ({"kv_heads": 0}, ValueError, "kv_heads must be a positive integer, not 0"),
    "an odd head_dim": ({"head_dim": 5}, ValueError, "even head_dim, not 5; or rope_theta=None"),
    "no max_len": ({"mechanism": "positional_attention"}, ValueError, "positional_attention scores positions.*max_len"),
    "an unknown engine": ({"engine": "eagre"}, ValueError, "'eagre' is no engine.*'eager'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_arguments_are_one_clear_sentence(case):
    given, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        Attention(**{"dim": DIM, "heads": HEADS, **given})


def test_bad_input_is_one_clear_sentence():
    attend = Attention(DIM, HEADS)
    with pytest.raises(ValueError, match=r"x must be a tensor \[batch, len, 16\], not \(5, 16\)"):
        attend(torch.randn(5, DIM))
    with pytest.raises(ValueError, match=r"x must be a tensor \[batch, len, 16\], not \(2, 5, 8\)"):
        attend(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r"present must be a bool tensor \(2, 5\), not torch.int64 \(2, 5\)"):
        attend(torch.randn(2, 5, DIM), present=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"present must be a bool tensor \(2, 5\), not torch.bool \(5,\)"):
        attend(torch.randn(2, 5, DIM), present=torch.ones(5, dtype=torch.bool))


def test_says_what_it_is():
    assert "moba, heads=4, kv_heads=2, head_dim=4" in repr(Attention(DIM, HEADS, "moba", kv_heads=2))
    assert manyheads.Attention is Attention
