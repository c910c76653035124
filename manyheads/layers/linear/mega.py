"""Mega: a damped moving average remembers what was long ago, and one head of attention with gates looks back from it.

    X' = silu(y),   y_t = sum_n eta_n h_tn / sqrt(n) + omega x_t,   h_t = alpha beta x_t + (1 - alpha delta) h_{t-1}
    Z = silu(X' W_z + b_z),   Q = kappa_q Z + mu_q,   K = kappa_k Z + mu_k,   V = silu(X W_v + b_v)
    O = f(Q K^T / tau + B) V,   B_ij = u^T R_{j-i} w,   R a rotation
    R = silu(X' W_r + b_r),   U = sigmoid(X' W_u + b_u)
    H = silu(X' W_h + (R * O) U_h + b_h),   out = X + U * (H - X)

with h_t of n numbers for each channel, 0 < alpha, delta < 1. f is a softmax with tau = sqrt(width of Z), or "laplace",
0.5 (1 + erf((s - sqrt(1/2)) / (sigma sqrt(2)))) with sigma = sqrt(1 / (4 pi)) and tau the number of keys a query sees.
With `chunk`, attention stays within runs of that many tokens, and the average alone passes from one run to the next.
If the layer is not causal, a second average comes from the end of the row, without a token's own x.

The average is a convolution with sum_n eta_n alpha_n beta_n (1 - alpha_n delta_n)^l / sqrt(n), through Fourier space.
The bias B, the paper's rotary one, is put into further channels of queries and keys. The released code has another, a
number for each distance, besides; norms are the block's.

Ma, Zhou, Kong, He, Gui, Neubig, May, Zettlemoyer. "Mega: Moving Average Equipped Gated Attention." 2022.
arXiv:2209.10655. Details and the start as in the released code (facebookresearch/mega).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Scores, one
from manyheads.core.layer import layer
from manyheads.core.long_convolution import exponentials, long_conv
from manyheads.core.names import unknown
from manyheads.core.plain import turned
from manyheads.dispatch import attention
from manyheads.nn import from_front, positions_of, rotate, to_front

KINDS = ("softmax", "laplace")


def laplace(s):
    """Where it is 1/2, at sqrt(1/2), it has the value and the slope of relu(s)^2."""
    return 0.5 * (1 + torch.erf((s - 0.5**0.5) * (2 * torch.pi) ** 0.5))


@lru_cache(64)
def form_of(kind: str, chunk: int | None, causal: bool) -> Scores:
    def mask(b, h, i, j):
        if chunk is None:
            return j <= i
        together = i // chunk == j // chunk
        return together & (j <= i) if causal else together

    seen = mask if causal or chunk is not None else None
    if kind == "softmax":
        return Scores(mask=seen, default_scale=one)
    return Scores(mask=seen, score=lambda s, b, h, i, j: laplace(s), normaliser="none", default_scale=one)


def reference(module, x):
    rows = []
    for row in x:
        averaged = _steps(module.average, row) + module.omega * row
        if not module.causal:
            averaged = averaged + _steps(module.average_back, row.flip(0), with_own=False).flip(0)
        averaged = averaged * torch.sigmoid(averaged)
        z, r, h, u = module.from_average(averaged).split(module.sizes, -1)
        z, r, v = (t * torch.sigmoid(t) for t in (z, r, module.v(row)))
        q, k = (kappa * z + mu for kappa, mu in zip(module.kappa, module.mu, strict=True))
        at_q, at_k = turned(module.bias[:, None].expand(-1, len(row), -1), 10000.0)
        out = []
        for i in range(len(row)):
            first = 0 if module.chunk is None else i // module.chunk * module.chunk
            last = i + 1 if module.causal else len(row) if module.chunk is None else first + module.chunk
            seen = range(first, min(last, len(row)))
            tau = z.shape[1] ** 0.5 if module.kind == "softmax" else len(seen)
            s = torch.stack([q[i] @ k[j] / tau + at_q[i] @ at_k[j] for j in seen])
            sigma = (1 / (4 * torch.pi)) ** 0.5
            w = s.softmax(0) if module.kind == "softmax" else (1 + torch.erf((s - 0.5**0.5) / (sigma * 2**0.5))) / 2
            out.append(w @ v[first : first + len(seen)])
        h = h + (r * torch.stack(out)) @ module.h.weight.T
        u = torch.sigmoid(u)
        rows.append(u * h * torch.sigmoid(h) + (1 - u) * row)
    return torch.stack(rows)


def _steps(average, row, with_own=True):
    alpha, delta = average.alpha.sigmoid(), average.delta.sigmoid()
    h, out = torch.zeros_like(alpha), []
    for x_t in row:
        faded = (1 - alpha * delta) * h
        h = faded + alpha * average.beta * x_t[:, None]
        out.append((average.eta * (h if with_own else faded)).sum(-1) / h.shape[1] ** 0.5)
    return torch.stack(out)


class MovingAverage(nn.Module):
    """alpha, delta (before a sigmoid), beta and eta [dim, n]."""

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.alpha, self.delta = (nn.Parameter(torch.randn(dim, n) * 0.2) for _ in range(2))
        sign = 1 - 2 * (torch.arange(n) % 2)  # the released code finds alternating signs more stable
        self.beta = nn.Parameter(sign + torch.randn(dim, n) * 0.02)
        self.eta = nn.Parameter(torch.randn(dim, n))

    def kernel(self, length: int) -> Tensor:
        """[dim, length], in float32 or wider."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        alpha, delta, beta, eta = (t.to(wide) for t in (self.alpha, self.delta, self.beta, self.eta))
        alpha, delta = alpha.sigmoid(), delta.sigmoid()
        gone = (alpha * delta).clamp(max=1 - torch.finfo(wide).eps)  # both round to 1, and log 0 is no number
        return exponentials(alpha * beta * eta * eta.shape[1] ** -0.5, torch.log1p(-gone), length)


def neither_average_nor_gate():
    """An average of nothing but the token, and an update gate that is shut, leave x as it is."""
    module = Mega(8, shared=4)
    with torch.no_grad():
        module.from_average.bias[-8:] = -1000.0
        module.from_average.weight[-8:] = 0.0
    return module, nn.Identity()


def chunks_as_long_as_the_row():
    """Within a row, a chunk that holds it changes nothing."""
    one, other = Mega(8, shared=4, kind="laplace"), Mega(8, shared=4, kind="laplace", chunk=100)
    other.load_state_dict(one.state_dict())
    return one, other


def weights(dim, shared=64, values=None, averages=16, kind="softmax", chunk=None, causal=True):
    values = values or 2 * dim
    average = 4 * dim * averages * (1 if causal else 2) + dim
    return average + (dim + 1) * (shared + 2 * values + 2 * dim) + values * dim + 6 * shared


@layer(
    reference=reference,
    arxiv="2209.10655",
    system="mega",
    examples=(
        {"dim": 8, "shared": 4, "averages": 3},
        {"dim": 6, "shared": 6, "values": 5, "averages": 2, "kind": "laplace", "chunk": 4},
        {"dim": 6, "shared": 4, "averages": 2, "chunk": 5, "causal": False},
        {"dim": 4, "shared": 2, "averages": 2, "kind": "laplace", "causal": False},
    ),
    laws=(neither_average_nor_gate, chunks_as_long_as_the_row),
    weights=weights,
)
class Mega(nn.Module):
    """`shared` channels of queries and keys, `values` (None: 2 * dim) of values, `averages` numbers of state for each
    channel. kind: "softmax" or "laplace". chunk: None for attention over the whole row."""

    def __init__(
        self, dim: int, *, shared: int = 64, values: int | None = None, averages: int = 16, kind: str = "softmax",
        chunk: int | None = None, causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(unknown("kind of attention", kind, KINDS))
        if shared % 2:
            raise ValueError(f"the bias rotates pairs of channels: shared must be even, not {shared}")
        self.dim, self.kind, self.chunk, self.causal = dim, kind, chunk, causal
        self.form = form_of(kind, chunk, causal)
        values = values or 2 * dim
        self.sizes = [shared, values, dim, dim]
        self.average = MovingAverage(dim, averages)
        if not causal:
            self.average_back = MovingAverage(dim, averages)
        self.omega = nn.Parameter(torch.randn(dim))
        self.from_average = nn.Linear(dim, sum(self.sizes))
        self.v = nn.Linear(dim, values)
        self.h = nn.Linear(values, dim, bias=False)
        for linear in (self.from_average, self.v, self.h):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.from_average.bias)
        nn.init.zeros_(self.v.bias)
        self.kappa, self.bias = (nn.Parameter(torch.randn(2, shared) * 0.02) for _ in range(2))
        self.mu = nn.Parameter(torch.zeros(2, shared))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        x = to_front(x, positions, n)
        at = torch.arange(n, device=x.device)[None]
        counts = torch.full_like(at[:, :1], n) if positions is None else (positions >= 0).sum(1, keepdim=True)
        z, r, h, u = self.from_average(F.silu(self.averaged(x))).split(self.sizes, -1)
        z, v = F.silu(z), F.silu(self.v(x))
        q, k = (kappa * z + mu for kappa, mu in zip(self.kappa, self.mu, strict=True))
        at_q, at_k = rotate(self.bias[:, None, None].expand(-1, 1, n, -1), at, 10000.0).expand(-1, len(x), -1, -1)
        tau = self.sizes[0] ** 0.5 if self.kind == "softmax" else self._seen(at, counts)[..., None].to(q.dtype)
        q, k = torch.cat([q / tau, at_q], -1), torch.cat([k, at_k], -1)
        there = None if positions is None else torch.where(at < counts, at, -1)
        o = attention(
            q[:, None].to(v.dtype), k[:, None].to(v.dtype), v[:, None], self.form,
            q_positions=there, kv_positions=there,
        )[:, 0]  # fmt: skip
        h = F.silu(h + self.h(F.silu(r) * o))
        return from_front(torch.lerp(x, h.to(x.dtype), u.sigmoid().to(x.dtype)), positions, n)

    def averaged(self, x: Tensor) -> Tensor:
        """The moving averages and omega x, [batch, len, dim]."""
        n = x.shape[1]
        y = long_conv(x, self.average.kernel(n)) + self.omega * x
        if self.causal:
            return y
        ahead = F.pad(self.average_back.kernel(n)[:, 1:], (1, 0))
        return y + long_conv(x.flip(1), ahead).flip(1)

    def _seen(self, at: Tensor, counts: Tensor) -> Tensor:
        """How many keys each query sees, [1 | batch, len]."""
        first = torch.zeros_like(at) if self.chunk is None else at - at % self.chunk
        if self.causal:
            return at - first + 1
        return (counts - first).clamp(min=1, max=self.chunk)
