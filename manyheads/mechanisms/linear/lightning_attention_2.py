"""Lightning attention 2: causal linear attention with a fixed decay for each head, computed in blocks.

    S_t = lambda_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   lambda_h = exp(-2^{-8 h / H} (1 - layer / layers))

with heads h = 1 ... H. There is no softmax and no normaliser; a norm after it is the layer's.

Qin et al. "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models."
2024. arXiv:2401.04658. Slopes as in the authors' code (OpenNLPLab/lightning-attention).
"""

import math

import torch

from manyheads.core import Recurrence, mechanism, one


def reference(q, k, v, *, layer=0, layers=1):
    heads = q.shape[1]
    slope = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=q.dtype) * (1 - layer / layers)
    decay = torch.exp(-slope)[:, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(k.shape[-2]):
        state = decay * state + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t - k.shape[-2], None, :] @ state) if t >= k.shape[-2] - q.shape[-2] else None)
    return torch.cat([o for o in out if o is not None], -2)


@mechanism(
    reference=reference,
    arxiv="2401.04658",
    system="lightning-attention-2",
    examples=({}, {"layer": 3, "layers": 8}),
    trained=True,
    ranges={"layer": (0, math.inf)},
)
def lightning_attention_2(layer: int = 0, layers: int = 1) -> Recurrence:
    """Decays as of layer `layer` of `layers`: the last layer forgets least."""

    def decay(h, heads):
        return -torch.exp2(-8.0 * (h + 1) / heads) * (1 - layer / layers)

    return Recurrence(decay=decay, default_scale=one)
