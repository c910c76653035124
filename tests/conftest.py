"""What every test starts from: one thread, one seed, and inputs made from what a form declares."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from manyheads.core import Form

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_inputs():
    return _make_inputs


def _make_inputs(
    form: Form,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 6,
    v_head_dim: int = 5,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> SimpleNamespace:
    """q, k, v and the form's operands: normal numbers, passed through each operand's activation.

    leaves: all of them in a list; tensors: (q, k, v).
    """
    kv_len, kv_heads = kv_len or q_len, kv_heads or heads
    sizes = {
        "batch": batch, "heads": heads, "kv_heads": kv_heads, "len": kv_len,
        "head_dim": head_dim, "v_head_dim": v_head_dim,
    }  # fmt: skip

    def leaf(*shape: int, activation=lambda x: x) -> torch.Tensor:
        return activation(torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_(grad)

    q = leaf(batch, heads, q_len, head_dim)
    k, v = leaf(batch, kv_heads, kv_len, head_dim), leaf(batch, kv_heads, kv_len, v_head_dim)
    operands = {name: leaf(*o.shape(sizes), activation=o.activation) for name, o in form.operands.items()}
    return SimpleNamespace(q=q, k=k, v=v, operands=operands, tensors=(q, k, v), leaves=[q, k, v, *operands.values()])
