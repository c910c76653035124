"""CHELA: a short and a long convolution find what is near and far, and linear attention chooses among it.

    Z = long(silu(short(X))),   long = conv_1024 + conv_4, two branches that are one kernel
    Q = kappa_q * Z + mu_q,   K = kappa_k * Z + mu_k,   V = silu(X W_v + b_v)
    O_t = Q_t S_t,   S_t = S_{t-1} + K_t^T V_t
    H = (norm(O) * silu(Z W_g + b_g)) W_o + b_o,   U = sigmoid(Z W_u + b_u),   out = X + U * (H - X)

in each head. All convolutions are causal, a kernel for each channel. The branch with few taps is added to the first
taps of the long one, which changes neither outputs nor gradients, as there is nothing between the branches and their
sum; the long one goes through Fourier space.

There is no released code, and of the paper no more than the abstract and summaries were at hand. From those are the
order of the convolutions, the merged branches, what Q, K and V are made of, linear attention in blocks without a
normaliser, and that there are an output gate and a residual. Not known to be the authors': the equations of H and U,
here Mega's gates (arXiv:2209.10655) with a norm, an RMS norm, before them; the numbers of taps; several heads.

Liu, Li, Wang, Wang, Liu, Li. "Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long
Sequences." 2024. arXiv:2406.08128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Recurrence, one
from manyheads.core.convolution import causal_conv
from manyheads.core.layer import layer
from manyheads.core.long_convolution import long_conv
from manyheads.core.plain import convolved, cut, recurrent_heads
from manyheads.core.state_space import normed
from manyheads.dispatch import attention
from manyheads.nn import from_front, positions_of, split, to_front

FORM = Recurrence(default_scale=one)


def reference(module, x):
    def silu(y):
        return y / (1 + (-y).exp())

    rows = []
    for row in x:
        near = silu(convolved(row, module.short))
        z = convolved(near, module.long.flip(-1)) + convolved(near, module.branch.flip(-1))
        q, k = (cut(kappa * z + mu, module.heads) for kappa, mu in zip(module.kappa, module.mu, strict=True))
        v = cut(silu(module.v(row)), module.heads)
        o = torch.cat(list(recurrent_heads(q, k, v, torch.zeros_like(q[..., 0]))), -1)
        o = module.norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        h = module.o(o * silu(module.gate(z)))
        u = 1 / (1 + (-module.update(z)).exp())
        rows.append(u * h + (1 - u) * row)
    return torch.stack(rows)


def one_branch():
    """Two branches are one convolution: the short one's taps may as well be the long one's first."""
    one, other = (Chela(8, 2, short=3, long=5) for _ in range(2))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.long.copy_(one.long + F.pad(one.branch, (0, 2)))
        other.branch.zero_()
    return one, other


@layer(
    reference=reference,
    arxiv="2406.08128",
    system="chela",
    examples=({"dim": 8, "heads": 2, "short": 3, "long": 6}, {"dim": 5, "short": 2, "long": 64}),
    laws=(one_branch,),
    weights=lambda dim, heads=1, short=4, long=1024: dim * (2 * short + long) + 5 * dim + 4 * dim * (dim + 1),
)
class Chela(nn.Module):
    """heads divides dim. short, long: taps of the kernels. Causal."""

    def __init__(self, dim: int, heads: int = 1, *, short: int = 4, long: int = 1024):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if short > long:
            raise ValueError(f"the short kernel has no more taps than the long one, not {short} and {long}")
        self.dim, self.heads = dim, heads
        # As torch starts a convolution. The short one has a token's own tap last, the others have it first.
        self.short, self.branch, self.long = (
            nn.Parameter(torch.empty(dim, taps).uniform_(-(taps**-0.5), taps**-0.5)) for taps in (short, short, long)
        )
        self.kappa, self.mu = nn.Parameter(torch.ones(2, dim)), nn.Parameter(torch.zeros(2, dim))
        self.v, self.gate, self.update, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = nn.RMSNorm(dim)  # its weight alone

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        x = to_front(x, positions, n)  # nothing is read from behind a row's end
        z = long_conv(F.silu(causal_conv(x, self.short)), self.kernel())
        q, k = (split(kappa * z + mu, self.heads) for kappa, mu in zip(self.kappa, self.mu, strict=True))
        v = split(F.silu(self.v(x)), self.heads)
        o = attention(q.to(v.dtype), k.to(v.dtype), v, FORM).transpose(1, 2).flatten(2)
        h = self.o(normed(o, self.norm.weight) * F.silu(self.gate(z)))
        return from_front(torch.lerp(x, h.to(x.dtype), self.update(z).sigmoid().to(x.dtype)), positions, n)

    def kernel(self) -> Tensor:
        """The long convolution's two branches as one kernel [dim, long]."""
        return self.long + F.pad(self.branch, (0, self.long.shape[1] - self.branch.shape[1]))
