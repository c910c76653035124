"""Monotonic attention: each query goes on from where the one before it stopped, and stops once.

    p_ij = sigmoid(q_i . k_j / sqrt(d) + r_h),   a_ij = p_ij sum_{k <= j} a_{i-1, k} prod_{k <= l < j} (1 - p_il)
    o_i = sum_j a_ij v_j

with a_0 on the first key: the expected alignment of heads that stop at key j with probability p_ij, as in training.
With p_ij rounded to 0 or 1 it is what they do in a stream: stop at the first key whose score is above 0. A head that
runs past the last key gives 0 from then on, so that rows sum to at most 1. Queries start with the first one given.

Zhao, Wang, Wei, et al. "Adaptive Sparse and Monotonic Attention for Transformer-based Automatic Speech Recognition."
2022. arXiv:2209.15176. Only its abstract was at hand: the alignment is that of Raffel, Luong, Liu, et al.
(arXiv:1704.00784), one for each head as Ma, Pino, Cross, et al. have it (arXiv:1909.12406). The regulariser that prunes
heads belongs to training.
"""

import torch

from manyheads.core import Function, Operand, mechanism
from manyheads.core.maps import read, score_map
from manyheads.core.names import unknown

ALIGNMENTS = ("expected", "hard")


def reference(q, k, v, *, r, alignment="expected"):
    n, out = k.shape[-2], []
    before = [torch.ones_like(q[..., 0, 0]) * (j == 0) for j in range(n)]
    for i in range(q.shape[-2]):
        s = [(q[..., i, :] * k[..., j, :]).sum(-1) / q.shape[-1] ** 0.5 + r for j in range(n)]
        p = [torch.sigmoid(x) if alignment == "expected" else (x > 0).to(q.dtype) for x in s]
        a = []
        for j in range(n):
            arrived, moved_on = 0.0, 1.0
            for start in range(j, -1, -1):
                moved_on = moved_on * (1 - p[start]) if start < j else moved_on
                arrived = arrived + before[start] * moved_on
            a.append(p[j] * arrived)
        out.append(torch.stack(a, -1)[..., None, :] @ v)
        before = a
    return torch.cat(out, -2)


def reluctant(r):
    return r.fill_(-1.0)


@mechanism(
    reference=reference,
    arxiv="2209.15176",
    system="adaptive-sparse-monotonic-asr",
    examples=({}, {"alignment": "hard"}),
    causal=False,
    trained=True,
)
def monotonic_attention(alignment: str = "expected") -> Function:
    """`alignment` is "expected" for training, "hard" for what a stream does."""
    if alignment not in ALIGNMENTS:
        raise ValueError(unknown("alignment", alignment, ALIGNMENTS))

    def forward(q, k, v, *, scale, r):
        p = score_map(q, k, scale) + r[:, None, None]
        p = p.sigmoid() if alignment == "expected" else (p > 0).to(p.dtype)
        a = torch.zeros_like(p[:, :, 0])
        a[..., 0] = 1.0
        rows = []
        for stop in p.unbind(2):
            a = stop * carried(1 - stop, a)
            rows.append(a)
        return read(torch.stack(rows, 2), v)

    return Function(forward=forward, operands={"r": Operand("heads", init=reluctant)})


def carried(go_on, x):
    """y_j = go_on_{j-1} y_{j-1} + x_j over the last dimension, in steps of 1, 2, 4, ... in which nothing divides."""
    through, step = torch.nn.functional.pad(go_on[..., :-1], (1, 0)), 1
    while step < x.shape[-1]:
        x = x + through * torch.nn.functional.pad(x[..., :-step], (step, 0))
        through = through * torch.nn.functional.pad(through[..., :-step], (step, 0))
        step *= 2
    return x
