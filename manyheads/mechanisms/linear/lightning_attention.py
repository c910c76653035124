"""Lightning attention, as in TransNormerLLM (TNL): causal linear attention of SiLU features that each head forgets at
a fixed rate of its own, computed in blocks.

    S_t = lambda_h S_{t-1} + silu(k_t) v_t^T,   o_t = S_t^T silu(q_t),   lambda_h = exp(-s_h (1 - l / (L - 1) + 1e-5))
    s_h = 2^{-8 h / P} for heads h = 1 ... P, P the largest power of two up to H, and 2^{-4 (2 h - 1) / P} for the
    h-th head beyond

in layer l = 0 ... L - 1: the first layer forgets fastest, the last almost nothing. The slopes s are those of ALiBi, the
factor that of the released code (OpenNLPLab/TransnormerLLM); the paper writes 8 h / H (1 - l / L) for the exponent.
There is no scale and no normaliser; the norm and the gate behind it, and rotary positions in the first layer, are the
layer's.

Qin, Sun, Li, Shen, Sun, Zhong. "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention."
2024. arXiv:2405.17381.
"""

import math

import torch
import torch.nn.functional as F

from manyheads.core import Recurrence, mechanism, one


def reference(q, k, v, *, layer=0, layers=1):
    heads = q.shape[1]
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * (2 * h - 1) / power) for h in range(1, heads - power + 1)]
    rate = torch.tensor(slopes, dtype=q.dtype) * ((1 - layer / (layers - 1) if layers > 1 else 1) + 1e-5)
    decay = torch.exp(-rate)[:, None, None]
    q, k = (x / (1 + (-x).exp()) for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(k.shape[-2]):
        state = decay * state + k[..., t, :, None] * v[..., t, None, :]
        if t >= k.shape[-2] - q.shape[-2]:
            out.append(q[..., t - k.shape[-2], None, :] @ state)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2405.17381",
    system="lightning-attention-tnl",
    examples=({}, {"layer": 3, "layers": 6}),
    trained=True,
    ranges={"layer": (0, math.inf)},
)
def lightning_attention(layer: int = 0, layers: int = 1) -> Recurrence:
    """Decays as of layer `layer` of `layers`, counted from 0."""
    if layer >= layers:
        raise ValueError(f"layers are counted from 0, so layer {layer} is none of {layers}")

    def decay(h, heads):
        power = 2 ** (heads.bit_length() - 1)
        beyond = torch.exp2(-4.0 * (2 * (h.double() - power) + 1) / power)
        slope = torch.where(h < power, torch.exp2(-8.0 * (h.double() + 1) / power), beyond)
        return -slope * (1 - layer / max(layers - 1, 1) + 1e-5)

    return Recurrence(query_feature=F.silu, key_feature=F.silu, decay=decay, default_scale=one)
