"""MoSA: what heads choose and keep, and that choosing is learned."""

import torch

from manyheads.layers.sparse.mosa import MoSA


def test_a_head_reads_and_writes_the_tokens_of_its_choice_alone():
    """Of 32 tokens one in eight; what any other one holds changes nothing, and it gets nothing."""
    module = MoSA(8, 1, sparsity=8, head_dim=4).double()
    x = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)
    at, there = module.choose(module.router(x).sigmoid().mT, torch.arange(32)[None])
    assert at.shape == (1, 1, 4) and there.all(), "keys and values that a head keeps: a row's length by sparsity"
    chosen = torch.zeros(32, dtype=torch.bool).scatter(0, at[0, 0], True)
    y = module(x)[0]
    assert (y.abs().sum(-1) > 0).equal(chosen)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert (grad[0].abs().sum(-1) > 0).equal(chosen)


def test_the_first_token_is_always_in_if_asked():
    x = torch.randn(5, 20, 8)
    for include_first in (False, True):
        module = MoSA(8, 6, sparsity=5, head_dim=4, include_first=include_first)
        at, _ = module.choose(module.router(x).sigmoid().mT, torch.arange(20).expand(5, -1))
        assert (at == 0).any(-1).all() == include_first


def test_a_short_row_takes_by_its_own_length():
    module = MoSA(8, 2, sparsity=4, head_dim=4)
    positions = torch.where(torch.arange(16) < torch.tensor([[16], [8], [5], [1], [0]]), torch.arange(16), -1)
    _, there = module.choose(torch.rand(5, 2, 16), positions)
    assert there.sum(-1)[:, 0].tolist() == [4, 2, 2, 1, 0]


def test_heads_learn_whom_to_choose():
    """A head of 4 tokens in 32 is to move the marked ones and no other; gradients reach the choice through r."""
    module = MoSA(8, 1, sparsity=8, head_dim=8, rotated=0.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)

    def batch():
        x, marked = torch.randn(16, 32, 8), torch.rand(16, 32).topk(4).indices
        x[..., 0] = -1.0
        return x.scatter(1, marked[..., None].expand(-1, -1, 8)[..., :1], 1.0), marked

    def found():
        x, marked = batch()
        at, _ = module.choose(module.router(x).sigmoid().mT, torch.arange(32).expand(16, -1))
        return (at[:, 0, :, None] == marked[:, None]).any(-1).float().mean().item()

    before = found()
    for _ in range(300):
        x, _ = batch()
        wanted = torch.where(x[..., :1] > 0, torch.ones(8), 0.0)
        loss = (module(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found() > 0.9 and before < 0.6
