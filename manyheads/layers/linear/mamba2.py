"""Mamba-2: a state for each head, which one number a token and head fades, behind a short convolution.

    [z, (x, B, C), dt] = W_in u,   (x, B, C) <- silu(conv(x, B, C)),   dt <- softplus(dt + b),   a = exp(-exp(A_log) dt)
    h_t = a_t h_{t-1} + B_t (dt_t x_t)^T,   y_t = h_t^T C_t + D x_t,   out = W_out (RMSNorm(y * silu(z)) * w)

for each head, with its own x, dt, A_log, b and D. B and C are shared by all heads or, with several groups, by the
heads of a group; the norm is over a group's channels. The convolution has `conv_size` taps for each channel and looks
back. Parameters have the names and shapes of the authors' code (state-spaces/mamba), whose state loads, and start as
there. What is between the projections is the mechanism `state_space_duality`. No state is kept for decoding yet.

Dao, Gu. "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality."
2024. arXiv:2405.21060.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.convolution import causal_conv
from manyheads.core.layer import layer
from manyheads.core.plain import convolved, cut, recurrent_heads
from manyheads.core.state_space import for_each_head, gated_norm, initial_rates, time_steps
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split


def reference(module, x):
    heads, groups, inner, shared = module.heads, module.groups, module.inner, module.groups * module.state_dim
    rows = []
    for row in x:
        z, mixed, raw = (row @ module.in_proj.weight.T).split([inner, inner + 2 * shared, heads], -1)
        mixed = convolved(mixed, module.conv1d.weight[:, 0], module.conv1d.bias)
        value, key, query = (mixed * torch.sigmoid(mixed)).split([inner, shared, shared], -1)
        dt = torch.log(1 + torch.exp(raw + module.dt_bias)).T
        g = -torch.exp(module.A_log)[:, None] * dt
        value, key, query = cut(value, heads), cut(key, groups), cut(query, groups)
        of = [h * groups // heads for h in range(heads)]
        y = recurrent_heads(query[of], key[of], dt[..., None] * value, g)
        y = torch.cat(list(y + module.D[:, None, None] * value), -1) * z * torch.sigmoid(z)
        runs = [run / (run.square().mean(-1, keepdim=True) + 1e-5).sqrt() for run in y.chunk(groups, -1)]
        rows.append((torch.cat(runs, -1) * module.norm.weight) @ module.out_proj.weight.T)
    return torch.stack(rows)


def weights(dim, expand=2, head_dim=64, state_dim=128, groups=1, conv_size=4):
    inner, shared = expand * dim, 2 * groups * state_dim
    heads = inner // head_dim
    return dim * (2 * inner + shared + heads) + (inner + shared) * (conv_size + 1) + 3 * heads + inner + inner * dim


@layer(
    reference=reference,
    arxiv="2405.21060",
    system="mamba2-ssd",
    examples=(
        {"dim": 6, "head_dim": 4, "state_dim": 5},
        {"dim": 8, "expand": 1, "head_dim": 2, "state_dim": 3, "groups": 2, "conv_size": 1},
    ),
    weights=weights,
)
class Mamba2(nn.Module):
    """`expand` * dim channels in heads of `head_dim`, each with a state of `state_dim` x `head_dim`. Causal."""

    def __init__(
        self, dim: int, *, expand: int = 2, head_dim: int = 64, state_dim: int = 128, groups: int = 1,
        conv_size: int = 4,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.inner, self.state_dim, self.groups = dim, expand * dim, state_dim, groups
        if self.inner % head_dim:
            raise ValueError(f"expand * dim = {self.inner} is no multiple of head_dim {head_dim}")
        self.heads = self.inner // head_dim
        if self.heads % groups:
            raise ValueError(f"groups {groups} must divide the {self.heads} heads")
        mixed = self.inner + 2 * groups * state_dim
        self.in_proj = nn.Linear(dim, self.inner + mixed + self.heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv_size, groups=mixed)
        self.A_log, self.dt_bias = (nn.Parameter(start) for start in initial_rates(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner)  # its weight alone: the norm is gated
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, shared = positions_of(x, present, self.dim), self.groups * self.state_dim
        z, mixed, raw = self.in_proj(x).split([self.inner, self.inner + 2 * shared, self.heads], -1)
        mixed = F.silu(causal_conv(mixed, self.conv1d.weight[:, 0], self.conv1d.bias, present=present))
        value, key, query = mixed.split([self.inner, shared, shared], -1)
        value = split(value, self.heads)
        key, query = (for_each_head(split(t, self.groups), self.heads) for t in (key, query))
        dt, g = time_steps(raw, self.dt_bias, self.A_log)
        y = attention(
            query, key, (dt[..., None] * value).to(value.dtype), "state_space_duality", g=g,
            q_positions=positions, kv_positions=positions,
        )  # fmt: skip
        y = (y + self.D[:, None, None] * value).transpose(1, 2).flatten(2)
        out = self.out_proj(gated_norm(y, z, self.norm.weight, self.groups))
        return out if present is None else out.masked_fill(~present[..., None], 0.0)
