"""MaTVLM: a trained attention layer becomes a Mamba-2 layer that starts from its four projections, and is distilled.

    [z, x, B, C, dt] = [W_z, W_V, W_K, W_Q, W_dt] u,   (x, B, C) <- silu(conv(x, B, C)),   dt <- softplus(dt + b)
    h_t = exp(-exp(A_log) dt_t) h_{t-1} + B_t (dt_t x_t)^T,   y_t = h_t^T C_t + D x_t
    out = W_O (RMSNorm(y * silu(z)) * w)

for each head, whose C, x and B are what were its query, value and key: without softmax, and with nothing forgotten,
attention is this recurrence. Heads share x and B as they shared values and keys; the norm is over a head's channels.
W_z, W_dt, A_log, b, D and w are new, as Mamba-2 starts them. `from_attention` starts the convolution as one that
copies, where the released code (hustvl/MaTVLM) starts it at random. Rotary positions are lost: what has faded tells how
long ago it was. conv_size=0 leaves out the convolution with its silu, gated=False the norm with its gate; then, with
D = 0, dt = 1 and no decay, it is linear attention. No state is kept for decoding yet.

The paper replaces an eighth to a half of a model's layers, evenly spread, and trains on `distillation_losses`, not on
labels.

Li, Liao, Liu, Wang. "MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling." 2025. arXiv:2503.13440.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.convolution import causal_conv
from manyheads.core.layer import layer
from manyheads.core.plain import convolved, cut, recurrent_heads
from manyheads.core.state_space import for_each_head, gated_norm, initial_rates, time_steps
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, split


def reference(module, x):
    heads, kv_heads, rows = module.heads, module.kv_heads, []
    for row in x:
        z, mixed, raw = (row @ module.in_proj.weight.T).split(module.widths, -1)
        if module.conv1d is not None:
            mixed = convolved(mixed, module.conv1d.weight[:, 0], module.conv1d.bias)
            mixed = mixed * torch.sigmoid(mixed)
        value, key, query = mixed.split([module.kv, module.kv, module.inner], -1)
        dt = torch.log(1 + torch.exp(raw + module.dt_bias)).T
        of = [h * kv_heads // heads for h in range(heads)]
        value, key = cut(value, kv_heads)[of], cut(key, kv_heads)[of]
        y = recurrent_heads(cut(query, heads), key, dt[..., None] * value, -torch.exp(module.A_log)[:, None] * dt)
        y = y + module.D[:, None, None] * value
        if module.norm is not None:
            gate = cut(z, heads)
            y = y * gate * torch.sigmoid(gate)
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight.view(heads, 1, -1)
        rows.append(torch.cat(list(y), -1) @ module.out_proj.weight.T)
    return torch.stack(rows)


def without_softmax():
    """With no convolution, gate, skip or decay, and time steps of 1, it gives what attention gives without softmax."""
    teacher = Attention(12, 4, "lightning_attention_2", kv_heads=2, rope_theta=None, layer=1, layers=1)  # no decay
    made = MaTVLM.from_attention(
        teacher.q.weight, teacher.k.weight, teacher.v.weight, teacher.o.weight, heads=4, conv_size=0, gated=False
    )
    with torch.no_grad():
        made.in_proj.weight[-4:] = 0.0
        made.dt_bias.fill_(math.log(math.e - 1))  # softplus gives 1
        made.A_log.fill_(-math.inf)
        made.D.zero_()
    return made, teacher


@layer(
    reference=reference,
    arxiv="2503.13440",
    system="matvlm",
    examples=(
        {"dim": 12, "heads": 4, "kv_heads": 2},
        {"dim": 6, "heads": 2, "head_dim": 5, "conv_size": 0},
        {"dim": 8, "heads": 2, "conv_size": 2, "gated": False},
    ),
    laws=(without_softmax,),
    ranges={"conv_size": (0, math.inf)},
)
class MaTVLM(nn.Module):
    """A Mamba-2 layer with the sizes of an attention layer. Causal."""

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None, conv_size: int = 4,
        gated: bool = True,
    ):  # fmt: skip
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; give head_dim")
        kv_heads, head_dim = kv_heads or heads, head_dim or dim // heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} must divide the {heads} heads")
        self.dim, self.heads, self.kv_heads, self.inner, self.kv = (
            dim,
            heads,
            kv_heads,
            heads * head_dim,
            kv_heads * head_dim,
        )
        mixed = self.inner + 2 * self.kv
        self.widths = [self.inner if gated else 0, mixed, heads]
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv_size, groups=mixed) if conv_size else None
        self.A_log, self.dt_bias = (nn.Parameter(start) for start in initial_rates(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.inner) if gated else None  # its weight alone
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    @classmethod
    def from_attention(
        cls, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, *, heads: int, **settings: Any
    ) -> MaTVLM:
        """From the weights of a trained layer: q [heads * head_dim, dim], k and v [kv_heads * head_dim, dim], o [dim,
        heads * head_dim], as `nn.Linear` and transformers have them; they are copied, to the same device and dtype.
        settings: conv_size, gated. Raises ValueError for other shapes."""
        inner, dim = q_weight.shape
        head_dim = inner // heads
        kv = k_weight.shape[0]
        if inner % heads or kv % head_dim or k_weight.shape != v_weight.shape or o_weight.shape != (dim, inner):
            shapes = ", ".join(str(tuple(w.shape)) for w in (q_weight, k_weight, v_weight, o_weight))
            raise ValueError(f"q, k, v and o of {heads} heads cannot have the shapes {shapes}")
        made = cls(dim, heads, kv_heads=kv // head_dim, head_dim=head_dim, **settings).to(q_weight)
        with torch.no_grad():
            start = made.widths[0]
            made.in_proj.weight[start : start + made.widths[1]] = torch.cat([v_weight, k_weight, q_weight])
            made.out_proj.weight.copy_(o_weight)
            if made.conv1d is not None:
                for parameter in made.conv1d.parameters():
                    parameter.zero_()
                made.conv1d.weight[..., -1] = 1.0
        return made

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        z, mixed, raw = self.in_proj(x).split(self.widths, -1)
        if self.conv1d is not None:
            mixed = F.silu(causal_conv(mixed, self.conv1d.weight[:, 0], self.conv1d.bias, present=present))
        value, key, query = mixed.split([self.kv, self.kv, self.inner], -1)
        value, key = (for_each_head(split(t, self.kv_heads), self.heads) for t in (value, key))
        dt, g = time_steps(raw, self.dt_bias, self.A_log)
        y = attention(
            split(query, self.heads), key, (dt[..., None] * value).to(value.dtype), "state_space_duality", g=g,
            q_positions=positions, kv_positions=positions,
        )  # fmt: skip
        y = (y + self.D[:, None, None] * value).transpose(1, 2).flatten(2)
        if self.norm is not None:
            y = gated_norm(y, z, self.norm.weight, self.heads)
        out = self.out_proj(y)
        return out if present is None else out.masked_fill(~present[..., None], 0.0)


def distillation_losses(
    student_logits: Tensor, teacher_logits: Tensor, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor],
    *, present: Tensor | None = None, temperature: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """What a student is trained on: `logits`, KL(teacher || student) at a temperature, times its square; `layers`, the
    length of the difference between what each new layer gives and what the teacher's gives, from the same input,
    summed over layers. Both are means over the tokens, where the released code sums them, so that they do not hang on
    how many there are.

    logits [batch, len, vocabulary], layers [batch, len, dim] each, without the teacher's gradients; present: bool
    [batch, len].
    """

    def tokens(t: Tensor) -> Tensor:
        t = t.flatten(0, 1) if present is None else t[present]
        return t.to(torch.promote_types(t.dtype, torch.float32))

    student, teacher = (F.log_softmax(tokens(t) / temperature, -1) for t in (student_logits, teacher_logits))
    apart = [tokens(s) - tokens(t) for s, t in zip(student_layers, teacher_layers, strict=True)]
    return {
        "logits": F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2,
        "layers": torch.stack([difference.norm(dim=-1).mean() for difference in apart]).sum(),
    }
