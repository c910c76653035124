"""TransNormer: linear attention with a norm in place of its divisor, above layers that attend within blocks of tokens.

    NormAttention:  O = XNorm(phi(Q) (phi(K)^T V)),   XNorm(x) = w x / sqrt(mean(x^2) + 1e-6) over all heads together
    DiagAttention:  o_i = sum_{j in the block of i} a_ij v_j
    T1:  phi = elu,      a_ij = relu(q_i . k_j / sqrt(d)), and XNorm behind
    T2:  phi = 1 + elu,  a_ij = softmax_j(q_i . k_j / sqrt(d))

with j <= i in either if causal, and an output projection behind. The lower half of a model's layers is DiagAttention
(part="diag"), the upper half NormAttention (part="norm"). To divide by phi(q_i) . sum_j phi(k_j), as linear attention
else does, has a gradient that grows without bound as that sum goes to 0; that of the norm is bounded. phi and the norms
of T1 and T2 are those of the released code (OpenNLPLab/fairseq-evo and lra). No positions are encoded, and no state is
kept for decoding yet.

Qin, Han, Sun, Li, Kong, Barnes, Zhong. "The Devil in Linear Transformer." 2022. arXiv:2210.10340.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Form, Recurrence, Scores, one
from manyheads.core.layer import layer
from manyheads.core.plain import cut
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, split


def reference(module, x):
    heads, rows = module.heads, []
    for row in x:
        q, k, v = (cut(row @ p.weight.T, heads) for p in (module.q, module.k, module.v))
        tokens = []
        for i in range(len(row)):
            if module.part == "norm":
                first, last = 0, len(row)
            else:
                first = i // module.block_size * module.block_size
                last = min(first + module.block_size, len(row))
            if module.causal:
                last = i + 1
            out = []
            for h in range(heads):
                if module.part == "norm":
                    elu = [torch.where(t > 0, t, torch.exp(t) - 1) + module.variant - 1 for t in (q[h], k[h])]
                    a = elu[1][first:last] @ elu[0][i]
                else:
                    s = k[h, first:last] @ q[h, i] / q.shape[-1] ** 0.5
                    a = s * (s > 0) if module.variant == 1 else torch.exp(s) / torch.exp(s).sum()
                out.append(a @ v[h, first:last])
            token = torch.cat(out)
            if module.part == "norm" or module.variant == 1:
                token = token / (token.square().mean() + 1e-6).sqrt() * module.norm
            tokens.append(module.o.weight @ token)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def one_block():
    """The softmax of T2 in a block that holds everything is causal attention."""
    module, plain = TransNormer(12, 3, part="diag", variant=2), Attention(12, 3, rope_theta=None)
    for name in "qkvo":
        setattr(plain, name, getattr(module, name))
    return module, plain


@layer(
    reference=reference,
    arxiv="2210.10340",
    system="transnormer",
    examples=(
        {"dim": 12, "heads": 3, "part": "norm", "variant": 1},
        {"dim": 8, "heads": 2, "part": "norm", "variant": 2, "causal": False},
        {"dim": 12, "heads": 3, "part": "diag", "variant": 1, "block_size": 4},
        {"dim": 8, "heads": 2, "part": "diag", "variant": 2, "block_size": 5, "causal": False},
    ),
    laws=(one_block,),
)
class TransNormer(nn.Module):
    """`part` is "norm" or "diag", `variant` 1 or 2; `block_size` tokens see each other in "diag"."""

    def __init__(self, dim: int, heads: int, *, part: str, variant: int = 1, block_size: int = 64, causal: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if part not in ("norm", "diag"):
            raise ValueError(f"part must be 'norm' or 'diag', not {part!r}")
        if variant not in (1, 2):
            raise ValueError(f"variant must be 1 or 2, not {variant!r}")
        self.dim, self.heads, self.part, self.variant = dim, heads, part, variant
        self.block_size, self.causal = block_size, causal
        self.form = norm_attention(variant, causal) if part == "norm" else diag_attention(variant, causal, block_size)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.Parameter(torch.ones(dim)) if part == "norm" or variant == 1 else None

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k, v = (split(p(x), self.heads) for p in (self.q, self.k, self.v))
        o = attention(q, k, v, self.form, q_positions=positions, kv_positions=positions)
        o = o.transpose(1, 2).flatten(2)
        return self.o(o if self.norm is None else F.rms_norm(o, (self.dim,), eps=1e-6) * self.norm)


def norm_attention(variant: int, causal: bool) -> Form:
    feature = F.elu if variant == 1 else lambda t: 1 + F.elu(t)
    return Recurrence(query_feature=feature, key_feature=feature, causal=causal, default_scale=one)


def diag_attention(variant: int, causal: bool, block_size: int) -> Form:
    def mask(b, h, i, j):
        same = i // block_size == j // block_size
        return (j <= i) & same if causal else same

    def rectified(s, b, h, i, j):
        return torch.relu(s)

    return Scores(mask=mask, score=rectified, normaliser="none") if variant == 1 else Scores(mask=mask)
