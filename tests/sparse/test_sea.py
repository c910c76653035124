"""SEA: how many keys are read, which, and that losses teach where to look."""

import pytest
import torch

from manyheads.layers.sparse.sea import SEA


def seen(module, scores):
    """bool [batch, heads, len, len]: the keys that are read."""
    n = scores.shape[2]
    i = torch.arange(n)[:, None]
    read = module.choose(scores).gather(-1, module.column(i, n).expand(*scores.shape[:2], -1, -1))
    return read & (torch.arange(n) <= i)


def test_heads_share_top_k_keys_each_on_average():
    module = SEA(16, 4, max_len=256, top_k=8, width=32)
    read = seen(module, torch.randn(2, 4, 256, 32)).sum(-1)
    assert read[:, :, :8].equal((torch.arange(8) + 1).expand(2, 4, 8)), "all that there are"
    assert read[:, :, 64:].float().mean().item() == pytest.approx(8, rel=0.1)
    assert read.float().std(1).max() > 1, "one head takes more than another"
    loud = torch.zeros(1, 4, 256, 32)
    loud[:, 2, :, 0] = 100.0
    assert seen(module, loud)[0, 2, 255, :8].all()


def test_columns_are_stretched_over_the_keys_so_far():
    module = SEA(8, 2, max_len=64, width=4)
    columns = module.column(torch.tensor([[0], [2], [7], [15]]), 16)
    assert columns[2, :8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and columns[3].bincount().tolist() == [4, 4, 4, 4]
    assert columns[0, 0] == 1 and columns[1, :3].tolist() == [0, 1, 3]


def test_losses_teach_where_to_look():
    """Queries look for tokens of their own kind, which places tell. Of up to 64 keys 8 are read, a column at a time."""
    module = SEA(16, 2, max_len=64, top_k=8, width=16)
    with torch.no_grad():
        module.q.weight.copy_(3 * torch.eye(16))
        module.k.weight.copy_(3 * torch.eye(16))
    optimizer = torch.optim.Adam([p for name, p in module.named_parameters() if name[:2] not in ("q.", "k.")], lr=0.02)

    def text():
        kinds = torch.arange(64) // 4 % 8
        return 1.5 * torch.eye(8).repeat(1, 2)[kinds] + 0.1 * torch.randn(4, 64, 16)

    def recall():
        x = text()
        q, k, _, _, scores = module._estimate(x)
        later = torch.ones(64, 64, dtype=torch.bool).triu(1)
        truth = (q @ k.mT * 8**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        return (truth * seen(module, scores)).sum(-1)[:, :, 32:].mean().item()

    before = recall()
    for _ in range(150):
        loss = sum(module.losses(text()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert recall() > 0.55 > 0.25 > before


def test_longer_rows_are_refused():
    module = SEA(8, 2, max_len=5, width=8)
    with pytest.raises(ValueError, match="x has 6 tokens, more than max_len 5"):
        module(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="width=6 is no multiple of 4"):
        SEA(8, 2, max_len=5, width=6)
