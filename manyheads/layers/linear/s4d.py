"""S4D: each channel is convolved with a sum of damped waves, the response of a diagonal state space.

    K_l = 2 Re sum_{n < N/2} C_n (exp(dt A_n) - 1) / A_n exp(l dt A_n),   y = K * x + D x,   out = glu(W gelu(y) + b)

or, step by step, h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t and y_t = 2 Re(C . h_t) + D x_t: N numbers of state
for each channel, N / 2 complex ones that stand for pairs of conjugates; A_n = -exp(a_n) + i w_n, and B = 1. The row is
convolved through Fourier space. What is learned starts with dt from 0.001 to 0.1, uniform in its logarithm, and with

    "legs"  A_n = -1/2 + i w_n, the eigenvalues of the normal part of HiPPO-LegS
    "inv"   A_n = -1/2 + i N/pi (N / (2n + 1) - 1)
    "lin"   A_n = -1/2 + i pi n
    "real"  A_n = -(n + 1), without waves: what the paper's starts are held against

The paper also has other discretisations, a trained B, and layers that look both ways; this one is causal. Norm and
residual around it are the block's.

Gu, Gupta, Goel, Re. "On the Parameterization and Initialization of Diagonal State Space Models." 2022.
arXiv:2206.11893. With the mixing of channels of the authors' code (state-spaces/s4).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.long_convolution import exponentials, long_conv
from manyheads.core.names import unknown
from manyheads.nn import from_front, positions_of, to_front


def reference(module, x):
    a = torch.complex(-module.log_decay.exp(), module.frequency)
    c = torch.complex(*module.C.unbind(-1))
    kept = (module.log_dt.exp()[:, None] * a).exp()
    write = (kept - 1) / a
    rows = []
    for row in x:
        h, out = torch.zeros_like(a), []
        for x_t in row:
            h = kept * h + write * x_t[:, None]
            y = 2 * (c * h).real.sum(-1) + module.D * x_t
            wide = module.mix.weight @ (y * (1 + torch.erf(y / 2**0.5)) / 2) + module.mix.bias
            out.append(wide[: module.dim] * torch.sigmoid(wide[module.dim :]))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def legs(n: Tensor) -> tuple[Tensor, Tensor]:
    """With HiPPO-LegS, A_nk = -sqrt(2n + 1) sqrt(2k + 1) below the diagonal and -(n + 1) on it, A + P P^T with P_n =
    sqrt(n + 1/2) is -1/2 and a skew-symmetric matrix. That one has the eigenvalues +-iw."""
    places = torch.arange(2 * len(n), dtype=torch.float64) + 0.5
    skew = -torch.outer(places, places).sqrt()
    skew = skew.tril(-1) - skew.tril(-1).mT
    frequencies = torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))
    return torch.full_like(n, 0.5), frequencies[len(n) :].to(n)


STARTS = {
    "legs": legs,
    "inv": lambda n: (torch.full_like(n, 0.5), 2 * len(n) / math.pi * (2 * len(n) / (2 * n + 1) - 1)),
    "lin": lambda n: (torch.full_like(n, 0.5), math.pi * n),
    "real": lambda n: (n + 1, torch.zeros_like(n)),
}


@layer(
    reference=reference,
    arxiv="2206.11893",
    system="s4d",
    examples=(
        {"dim": 4, "state_dim": 6},
        {"dim": 3, "state_dim": 8, "start": "legs", "dt_min": 0.1, "dt_max": 1.0},
        {"dim": 5, "state_dim": 4, "start": "inv"},
        {"dim": 3, "state_dim": 4, "start": "real"},
    ),
    weights=lambda dim, state_dim=64, **_: dim * (2 * state_dim + 2) + 2 * dim * (dim + 1),
)
class S4D(nn.Module):
    """`state_dim` is even. start: "legs", "inv", "lin" or "real"."""

    def __init__(
        self, dim: int, *, state_dim: int = 64, start: str = "lin", dt_min: float = 0.001, dt_max: float = 0.1
    ):
        super().__init__()
        if start not in STARTS:
            raise ValueError(unknown("start", start, tuple(STARTS)))
        if state_dim % 2:
            raise ValueError(f"state_dim counts numbers in pairs of conjugates and is even, not {state_dim}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"time steps go from above 0 to dt_max, not from {dt_min} to {dt_max}")
        self.dim = dim
        decay, frequency = STARTS[start](torch.arange(state_dim // 2, dtype=torch.get_default_dtype()))
        self.log_dt = nn.Parameter(torch.rand(dim) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.log_decay = nn.Parameter(decay.log().repeat(dim, 1))
        self.frequency = nn.Parameter(frequency.repeat(dim, 1))
        self.C = nn.Parameter(torch.randn(dim, state_dim // 2, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(dim))
        self.mix = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        x = to_front(x, positions, n)
        y = long_conv(x, self.kernel(n)) + self.D * x
        return from_front(F.glu(self.mix(F.gelu(y)), -1), positions, n)

    def kernel(self, length: int) -> Tensor:
        """K [dim, length], in float32 or wider."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        log_dt, log_decay, frequency, c = (t.to(wide) for t in (self.log_dt, self.log_decay, self.frequency, self.C))
        a = torch.complex(-log_decay.exp(), frequency)
        step = log_dt.exp()[:, None] * a
        return 2 * exponentials(torch.view_as_complex(c) * torch.expm1(step) / a, step, length).real
