"""Super attention, with optimised and efficient attention: projections that the next ones can absorb are left out.

    optimised:   o_i = softmax(q_i K_i^T / sqrt(d)) X_i,   [o_1 ... o_h] W_O        3 dim^2 weights
    efficient:   o_i = softmax(q_i X_i^T / sqrt(d)) X_i,   [o_1 ... o_h] W_O        2 dim^2
    super:       o_i = softmax(q_i X_i^T / sqrt(d)) (W_A X)_i,   [o_1 ... o_h] W_O  2 dim^2 + length^2

X_i are the d channels of head i. W_A [length, length] mixes tokens, so super attention is made for one length; a
shorter row uses the corner of W_A, as if zeros followed it. In a causal layer W_A is triangular, so that no token meets
a later one.

Hosseini, Hosseini. "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism." 2024.
arXiv:2403.01643.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import Attention, from_front, positions_of, split, to_front

KINDS = ("optimised", "efficient", "super")


def reference(module, x):
    rows = []
    for row in x:
        n, v = len(row), row
        if module.kind == "super":
            a = module.align.weight
            ends = range(1, n + 1) if module.causal else [n] * n
            v = torch.stack([a[i, :end] @ row[:end] for i, end in enumerate(ends)])
        k = row @ module.k.weight.T if module.kind == "optimised" else row
        q, k, v = (cut(z, module.heads) for z in (row @ module.q.weight.T, k, v))
        o = softmax_heads(q, k, v, causal=module.causal)
        rows.append(torch.cat(list(o), -1) @ module.o.weight.T)
    return torch.stack(rows)


def optimised_lacks_values():
    """Optimised attention is multi-head attention with W_V the identity."""
    module, plain = SuperAttention(12, 3, kind="optimised"), Attention(12, 3, "full", rope_theta=None)
    plain.load_state_dict(module.state_dict(), strict=False)
    nn.init.eye_(plain.v.weight)
    return module, plain


def efficient_absorbs_keys():
    """Efficient attention is one-head attention with W_V the identity, W_K multiplied into W_Q."""
    module, plain = SuperAttention(12, kind="efficient"), Attention(12, 1, "full", rope_theta=None)
    plain.o = module.o
    with torch.no_grad():
        nn.init.eye_(plain.v.weight)
        module.q.weight.copy_(plain.k.weight.T @ plain.q.weight)
    return module, plain


def aligned_to_itself():
    """With W_A the identity super attention is efficient attention."""
    module, other = SuperAttention(12, length=13), SuperAttention(12, kind="efficient")
    nn.init.eye_(dict(module.named_parameters())["align.weight"])
    other.q, other.o = module.q, module.o
    return module, other


def weights(dim, heads=1, kind="super", length=0, causal=False):
    return {"optimised": 3 * dim**2, "efficient": 2 * dim**2, "super": 2 * dim**2 + length**2}[kind]


@layer(
    reference=reference,
    arxiv="2403.01643",
    system="super-attention",
    examples=(
        {"dim": 12, "length": 13},
        {"dim": 6, "heads": 2, "length": 15, "causal": True},
        {"dim": 12, "heads": 3, "kind": "optimised"},
        {"dim": 10, "heads": 2, "kind": "efficient", "causal": True},
    ),
    laws=(optimised_lacks_values, efficient_absorbs_keys, aligned_to_itself),
    weights=weights,
    causal=False,
)
class SuperAttention(nn.Module):
    """kind: "super", which needs length, the greatest number of tokens; "efficient"; or "optimised"."""

    def __init__(
        self, dim: int, heads: int = 1, *, kind: str = "super", length: int | None = None, causal: bool = False
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if (kind == "super") != (length is not None):
            raise ValueError(f"length is for super attention, which needs it; kind is {kind!r} and length {length}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads, self.kind, self.causal = dim, heads, kind, causal
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False) if kind == "optimised" else nn.Identity()
        self.align = nn.Linear(length, length, bias=False) if length is not None else None
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k, v = (split(z, self.heads) for z in (self.q(x), self.k(x), self.values(x, positions)))
        form = "causal" if self.causal else "full"
        o = attention(q, k, v, form, q_positions=positions, kv_positions=positions)
        return self.o(o.transpose(1, 2).flatten(2))

    def values(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if self.align is None:
            return x
        weight = self.align.weight.tril() if self.causal else self.align.weight
        return from_front(weight @ to_front(x, positions, len(weight)), positions, x.shape[1])
