"""STAtten: spiking self-attention over all tokens of a few time steps at once.

    q_t = LIF(BN(W_q LIF(x)_t)),   k_t and v_t in the same way,   all in {0, 1}
    Q, K, V: the tokens of c successive steps side by side, c n of them
    A = LIF_{1/2}(Q (K^T V) / side),   y_t = BN(W_o A_t + b_o)

for an image of side x side tokens. Steps of one chunk see each other in both directions, and the products cost as much
for any c; with c = 1 it is attention within each step alone, and only what neurons hold goes from a step to later ones.
As in the authors' models a static x is the same in every step, and here the mean of y over the steps goes out; a model
that stays in time, or whose input moves, calls `over_time`. A residual goes around the layer. For the events of a
camera the authors divide by c side^2, multiply the spikes with those of LIF(x), pooled, and add these: that is left to
the model.

Lee, Li, Kim, Panda. "Spiking Transformer with Spatial-Temporal Attention." 2024. arXiv:2409.19764. As in the released
code (Intelligent-Computing-Lab-Yale/STAtten), which puts the attention into a spike-driven transformer.
"""

import torch
from torch import Tensor, nn

from manyheads.core import Recurrence, one
from manyheads.core.batch_norm import batch_normed
from manyheads.core.layer import layer
from manyheads.core.plain import cut, spiked, standardised
from manyheads.core.spikes import lif, spiking
from manyheads.dispatch import attention
from manyheads.nn import positions_of, split

ADD = Recurrence(causal=False, default_scale=one)


def reference(module, x):
    rows = []
    for row in x:
        frames = spiked([row] * module.steps, module.threshold)
        q, k, v = (
            spiked([standardised(norm, frame @ project.weight.T) for frame in frames], module.threshold)
            for project, norm in ((module.q, module.q_norm), (module.k, module.k_norm), (module.v, module.v_norm))
        )
        counted = []
        for t in range(module.steps):
            first = t - t % module.chunk
            own = cut(q[t], module.heads)
            heads = [torch.zeros_like(h) for h in own]
            for s in range(first, first + module.chunk):
                keys, values = cut(k[s], module.heads), cut(v[s], module.heads)
                heads = [o + (a @ b.T) @ c for o, a, b, c in zip(heads, own, keys, values, strict=True)]
            counted.append(torch.cat(heads, -1) / module.side)
        mixed = [a @ module.o.weight.T + module.o.bias for a in spiked(counted, 0.5)]
        rows.append(sum(standardised(module.o_norm, frame) for frame in mixed) / module.steps)
    return torch.stack(rows)


@layer(
    reference=reference,
    arxiv="2409.19764",
    system="statten",
    examples=(
        {"dim": 12, "heads": 3, "side": 2, "threshold": 0.3},
        {"dim": 8, "heads": 2, "steps": 3, "chunk": 3, "side": 3, "threshold": 0.2},
        {"dim": 8, "heads": 2, "steps": 2, "chunk": 1, "side": 1, "threshold": 0.2},
    ),
    weights=lambda dim, heads, **_: 4 * dim**2 + dim + 4 * 2 * dim,
    causal=False,
)
class STAtten(nn.Module):
    """`steps` are T, `chunk` is c, which divides them; `threshold` is that of all neurons but A's."""

    def __init__(self, dim: int, heads: int, *, steps: int = 4, chunk: int = 2, side: int = 14, threshold: float = 1.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if steps % chunk:
            raise ValueError(f"steps {steps} is not a multiple of chunk {chunk}")
        self.dim, self.heads, self.steps, self.chunk, self.side = dim, heads, steps, chunk, side
        self.threshold = threshold
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.v_norm, self.o_norm = (nn.BatchNorm1d(dim) for _ in range(4))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions_of(x, present, self.dim)
        return self.over_time(x.expand(self.steps, -1, -1, -1), present=present).mean(0)

    def over_time(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [steps, batch, len, dim], a multiple of `chunk` steps. Returns numbers of that shape, no spikes."""
        if len(x) % self.chunk:
            raise ValueError(f"x has {len(x)} steps, which is no multiple of chunk {self.chunk}")
        s = lif(x, self.threshold)
        q = spiking(s, self.q, self.q_norm, self.threshold, present)
        k = spiking(s, self.k, self.k_norm, self.threshold, present)
        v = spiking(s, self.v, self.v_norm, self.threshold, present)
        a = lif(self.count(q, k, v) / self.side, 0.5).to(x.dtype)
        return batch_normed(self.o_norm, self.o(a), present)

    def count(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q K^T V of each head, whole numbers, for spikes [steps, batch, len, dim]. Absent tokens have none."""
        steps, batch, n, dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)  # counts beyond 256 are more than bfloat16 can tell apart

        def heads(spikes: Tensor) -> Tensor:
            """[chunks * batch, heads, chunk * len, head_dim]."""
            chunks = spikes.to(wide).unflatten(0, (-1, self.chunk)).transpose(1, 2)
            return split(chunks.reshape(-1, self.chunk * n, dim), self.heads)

        o = attention(heads(q), heads(k), heads(v), ADD).transpose(1, 2).reshape(-1, batch, self.chunk, n, dim)
        return o.transpose(1, 2).reshape(steps, batch, n, dim)
