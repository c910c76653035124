"""Hymba: attention heads and Mamba heads side by side on the same tokens, behind a few learned ones.

    [q, k, v, x, z] = W_in u,   out = W_out (beta_1 * norm(attention(q, k, v)) + beta_2 * norm(ssm(x) * silu(z))) / 2
    query i sees key j <= i if i - j < window or j < meta
    ssm: x <- silu(conv(x)),   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t

`meta` learned tokens stand before the row. All queries see them, and the state has read them when the row begins. As no
token that comes later reaches them, what the layers of a model make of its meta tokens is the same for every input;
here each layer has its own. betas are for each channel: the weights of the RMS norms. The SSM's dt, B and C have RMS
norms, too. Values are `expand` times as wide as queries and keys; positions are rotary and count the meta tokens.

The released model attends without a window in its first, middle and last layer, and every two of its other layers share
their keys and values, which is for a model to do. Its window of 1024 allows i - j = 1024; here it counts keys.

Dong et al. "Hymba: A Hybrid-head Architecture for Small Language Models." 2024. arXiv:2411.13676. Details as in the
released code (NVlabs/hymba, nvidia/Hymba-1.5B-Base).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, selected, turned
from manyheads.core.scans import SelectiveState
from manyheads.core.state_space import normed
from manyheads.dispatch import attention
from manyheads.nn import from_front, positions_of, rotate, split, to_front


def reference(module, x):
    window, meta, rows = module.window or math.inf, len(module.meta), []
    for row in x:
        q, k, v, inner, z = (torch.cat([module.meta, row]) @ module.in_proj.weight.T).split(module.sizes, -1)
        q, k = (turned(cut(t, n), module.rope_theta) for t, n in ((q, module.heads), (k, module.kv_heads)))
        v, heads = cut(v, module.kv_heads), []
        for h in range(module.heads):
            own, tokens = h * module.kv_heads // module.heads, []
            for i in range(meta, meta + len(row)):
                seen = [j for j in range(i + 1) if i - j < window or j < meta]
                tokens.append((k[own, seen] @ q[h, i] / q.shape[-1] ** 0.5).softmax(0) @ v[own, seen])
            heads.append(torch.stack(tokens))
        ssm = selected(module.ssm, inner, ((module.ssm.A_log, False),)) * z * torch.sigmoid(z)
        both = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (torch.cat(heads, -1), ssm[meta:])]
        rows.append((module.beta[0] * both[0] + module.beta[1] * both[1]) / 2 @ module.out_proj.weight.T)
    return torch.stack(rows)


def a_window_as_long_as_the_row():
    """A window over everything is none."""
    one, other = Hymba(8, 2, state_dim=3, meta=2), Hymba(8, 2, state_dim=3, meta=2, window=15)
    other.load_state_dict(one.state_dict())
    return one, other


def weights(
    dim, heads, kv_heads=None, expand=2, meta=128, window=None, state_dim=16, conv_size=4, dt_rank=None, rope_theta=None
):
    inner, rank = expand * dim, dt_rank or -(-dim // 16)
    share = (kv_heads or heads) / heads
    into = round(dim * (dim + share * (dim + inner) + 2 * inner))
    ssm = inner * (conv_size + 1 + rank + 2 * state_dim + rank + 1 + state_dim + 1) + rank + 2 * state_dim
    return meta * dim + into + ssm + 2 * inner + inner * dim


@layer(
    reference=reference,
    arxiv="2411.13676",
    system="hymba",
    examples=(
        {"dim": 8, "heads": 2, "kv_heads": 1, "meta": 2, "window": 3, "state_dim": 3, "conv_size": 3},
        {"dim": 6, "heads": 3, "expand": 1, "meta": 1, "state_dim": 4, "dt_rank": 2, "rope_theta": None},
    ),
    laws=(a_window_as_long_as_the_row,),
    weights=weights,
    ranges={"meta": (0, math.inf)},
)
class Hymba(nn.Module):
    """`heads` of attention over the last `window` keys (None: all) and the `meta` tokens; `expand` * dim channels with
    a state of `state_dim` numbers each. dt_rank: None for dim / 16, rounded up. Causal."""

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, expand: int = 2, meta: int = 128,
        window: int | None = None, state_dim: int = 16, conv_size: int = 4, dt_rank: int | None = None,
        rope_theta: float | None = 10000.0,
    ):  # fmt: skip
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}, and heads dim {dim}")
        head_dim, inner = dim // heads, expand * dim
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels a head, not {head_dim}")
        self.dim, self.heads, self.kv_heads, self.window, self.rope_theta = dim, heads, kv_heads, window, rope_theta
        self.sizes = [dim, kv_heads * head_dim, kv_heads * head_dim * expand, inner, inner]
        self.meta = nn.Parameter(torch.randn(meta, dim))
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        rank = dt_rank or -(-dim // 16)
        self.ssm = SelectiveState(inner, state_dim=state_dim, conv_size=conv_size, dt_rank=rank, norms=True)
        self.beta = nn.Parameter(torch.ones(2, inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n, meta = positions_of(x, present, self.dim), x.shape[1], len(self.meta)
        # A row's tokens come right behind the meta tokens, padding last: nobody sees it then.
        row = torch.cat([self.meta.to(x.dtype).expand(len(x), -1, -1), to_front(x, positions, n)], 1)
        q, k, v, inner, z = self.in_proj(row).split(self.sizes, -1)
        attended = self.attend(split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads))
        both = attended.transpose(1, 2).flatten(2), self.ssm(inner) * F.silu(z)
        mean = sum(normed(y[:, meta:], beta) for y, beta in zip(both, self.beta, strict=True)) / 2
        return from_front(self.out_proj(mean), positions, n)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rope_theta is not None:
            at = torch.arange(q.shape[2], device=q.device)[None]
            q, k = rotate(q, at, self.rope_theta), rotate(k, at, self.rope_theta)
        if self.window is None:
            return attention(q, k, v, "causal")
        return attention(q, k, v, "sliding_window", window=self.window, sinks=len(self.meta))

    def kept(self, tokens: int) -> tuple[int, int]:
        """How many numbers one has to keep to go on after a row of so many tokens: keys and values, and for the SSM its
        states and the tokens that the next convolution reads."""
        _, keys, values, inner, _ = self.sizes
        seen = tokens if self.window is None else min(tokens, self.window - 1)
        states = inner * (self.ssm.A_log.shape[1] + self.ssm.conv1d.kernel_size[0] - 1)
        return (len(self.meta) + seen) * (keys + values), states
