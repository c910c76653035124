"""TransNormerLLM: linear attention with a fixed decay for each head and layer, a norm without weights and a gate.

    q = silu(x W_q),   k = silu(x W_k),   v = x W_v,   u = x W_u
    q_t <- [q_t cos(t theta), q_t sin(t theta)],   k_t likewise                       in the first layer alone (LRPE)
    S_t = lambda_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   out = (SRMSNorm([o^1 ... o^H]) * u) W_o
    SRMSNorm(x) = x / (|x| / sqrt(dim))

with theta learned, for each channel, from 10000^(-2 c / dim). Decays lambda are those of the mechanism
`lightning_attention`, as the released code has them. There is no scale and no divisor; the norm adds 1e-6 to the mean
square. The channel mixer (SGLU), the norm before and the residual are the block's. No state is kept for decoding yet.

Qin, Li, Sun, Sun, Shen, et al. "Scaling TransNormer to 175 Billion Parameters." 2023. arXiv:2307.14995, now called
"TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Recurrence, one
from manyheads.core.layer import layer
from manyheads.core.plain import cut, recurrent_heads
from manyheads.dispatch import attention
from manyheads.mechanisms import get
from manyheads.nn import Attention, positions_of, split


def reference(module, x):
    heads, rows = module.heads, []
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * (2 * h - 1) / power) for h in range(1, heads - power + 1)]
    share = (1 - module.layer / (module.layers - 1) if module.layers > 1 else 1) + 1e-5
    g = -torch.tensor(slopes, dtype=x.dtype)[:, None].expand(-1, x.shape[1]) * share
    for row in x:
        q, k, v = (cut(row @ p.weight.T, heads) for p in (module.q, module.k, module.v))
        q, k = (t / (1 + torch.exp(-t)) for t in (q, k))
        if module.layer == 0:
            angle = torch.arange(len(row), dtype=x.dtype)[:, None] * module.theta
            q, k = (torch.cat([t * torch.cos(angle), t * torch.sin(angle)], -1) for t in (q, k))
        o = torch.cat(list(recurrent_heads(q, k, v, g)), -1)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows.append((o * (row @ module.u.weight.T)) @ module.o.weight.T)
    return torch.stack(rows)


class Unturned(nn.Module):
    """Lightning attention by its name, then norm and gate."""

    def __init__(self, of):
        super().__init__()
        self.of, self.attention = of, Attention(of.dim, of.heads, "lightning_attention", rope_theta=None)
        for name in "qkv":
            setattr(self.attention, name, getattr(of, name))

    def forward(self, x):
        o = self.attention.attend(x).transpose(1, 2).flatten(2)
        return self.of.o(F.rms_norm(o, o.shape[-1:], eps=1e-6) * self.of.u(x))


def no_angle():
    """With theta = 0 positions turn nothing, and it is lightning attention."""
    module = TransNormerLLM(12, 4)
    nn.init.zeros_(module.theta)
    return module, Unturned(module)


@layer(
    reference=reference,
    arxiv="2307.14995",
    system="transnormerllm",
    examples=(
        {"dim": 12, "heads": 4},
        {"dim": 9, "heads": 3, "layer": 2, "layers": 4},
    ),
    laws=(no_angle,),
    weights=lambda dim, heads, layer=0, layers=1: 5 * dim * dim + (dim if layer == 0 else 0),
    ranges={"layer": (0, math.inf)},
)
class TransNormerLLM(nn.Module):
    """The token mixer of layer `layer` of `layers`, counted from 0. Causal."""

    def __init__(self, dim: int, heads: int, *, layer: int = 0, layers: int = 1):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads, self.layer, self.layers = dim, heads, layer, layers
        lightning = get("lightning_attention")(layer=layer, layers=layers)
        assert isinstance(lightning, Recurrence), "whose features come before the angles here"
        self.form = Recurrence(decay=lightning.decay, default_scale=one)
        self.q, self.k, self.v, self.u, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(5))
        if layer == 0:
            self.theta = nn.Parameter(10000.0 ** (-2 * torch.arange(dim) / dim).view(heads, 1, -1))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k, v = (
            F.silu(split(self.q(x), self.heads)),
            F.silu(split(self.k(x), self.heads)),
            split(self.v(x), self.heads),
        )
        if self.layer == 0:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = self.turn(q, at), self.turn(k, at)
        o = attention(q, k, v, self.form, q_positions=positions, kv_positions=positions)
        o = o.transpose(1, 2).flatten(2)
        return self.o(F.rms_norm(o, (self.dim,), eps=1e-6) * self.u(x))

    def turn(self, t: Tensor, at: Tensor) -> Tensor:
        """t [batch, heads, len, d] as [batch, heads, len, 2 d], by the angles at positions `at` [batch | 1, len]."""
        angle = at[:, None, :, None] * self.theta.to(torch.promote_types(self.theta.dtype, torch.float32))
        return torch.cat([t * angle.cos().to(t.dtype), t * angle.sin().to(t.dtype)], -1)
