"""Minimal attention: one matrix that compares tokens is all that is left of the four projections.

    out = [o_1 ... o_h],   o_i = softmax(X_i A_i X_i^T / sqrt(d)) X_i,   X_i the d channels of head i

A_i is W_Q^i W_K^i^T multiplied out; or symmetric, W_i W_i^T with W_i square ("symmetric") or lower triangular
("triangular", half the weights), and then a token never scores itself below 0. In the paper's smallest models the
perceptron between such layers goes, too; residual and norm stay.

Bermeitinger, Hrycej, Pavone, Kath, Handschuh. "Reducing the Transformer Architecture to a Minimum." 2024.
arXiv:2410.13732.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, split

KINDS = ("free", "symmetric", "triangular")


def reference(module, x):
    rows, d = [], module.dim // module.heads
    for row in x:
        heads = []
        for i, x_i in enumerate(cut(row, module.heads)):
            w = module.weight[i]
            if module.kind == "triangular":
                rows_of_w = [
                    [w[r * (r + 1) // 2 + c] if c <= r else w.new_zeros(()) for c in range(d)] for r in range(d)
                ]
                w = torch.stack([torch.stack(numbers) for numbers in rows_of_w])
            compare = w if module.kind == "free" else w @ w.T
            heads.append(softmax_heads((x_i @ compare)[None], x_i[None], x_i[None], causal=module.causal)[0])
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows)


def multiplied_out():
    """With A = W_Q W_K^T it is one-head attention that has no other projections."""
    module, plain = MinimalAttention(6, 1), Attention(6, 1, "full", rope_theta=None)
    nn.init.eye_(plain.v.weight)
    nn.init.eye_(plain.o.weight)
    with torch.no_grad():
        module.weight.copy_((plain.q.weight.T @ plain.k.weight)[None])
    return module, plain


def symmetric_by_triangle():
    """Whatever a lower triangle compares, the square matrix that holds it compares alike."""
    module, other = MinimalAttention(6, 2, kind="symmetric"), MinimalAttention(6, 2, kind="triangular")
    with torch.no_grad():
        module.weight.copy_(other.square())
    return module, other


def weights(dim, heads, kind="free", causal=False):
    d = dim // heads
    return heads * (d * (d + 1) // 2 if kind == "triangular" else d * d)


@layer(
    reference=reference,
    arxiv="2410.13732",
    system="minimal-transformer",
    examples=(
        {"dim": 6, "heads": 1},
        {"dim": 8, "heads": 2, "kind": "symmetric", "causal": True},
        {"dim": 9, "heads": 3, "kind": "triangular"},
    ),
    laws=(multiplied_out, symmetric_by_triangle),
    weights=weights,
    causal=False,
)
class MinimalAttention(nn.Module):
    """kind: "free", "symmetric" or "triangular". heads divides dim."""

    def __init__(self, dim: int, heads: int, *, kind: str = "free", causal: bool = False):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads, self.kind, self.causal = dim, heads, kind, causal
        d = dim // heads
        shape = (heads, d * (d + 1) // 2) if kind == "triangular" else (heads, d, d)
        self.weight = nn.Parameter(torch.randn(shape) * d**-0.5)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        heads, w = split(x, self.heads), self.square()
        q, k = heads @ w, heads if self.kind == "free" else heads @ w
        form = "causal" if self.causal else "full"
        o = attention(q, k, heads, form, q_positions=positions, kv_positions=positions)
        return o.transpose(1, 2).flatten(2)

    def square(self) -> Tensor:
        """The weights as matrices [heads, d, d]."""
        if self.kind != "triangular":
            return self.weight
        d = self.dim // self.heads
        row, column = torch.tril_indices(d, d, device=self.weight.device)
        flat = self.weight.new_zeros(self.heads, d * d).index_copy(1, row * d + column, self.weight)
        return flat.unflatten(1, (d, d))
