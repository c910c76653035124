"""FlexAttention within its limits: no backward on a CPU, no lse there, never past torch's limit of recompilations."""

import pytest
import torch

import manyheads
from manyheads.engines import flex

LENGTH = 200  # no multiple of the tiles


@pytest.fixture(scope="module")
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, LENGTH, 32) for heads in (4, 2, 2))


@pytest.fixture
def tight_limit():
    """A second compilation of one function would be an error."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield


def both(qkv, name, **settings):
    return tuple(manyheads.attention(*qkv, name, engine=engine, **settings) for engine in ("flex", "eager"))


def test_equals_eager_and_a_new_window_compiles_nothing(qkv, tight_limit):
    seen = len(flex._COMPILED)
    for settings in ({"window": 32, "cap": 30.0}, {"window": 90, "cap": 20.0}, {"window": 7, "cap": 5.0}):
        # float32 on both sides, summed in another order: a few units in the last place.
        torch.testing.assert_close(*both(qkv, "gemma2", layer=0, **settings), atol=2e-6, rtol=1e-5)
    assert len(flex._COMPILED) == seen + 1


def test_every_structure_has_a_limit_of_its_own(qkv, tight_limit):
    for name, settings in (("causal", {}), ("sliding_window", {"window": 40, "sinks": 2}), ("full", {})):
        torch.testing.assert_close(*both(qkv, name, **settings), atol=2e-6, rtol=1e-5)


def test_padded_and_empty_rows(qkv):
    q, k, v = qkv
    at = (torch.arange(LENGTH).expand(2, -1) - torch.tensor([[0], [60]])).clamp(min=-1)
    ours, eager = both((q, k, v), "causal", q_positions=at, kv_positions=at)
    torch.testing.assert_close(ours, eager, atol=2e-6, rtol=1e-5)
    assert ours[1, :, :60].eq(0).all()


def test_says_what_it_cannot_do(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="no backward on a CPU"):
        manyheads.attention(q.clone().requires_grad_(), k, v, "causal", engine="flex")
    with pytest.raises(ValueError, match="lse"):
        manyheads.attention(q, k, v, "causal", engine="flex", return_lse=True)
    with pytest.raises(ValueError, match="no Selection"):
        manyheads.attention(q, k, v, "moba", engine="flex")
    with pytest.raises(ValueError, match="float64"):
        manyheads.attention(q.double(), k.double(), v.double(), "causal", engine="flex")
    assert "by name" in manyheads.explain(q, k, v, "gemma2").objections["flex"]
