"""Multi-source attention: a decoder reads several encoders one after the other, side by side, as one, or by choice.

    serial:         x <- x + Att_n(LN_n(x), E_n)   for n = 1 ... N
    parallel:       x + sum_n Att_n(LN(x), E_n)
    flat:           x + Att(LN(x), [E_1; ...; E_N])
    hierarchical:   x + Att(LN(x), c),   c_n = Att_n(LN(x), E_n): each token attends to its own N contexts

with Att(x, E) multi-head softmax attention of x to the tokens of E, each Att with projections of its own.

Libovicky, Helcl, Marecek. "Input Combination Strategies for Multi-Source Transformer Decoder." 2018. arXiv:1811.04716.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split

STRATEGIES = ("serial", "parallel", "flat", "hierarchical")


def reference(module, x, sources=None):
    out = []
    for b, row in enumerate(x):
        encoders = [row] * module.sources if sources is None else [source[b] for source in sources]
        if module.strategy == "serial":
            for norm, att, encoder in zip(module.norms, module.reads, encoders, strict=True):
                row = torch.stack([token + reference_read(att, norm(token), encoder) for token in row])
            out.append(row)
            continue
        tokens = []
        for token in row:
            asked = module.norms[0](token)
            if module.strategy == "flat":
                tokens.append(token + reference_read(module.reads[0], asked, torch.cat(encoders)))
                continue
            read = [reference_read(att, asked, encoder) for att, encoder in zip(module.reads, encoders, strict=False)]
            chosen = sum(read) if module.strategy == "parallel" else reference_read(module.choose, asked, read)
            tokens.append(token + chosen)
        out.append(torch.stack(tokens))
    return torch.stack(out)


def reference_read(att, token, encoder):
    heads = []
    queries = att.q(token).chunk(att.heads)
    for h, q in enumerate(queries):
        s = torch.stack([att.k(e).chunk(att.heads)[h] @ q / len(q) ** 0.5 for e in encoder])
        heads.append(sum(w * att.v(e).chunk(att.heads)[h] for w, e in zip(torch.softmax(s, 0), encoder, strict=True)))
    return att.o(torch.cat(heads))


def one_source(strategy: str):
    def law():
        module, parallel = (
            MultiSourceAttention(8, 2, sources=1, strategy=strategy),
            MultiSourceAttention(8, 2, sources=1),
        )
        parallel.load_state_dict(module.state_dict())
        return module, parallel

    law.__doc__ = f"With a single source {strategy} is parallel."
    law.__name__ = strategy
    return law


@layer(
    reference=reference,
    arxiv="1811.04716",
    system="multi-source-attention",
    examples=tuple({"dim": 8, "heads": 2, "sources": 2, "strategy": strategy} for strategy in STRATEGIES),
    laws=(one_source("serial"), one_source("flat")),
    causal=False,
)
class MultiSourceAttention(nn.Module):
    """Reads `sources` encoders: serial, parallel, flat or hierarchical is its `strategy`."""

    def __init__(self, dim: int, heads: int, *, sources: int = 2, strategy: str = "parallel"):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(unknown("strategy of multi_source_attention", strategy, STRATEGIES))
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.sources, self.strategy = dim, sources, strategy
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(sources if strategy == "serial" else 1))
        self.reads = nn.ModuleList(Read(dim, heads) for _ in range(1 if strategy == "flat" else sources))
        self.choose = Read(dim, heads) if strategy == "hierarchical" else None

    def forward(
        self,
        x: Tensor,
        sources: Sequence[Tensor] | None = None,
        *,
        present: Tensor | None = None,
        sources_present: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """x [batch, len, dim] reads sources [batch, source len, dim]; without any, x is all of them.

        present, sources_present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]. Raises
        ValueError for another number of sources.
        """
        positions_of(x, present, self.dim)
        if sources is None:
            sources, sources_present = [x] * self.sources, [present] * self.sources
        if sources_present is None:
            sources_present = [None] * len(sources)
        if not len(sources) == len(sources_present) == self.sources:
            raise ValueError(f"this layer reads {self.sources} sources, not {len(sources)}, each with its own padding")
        for source, there in zip(sources, sources_present, strict=True):
            positions_of(source, there, self.dim)
        y = self._combined(x, sources, sources_present)
        return y if present is None else y.masked_fill(~present[..., None], 0.0)

    def _combined(self, x: Tensor, sources: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        if self.strategy == "serial":
            for norm, read, source, there in zip(self.norms, self.reads, sources, present, strict=True):
                x = x + read(norm(x), source, there)
            return x
        asked = self.norms[0](x)
        if self.strategy == "flat":
            there = [
                torch.ones_like(s[..., 0], dtype=torch.bool) if p is None else p
                for s, p in zip(sources, present, strict=True)
            ]
            return x + self.reads[0](asked, torch.cat(list(sources), 1), torch.cat(there, 1))
        contexts = torch.stack([r(asked, s, p) for r, s, p in zip(self.reads, sources, present, strict=True)], 2)
        if self.choose is None:
            return x + contexts.sum(2)
        each = contexts.flatten(0, 1)  # every token is a row of its own, and its contexts are the keys
        return x + self.choose(asked.reshape(-1, 1, self.dim), each, None).view_as(x)


class Read(nn.Module):
    """Attention of x to another sequence."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, present: Tensor | None) -> Tensor:
        """x [batch, len, dim], source [batch, source len, dim], present: bool [batch, source len], where a token is."""
        at = None if present is None else torch.arange(x.shape[1], device=x.device)
        o = attention(
            split(self.q(x), self.heads), split(self.k(source), self.heads), split(self.v(source), self.heads), "full",
            q_positions=at, kv_positions=None if present is None else torch.where(present, present.cumsum(1) - 1, -1),
        )  # fmt: skip
        return self.o(o.transpose(1, 2).flatten(2))
