"""BAM's attention: layers that were trained apart are kept whole as experts, and all of them attend, softly mixed.

    out = sum_i g_i Attention_i(x),   g = softmax(x W_g)

Each expert has projections of its own; with `shared_kv` they share those of keys and values, which makes the cache
that of one expert. A model's experts come from copies that went on training on different data (`from_experts`), and
shared projections start as the mean of theirs. BAM's block adds ordinary feed-forward experts beside it, which are not
here.

Zhang, Gritsch, Gnaneshwar, Guo, Cairuz, Venkitesh, Foerster, Blunsom, Ruder, Üstün, Locatelli. "BAM! Just Like That:
Simple and Efficient Parameter Upcycling for Mixture of Experts." 2024. arXiv:2408.08274.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of
from manyheads.nn import Attention


def reference(module, x):
    rows = []
    for row in x:
        outs = [torch.cat(list(heads_of(a, row)), -1) @ a.o.weight.T for a in module.experts]
        tokens = []
        for t, x_t in enumerate(row):
            e = (module.router.weight @ x_t).exp()
            tokens.append(sum(e[i] / e.sum() * out[t] for i, out in enumerate(outs)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def copies_of_the_seed():
    """Experts that are all the seed give what the seed gives, whatever the router says."""
    seed = Attention(12, 3)
    return BAM.from_experts([seed, seed, seed]), seed


def copies_that_share():
    """The same with shared keys and values, whose mean is the seed's."""
    seed = Attention(12, 3, kv_heads=1)
    return BAM.from_experts([seed, seed, seed], shared_kv=True), seed


@layer(
    reference=reference,
    arxiv="2408.08274",
    system="bam-moe-upcycling",
    examples=(
        {"dim": 12, "heads": 3, "experts": 2},
        {"dim": 8, "heads": 4, "experts": 3, "shared_kv": True, "kv_heads": 2, "rope_theta": None},
    ),
    laws=(copies_of_the_seed, copies_that_share),
)
class BAM(nn.Module):
    """`experts` attention layers and a router. Further settings are those of Attention."""

    def __init__(self, dim: int, heads: int, *, experts: int, shared_kv: bool = False, **settings: Any):
        super().__init__()
        self._take([Attention(dim, heads, **settings) for _ in range(experts)], shared_kv)

    @classmethod
    def from_experts(cls, experts: Sequence[Attention], shared_kv: bool = False) -> BAM:
        """Copies of trained layers, of equal settings, under a new router."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take([deepcopy(expert) for expert in experts], shared_kv)
        return made

    def _take(self, experts: Sequence[Attention], shared_kv: bool) -> None:
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(experts[0].dim, len(experts), bias=False)
        if shared_kv:
            with torch.no_grad():
                for p in ("k", "v"):
                    mean = torch.stack([getattr(a, p).weight for a in experts]).mean(0)
                    getattr(experts[0], p).weight.copy_(mean)
            for expert in experts[1:]:
                expert.k, expert.v = experts[0].k, experts[0].v

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        out = torch.stack([expert(x, present=present) for expert in self.experts], -1)
        return (out * self.router(x).softmax(-1)[:, :, None]).sum(-1)
