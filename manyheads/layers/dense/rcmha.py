"""RCMHA: queries, keys and values are convolved over neighbouring tokens, and scores know how far apart tokens are.

    q = conv(W_q x),   k = conv(W_k x),   v = conv(W_v x + b_v),   conv(y)_i = sum_{c < C} w_c y_{i-c} + b
    s_ij = ((q_i + u) . k_j + q_i . R_{i-j} + r_{i-j}) / sqrt(d),   o_i = W_o sum_{j <= i} softmax_j(s_ij) v_j + b_o

with one convolution weight a channel, the same for all heads, and R, r, u learned for each head: R_n stands for the
distance n, where Transformer-XL has a projected sinusoid, and r_n for its query-free part. The convolution of keys has
no b here: it would be the same for all keys of a query.

Hermansyah, Darmawan, Wibowo. "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling." 2023.
arXiv:2308.03429. The initial zeros of R, r and u are those of the released code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.nn import Attention, from_front, positions_of, split, to_front


def reference(module, x):
    heads, rows = module.heads, []
    for row in x:
        qkv = []
        for project, conv in ((module.q, module.q_conv), (module.k, module.k_conv), (module.v, module.v_conv)):
            y = torch.stack([project(token) for token in row]).unflatten(-1, (heads, -1))
            bias = 0 if conv.bias is None else conv.bias
            size = conv.weight.shape[-1]
            taps = conv.weight[:, 0].flip(-1)  # of a channel: the token's own, the one before's, ...
            qkv.append([sum(taps[:, c] * y[i - c] for c in range(min(size, i + 1))) + bias for i in range(len(row))])
        out = []
        for i in range(len(row)):
            q, here = qkv[0][i], []
            for h in range(heads):
                s = [
                    ((q[h] + module.u[h]) @ qkv[1][j][h] + q[h] @ module.R[h, i - j] + module.r[h, i - j])
                    / q.shape[-1] ** 0.5
                    for j in range(i + 1)
                ]
                w = torch.softmax(torch.stack(s), 0)
                here.append(sum(w[j] * qkv[2][j][h] for j in range(i + 1)))
            out.append(module.o(torch.cat(here)))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def identity_convolution():
    """With no word on distance and convolutions that copy it is causal attention."""
    module, plain = RCMHA(12, 3), Attention(12, 3, rope_theta=None)
    for conv in (module.q_conv, module.k_conv, module.v_conv):
        nn.init.zeros_(conv.weight)
        nn.init.ones_(conv.weight[..., -1])
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    for ours, theirs in ((module.q, plain.q), (module.k, plain.k), (module.v, plain.v), (module.o, plain.o)):
        ours.weight = theirs.weight
        if ours.bias is not None:
            nn.init.zeros_(ours.bias)
    return module, plain


@layer(
    reference=reference,
    arxiv="2308.03429",
    system="rcmha",
    examples=(
        {"dim": 12, "heads": 3, "max_len": 16},
        {"dim": 8, "heads": 2, "kernel_size": 2, "max_len": 13},
    ),
    laws=(identity_convolution,),
)
class RCMHA(nn.Module):
    """Convolutions over `kernel_size` tokens, and distances below `max_len`."""

    def __init__(self, dim: int, heads: int, *, kernel_size: int = 3, max_len: int = 4096):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        head_dim = dim // heads
        self.dim, self.heads, self.max_len = dim, heads, max_len
        self.q, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_conv, self.v_conv = (nn.Conv1d(head_dim, head_dim, kernel_size, groups=head_dim) for _ in range(2))
        self.k_conv = nn.Conv1d(head_dim, head_dim, kernel_size, groups=head_dim, bias=False)
        self.R = nn.Parameter(torch.zeros(heads, max_len, head_dim))
        self.r = nn.Parameter(torch.zeros(heads, max_len))
        self.u = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        if n > self.max_len:
            raise ValueError(f"x has {n} tokens, more than max_len {self.max_len}")
        tokens = to_front(x, positions, n)  # nobody sees padding then: it comes last
        q = self._convolved(self.q_conv, self.q(tokens))
        k = self._convolved(self.k_conv, self.k(tokens))
        v = self._convolved(self.v_conv, self.v(tokens))
        at = torch.arange(n, device=x.device)
        apart = at[:, None] - at
        by_distance = q @ self.R[:, :n].mT + self.r[:, None, :n]
        s = (q + self.u[:, None]) @ k.mT + by_distance.gather(-1, apart.clamp(min=0).expand_as(by_distance))
        w = (s * q.shape[-1] ** -0.5).masked_fill(apart < 0, -torch.inf).softmax(-1)
        return from_front(self.o((w @ v).transpose(1, 2).flatten(2)), positions, n)

    def _convolved(self, conv: nn.Conv1d, y: Tensor) -> Tensor:
        """y [batch, len, dim] as [batch, heads, len, head_dim], every channel convolved with the tokens before."""
        y = split(y, self.heads)
        past = F.pad(y.flatten(0, 1).mT, (conv.kernel_size[0] - 1, 0))
        return conv(past).mT.unflatten(0, y.shape[:2])
