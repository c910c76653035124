"""Mixture of attentive experts (MAE): an expert is all heads but one, and the input says how much each counts.

    out = h / (h - 1) sum_j (1 - g_j) H_j W_O^j,   g = softmax(W_2 relu(W_1 mean_t x_t))

H_j is the output of head j, and expert j, which counts g_j, lacks it. Even gates give multi-head attention. The paper
trains the gates g (G step, with the mixture above) and all else (F step) in turn; in an F step each row takes one
expert drawn from g, which is the argument `expert`. The mean is over the whole row, so in a causal layer the gates
look ahead. The mean, and relu as the inner function, are our reading: the authors' code was not released.

Peng, Schwartz, Li, Smith. "A Mixture of h - 1 Heads is Better than h Heads." 2020. arXiv:2005.06537.
"""

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of
from manyheads.nn import Attention


def reference(module, x):
    h, rows = module.attention.heads, []
    for row in x:
        pooled = sum(row) / len(row)
        hidden = module.gate[0].weight @ pooled + module.gate[0].bias
        g = torch.softmax(module.gate[2].weight @ hidden.clamp(min=0) + module.gate[2].bias, 0)
        parts = zip(heads_of(module.attention, row), module.attention.o.weight.chunk(h, 1), strict=True)
        projected = [head @ o.T for head, o in parts]
        experts = [h / (h - 1) * sum(projected[j] for j in range(h) if j != i) for i in range(h)]
        rows.append(sum(g_i * expert for g_i, expert in zip(g, experts, strict=True)))
    return torch.stack(rows)


def even_gates():
    """With even gates it is multi-head attention."""
    module = MixtureOfAttentiveExperts(12, 3, hidden=5)
    for p in module.gate[2].parameters():
        nn.init.zeros_(p)
    return module, module.attention


@layer(
    reference=reference,
    arxiv="2005.06537",
    system="mae-mixture-of-attentive-experts",
    examples=({"dim": 12, "heads": 3, "hidden": 5}, {"dim": 8, "heads": 2, "hidden": 6, "kv_heads": 1}),
    laws=(even_gates,),
    sees_future="the gates of a row come from the mean of all its tokens",
)
class MixtureOfAttentiveExperts(nn.Module):
    """hidden: width of the gates' perceptron, whose parameters are `gate`. Further settings are those of Attention."""

    def __init__(self, dim: int, heads: int, *, hidden: int = 256, mechanism: str = "causal", **settings: Any):
        super().__init__()
        self.attention = Attention(dim, heads, mechanism, **settings)
        if self.attention.heads < 2:
            raise ValueError("an expert is all heads but one, so there must be at least 2 heads")
        self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, self.attention.heads))

    def forward(self, x: Tensor, *, present: Tensor | None = None, expert: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim].

        expert: int64 [batch], the one expert that each row takes instead of the mixture.
        """
        heads = self.attention.attend(x, present=present)
        h = heads.shape[1]
        g = self.gates(x, present=present) if expert is None else nn.functional.one_hot(expert, h).to(x.dtype)
        loud = h / (h - 1) * (1 - g)
        return self.attention.o((loud[:, :, None, None] * heads).transpose(1, 2).flatten(2))

    def gates(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """How much each expert counts, [batch, heads]."""
        if present is None:
            return self.gate(x.mean(1)).softmax(-1)
        total = x.masked_fill(~present[..., None], 0.0).sum(1)
        return self.gate(total / present.sum(1, keepdim=True).clamp(min=1)).softmax(-1)
