"""Dual attention: some heads gather what tokens are, the others how they relate and which token it is.

    a_ij = softmax_j(q_i . k_j / sqrt(d)) of each head
    sensory head h:      o_i = sum_j a_ij W_v^h x_j
    relational head h:   o_i = sum_j a_ij (W_r^h r_ij + W_s^h s_j),   r_ij^l = (P_l x_i) . (Q_l x_j) / sqrt(d_r)
    y_i = W_o [o_i of all heads],   s_j = [softmax(W_b x_j F_b^T / sqrt(d_b)) S_b]_b  or  s_j = S_j

with L relations l of width d_r that all relational heads share, Q_l = P_l if they are symmetric, and symbols s that
tell tokens apart without their content: retrieved from a library S by templates F in blocks b ("library"), or one for
each position ("position"). As a relation is linear in what it is about, sum_j a_ij r_ij^l is the product of P_l x_i and
sum_j a_ij Q_l x_j: Q_l x_j is just one more value, and no relation of two tokens is ever stored.

Altabaa, Lafferty. "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures."
2024. arXiv:2405.16727. The released code also has symbols by distance, and an output projection for each kind of head.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.core.plain import cut, softmax_heads, turned
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, rotate, split

SYMBOLS = ("library", "position")


def reference(module, x):
    rows = []
    for row in x:
        q, k = (turned(cut(row @ p.weight.T, module.heads), module.rope_theta) for p in (module.q, module.k))
        symbols = reference_symbols(module.symbols, row)
        left = cut(row @ module.left.weight.T, module.relations)
        right = cut(row @ (module.left if module.right is None else module.right).weight.T, module.relations)
        r = torch.stack([a @ b.T / a.shape[-1] ** 0.5 for a, b in zip(left, right, strict=True)], -1)
        values = cut(row @ module.v.weight.T, module.sensory)
        named = cut(symbols @ module.s.weight.T, module.relational)
        out = [softmax_heads(q[: module.sensory], k[: module.sensory], values, causal=module.causal)]
        for h in range(module.relational):
            at, tokens = module.sensory + h, []
            for i in range(len(row)):
                seen = slice(0, i + 1 if module.causal else None)
                w = torch.softmax(k[at, seen] @ q[at, i] / q.shape[-1] ** 0.5, 0)
                tokens.append(w @ (r[i, seen] @ module.mix[h] + named[h, seen]))
            out.append(torch.stack(tokens)[None])
        rows.append(torch.cat(out).transpose(0, 1).flatten(1) @ module.o.weight.T)
    return torch.stack(rows)


def reference_symbols(module, row):
    if isinstance(module, Positions):
        return module.library[: len(row)]
    blocks = [cut(t, module.heads) for t in (module.ask(row), module.templates, module.library)]
    return torch.cat([torch.softmax(a @ f.T / a.shape[-1] ** 0.5, -1) @ s for a, f, s in zip(*blocks, strict=True)], -1)


class Library(nn.Module):
    """A symbol for each token, retrieved by what it is like."""

    def __init__(self, dim: int, heads: int, symbols: int):
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(dim, dim)
        self.templates = nn.Parameter(torch.randn(symbols, dim))
        self.library = nn.Parameter(torch.randn(symbols, dim))

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x [batch, len, dim]. Returns [batch, len, dim]."""
        templates, library = (split(t.expand(len(x), -1, -1), self.heads) for t in (self.templates, self.library))
        return attention(split(self.ask(x), self.heads), templates, library, "full").transpose(1, 2).flatten(2)


class Positions(nn.Module):
    """A symbol for each position."""

    def __init__(self, dim: int, symbols: int):
        super().__init__()
        self.library = nn.Parameter(torch.randn(symbols, dim))

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x [batch, len, dim]. Returns [batch | 1, len, dim]."""
        longest = x.shape[1] if positions is None else int(positions.max()) + 1
        if longest > len(self.library):
            raise ValueError(f"x has {longest} tokens, more than the {len(self.library)} symbols for positions")
        at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions.clamp(min=0)
        return self.library[at]


def no_relations():
    """Without relations, and with tokens as their own symbols, it is causal attention."""
    module, plain = DualAttention(12, 3, relational=2), Attention(12, 3)
    nn.init.zeros_(module.mix)
    module.symbols.forward = lambda x, positions: x
    module.q, module.k, module.o = plain.q, plain.k, plain.o
    module.v.weight, module.s.weight = (nn.Parameter(w) for w in plain.v.weight.detach().split([4, 8]))
    return module, plain


@layer(
    reference=reference,
    arxiv="2405.16727",
    system="dual-attention-transformer",
    examples=(
        {"dim": 12, "heads": 3, "relational": 2, "library": 5},
        {"dim": 16, "heads": 4, "relational": 2, "relations": 4, "symmetric": True, "symbols": "position"},
        {"dim": 12, "heads": 3, "relational": 1, "library": 5, "symbol_heads": 1, "causal": False, "rope_theta": None},
    ),
    laws=(no_relations,),
)
class DualAttention(nn.Module):
    """Of `heads` the last `relational` ones gather `relations` (None: as many as there are of them) and symbols.

    symbols: "library", retrieved in `symbol_heads` blocks (None: heads), or "position". library: how many there are.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        relational: int,
        relations: int | None = None,
        symmetric: bool = False,
        symbols: str = "library",
        library: int = 64,
        symbol_heads: int | None = None,
        causal: bool = True,
        rope_theta: float | None = 10000.0,
    ):
        super().__init__()
        relations, symbol_heads = relations or relational, symbol_heads or heads
        if not relational < heads:
            raise ValueError(f"relational={relational} must leave one of heads={heads} to the senses")
        if dim % heads or dim % symbol_heads or dim // heads * relational % relations:
            raise ValueError(
                f"dim {dim} has no equal parts for {heads} heads, {symbol_heads} symbol heads, {relations} relations"
            )
        if symbols not in SYMBOLS:
            raise ValueError(unknown("kind of symbols", symbols, SYMBOLS))
        head_dim = dim // heads
        self.dim, self.heads, self.relational, self.relations = dim, heads, relational, relations
        self.sensory, self.causal, self.rope_theta = heads - relational, causal, rope_theta
        self.q, self.k, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.v = nn.Linear(dim, self.sensory * head_dim, bias=False)
        self.s = nn.Linear(dim, relational * head_dim, bias=False)
        self.left = nn.Linear(dim, relational * head_dim, bias=False)
        self.right = None if symmetric else nn.Linear(dim, relational * head_dim, bias=False)
        self.mix = nn.Parameter(torch.randn(relational, relations, head_dim) * relations**-0.5)
        self.symbols = Library(dim, symbol_heads, library) if symbols == "library" else Positions(dim, library)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k = split(self.q(x), self.heads), split(self.k(x), self.heads)
        if self.rope_theta is not None:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
        sensory = self._attend(q[:, : self.sensory], k[:, : self.sensory], split(self.v(x), self.sensory), positions)

        left = self.left(x).unflatten(-1, (self.relations, -1))
        right = self.left(x) if self.right is None else self.right(x)
        named = split(self.s(self.symbols(x, positions)).expand(len(x), -1, -1), self.relational)
        shared = right[:, None].expand(-1, self.relational, -1, -1)
        read = self._attend(q[:, self.sensory :], k[:, self.sensory :], torch.cat([shared, named], -1), positions)
        about, named = read.split([shared.shape[-1], named.shape[-1]], -1)
        related = (left[:, None] * about.unflatten(-1, left.shape[2:])).sum(-1) * left.shape[-1] ** -0.5
        relational = related @ self.mix + named
        return self.o(torch.cat([sensory, relational], 1).transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
        name = "causal" if self.causal else "full"
        return attention(q, k, v, name, q_positions=positions, kv_positions=positions)
