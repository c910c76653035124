"""Spiking self-attention, as in Spikformer V2: queries, keys and values are spikes, and nothing is exponentiated.

    q_t = LIF(BN(W_q x_t)),   k_t = LIF(BN(W_k x_t)),   v_t = LIF(BN(W_v x_t)),   all in {0, 1}
    a_t = LIF_{1/2}(s q_t k_t^T v_t),   y_t = LIF(BN(W_o a_t + b_o)),   s = 1/8

in steps t = 1 ... T, which share nothing but what the neurons hold. Spikes count each other, so q_t k_t^T v_t is made
of whole numbers, and q (k^T v) equals (q k^T) v exactly. An image stands still: as in the authors' models x is the same
in every step, and here the mean of y over the steps goes out; a model that stays among spikes calls `over_time`. A
residual goes around the layer. The stem of convolutions and the pre-training with masks are the model's.

Zhou, Che, Fang, Tian, Zhu, Yan, Tian, Yuan. "Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN
Ticket." 2024. arXiv:2401.02020. The code that is released is that of the first Spikformer (ZK-Zhou/spikformer), with
the same attention; the neurons and their gradient are from there.
"""

import torch
from torch import Tensor, nn

from manyheads.core import Recurrence, one
from manyheads.core.layer import layer
from manyheads.core.plain import cut, spiked, standardised
from manyheads.core.spikes import lif, spiking
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split

ADD = Recurrence(causal=False, default_scale=one)


def reference(module, x):
    rows = []
    for row in x:
        frames = [row] * module.steps
        q, k, v = (
            spiked([standardised(norm, frame @ project.weight.T) for frame in frames], module.threshold)
            for project, norm in ((module.q, module.q_norm), (module.k, module.k_norm), (module.v, module.v_norm))
        )
        counted = []
        for t in range(module.steps):
            heads = zip(*(cut(spikes[t], module.heads) for spikes in (q, k, v)), strict=True)
            counted.append(torch.cat([(q_h @ k_h.T) @ v_h for q_h, k_h, v_h in heads], -1) * module.scale)
        mixed = [a @ module.o.weight.T + module.o.bias for a in spiked(counted, 0.5)]
        out = spiked([standardised(module.o_norm, frame) for frame in mixed], module.threshold)
        rows.append(sum(out) / module.steps)
    return torch.stack(rows)


@layer(
    reference=reference,
    arxiv="2401.02020",
    system="spikformer-v2-ssa",
    examples=(
        {"dim": 12, "heads": 3, "scale": 0.5, "threshold": 0.3},
        {"dim": 8, "heads": 2, "steps": 2, "scale": 1.0, "threshold": 0.2},
    ),
    weights=lambda dim, heads, **_: 4 * dim**2 + dim + 4 * 2 * dim,
    causal=False,
)
class SpikingSelfAttention(nn.Module):
    """`steps` are T, `scale` is s; `threshold` is that of all neurons but a's."""

    def __init__(self, dim: int, heads: int, *, steps: int = 4, scale: float = 0.125, threshold: float = 1.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads, self.steps, self.scale = dim, heads, steps, scale
        self.threshold = threshold
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.v_norm, self.o_norm = (nn.BatchNorm1d(dim) for _ in range(4))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions_of(x, present, self.dim)
        return self.over_time(x.expand(self.steps, -1, -1, -1), present=present).mean(0)

    def over_time(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [steps, batch, len, dim], any number of steps. Returns spikes of that shape."""
        return self.spikes(x, present=present)["y"]

    def spikes(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        """All spikes for x [steps, batch, len, dim], by their names in the equations, each of x's shape. Their means
        are the rates that the numbers of additions go with."""
        q = spiking(x, self.q, self.q_norm, self.threshold, present)
        k = spiking(x, self.k, self.k_norm, self.threshold, present)
        v = spiking(x, self.v, self.v_norm, self.threshold, present)
        a = lif(self.scale * self.count(q, k, v), 0.5).to(q.dtype)
        return {"q": q, "k": k, "v": v, "a": a, "y": spiking(a, self.o, self.o_norm, self.threshold, present)}

    def count(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q k^T v of each head, whole numbers, for spikes [steps, batch, len, dim]. Absent tokens have none."""
        wide = torch.promote_types(q.dtype, torch.float32)  # counts beyond 256 are more than bfloat16 can tell apart
        shape = q.shape
        q, k, v = (split(spikes.flatten(0, 1).to(wide), self.heads) for spikes in (q, k, v))
        return attention(q, k, v, ADD).transpose(1, 2).reshape(shape)
