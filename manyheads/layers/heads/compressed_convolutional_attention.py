"""Compressed convolutional attention (CCA): attention among projections far narrower than the model, which short
convolutions enrich; with fewer key than query heads (CCGQA).

    q = x W_q,   k = x W_k,   [q'; k'] = conv_heads(conv_channels([q; k]))
    q''_h = q'_h + (q_h + k_g(h)) / 2,   k''_g = k'_g + (mean_{h in g} q_h + k_g) / 2
    o_h = softmax(sqrt(d) (q''_h / |q''_h|) . t_g (k''_g / |k''_g|)) v_g,   out = [o_1 ...] W_O
    v_t = [x_t W_v, x_{t-1} W_u],   each of half the values' width

conv_channels has a kernel of two tokens for each channel, conv_heads one of two tokens and d x d channels for each
head; both are causal and have a bias. t_g is a learned temperature. Rotary positions follow the norm; `rotated` is the
share of channels that they turn, half in the authors' ZAYA1, whose layer in transformers this equals.

Figliolia, Alonso, Iyer, Anthony, Millidge. "Compressed Convolutional Attention: Efficient Attention in a Compressed
Latent Space." 2025. arXiv:2510.04476.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import cut, softmax_heads, turned
from manyheads.dispatch import attention
from manyheads.nn import positions_of, rotate, split


def reference(module, x):
    heads, kv_heads, d, r = module.heads, module.kv_heads, module.head_dim, module.rotated
    group = heads // kv_heads
    rows = []
    for row in x:
        nothing = torch.zeros_like(row[0])
        both = [torch.cat([module.q.weight @ x_t, module.k.weight @ x_t]) for x_t in row]
        both = [torch.zeros_like(both[0])] * 2 + both
        w, bias = module.conv_channels.weight[:, 0], module.conv_channels.bias
        first = [w[:, 0] * a + w[:, 1] * b + bias for a, b in pairwise(both)]
        q, k, v = [], [], []
        for t in range(len(row)):
            mixed, plain = [], both[t + 2].view(heads + kv_heads, d)
            for h, w in enumerate(module.conv_heads.weight.view(heads + kv_heads, d, d, 2)):
                at = slice(h * d, h * d + d)
                mixed.append(w[..., 0] @ first[t][at] + w[..., 1] @ first[t + 1][at] + module.conv_heads.bias[at])
            q.append([mixed[h] + (plain[h] + plain[heads + h // group]) / 2 for h in range(heads)])
            of = [sum(plain[g * group : (g + 1) * group]) / group for g in range(kv_heads)]
            k.append([mixed[heads + g] + (of[g] + plain[heads + g]) / 2 for g in range(kv_heads)])
            before = row[t - 1] if t else nothing
            v.append(torch.cat([module.v_now.weight @ row[t], module.v_before.weight @ before]))
        q, k = (
            torch.stack([torch.stack([u * (d / u.square().sum()) ** 0.5 for u in token]) for token in z]).transpose(
                0, 1
            )
            for z in (q, k)
        )
        k = k * module.temperature[:, None, None]
        q, k = (torch.cat([turned(z[..., :r], module.rope_theta), z[..., r:]], -1) for z in (q, k))
        rows.append(torch.cat(list(softmax_heads(q, k, cut(torch.stack(v), kv_heads))), -1) @ module.o.weight.T)
    return torch.stack(rows)


def lengths_do_not_matter():
    """Without biases, queries and keys three times as long give the same: only their directions count."""
    one, other = (CompressedConvolutionalAttention(12, 4, kv_heads=2, head_dim=4) for _ in range(2))
    with torch.no_grad():
        for name, p in one.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        other.load_state_dict(one.state_dict())
        other.q.weight.mul_(3.0)
        other.k.weight.mul_(3.0)
    return one, other


def weights(dim, heads, kv_heads, head_dim=128, rotated=1.0, rope_theta=None):
    q, k = heads * head_dim, kv_heads * head_dim
    return dim * (2 * q + 2 * k) + 3 * (q + k) + (q + k) * (2 * head_dim + 1) + kv_heads


@layer(
    reference=reference,
    arxiv="2510.04476",
    system="cca-ccgqa",
    examples=(
        {"dim": 12, "heads": 4, "kv_heads": 2, "head_dim": 4, "rotated": 0.5},
        {"dim": 10, "heads": 3, "kv_heads": 1, "head_dim": 6},
        {"dim": 8, "heads": 2, "kv_heads": 2, "head_dim": 3, "rope_theta": None},
    ),
    laws=(lengths_do_not_matter,),
    weights=weights,
    ranges={"rotated": (0, 1)},
)
class CompressedConvolutionalAttention(nn.Module):
    """Causal. Queries are heads * head_dim wide, keys and values kv_heads * head_dim."""

    def __init__(
        self, dim: int, heads: int, *, kv_heads: int, head_dim: int = 128, rotated: float = 1.0,
        rope_theta: float | None = 10000.0,
    ):  # fmt: skip
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}")
        if kv_heads * head_dim % 2:
            raise ValueError(f"half of the values' width is kv_heads * head_dim / 2, but {kv_heads * head_dim} is odd")
        self.rotated = int(head_dim * rotated) if rope_theta is not None else 0
        if self.rotated % 2:
            raise ValueError(f"rotary positions need an even number of channels, not {self.rotated}")
        self.dim, self.heads, self.kv_heads, self.head_dim, self.rope_theta = dim, heads, kv_heads, head_dim, rope_theta
        latent, kv = (heads + kv_heads) * head_dim, kv_heads * head_dim
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, kv, bias=False)
        self.v_now = nn.Linear(dim, kv // 2, bias=False)
        self.v_before = nn.Linear(dim, kv // 2, bias=False)
        self.conv_channels = nn.Conv1d(latent, latent, 2, groups=latent)
        self.conv_heads = nn.Conv1d(latent, latent, 2, groups=heads + kv_heads)
        self.temperature = nn.Parameter(torch.ones(kv_heads))
        self.o = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        if present is not None:
            x = x.masked_fill(~present[..., None], 0.0)  # before the first token there are zeros
        q, k = self.mix(self.q(x), self.k(x))
        v = torch.cat([self.v_now(x), self.v_before(F.pad(x, (0, 0, 1, -1)))], -1)
        at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
        q, k = self.turn(q, at), self.turn(k * self.temperature[:, None, None], at)
        o = attention(q, k, split(v, self.kv_heads), "causal", q_positions=positions, kv_positions=positions)
        return self.o(o.transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [batch, heads, len, head_dim] of length sqrt(head_dim), from what was projected."""
        both = F.pad(torch.cat([q, k], -1).mT, (2, 0))
        mixed = split(self.conv_heads(self.conv_channels(both)).mT, self.heads + self.kv_heads)
        q, k = split(q, self.heads), split(k, self.kv_heads)
        group = self.heads // self.kv_heads
        mean_q = (q + k.repeat_interleave(group, 1)) / 2
        mean_k = mean_q.unflatten(1, (self.kv_heads, group)).mean(2)
        eps = torch.finfo(q.dtype).eps
        both = F.normalize(mixed + torch.cat([mean_q, mean_k], 1), dim=-1, eps=eps) * self.head_dim**0.5
        return both[:, : self.heads], both[:, self.heads :]

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        if self.rope_theta is None:
            return x
        return torch.cat([rotate(x[..., : self.rotated], at, self.rope_theta), x[..., self.rotated :]], -1)
