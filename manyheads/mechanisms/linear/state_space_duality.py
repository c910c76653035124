"""State space duality (SSD): the recurrence of Mamba-2 is linear attention that forgets by a number which each token
and head chooses.

    h_t = exp(g_t) h_{t-1} + k_t v_t^T,   o_t = h_t^T q_t,   g_t = dt_t A <= 0
    O = (L * Q K^T) V,   L_ij = exp(g_{j+1} + ... + g_i) for i >= j, else 0

The paper's C, B and dt x are q, k and v here: the time step dt > 0 multiplies values before they are written, and
A < 0, a number of each head, makes a decay of it. Both are the layer's (`mamba2`), as are the short convolution, the
skip and the gated norm. There is no scale. All heads, or a group of them, share B and C: q and k are given expanded,
not repeated. In `Attention` g starts at -0.07, in the middle of the authors' initial range.

Dao, Gu. "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality."
2024. arXiv:2405.21060.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Operand, Recurrence, mechanism, one


def reference(q, k, v, *, g):
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(k.shape[-2]):
        state = g[..., t, None, None].exp() * state + k[..., t, :, None] * v[..., t, None, :]
        if t >= k.shape[-2] - q.shape[-2]:
            out.append(q[..., t - k.shape[-2], None, :] @ state)
    return torch.cat(out, -2)


@mechanism(reference=reference, arxiv="2405.21060", system="mamba2-ssd", trained=True)
def state_space_duality() -> Recurrence:
    """Log decay `g` for each token and head."""
    return Recurrence(
        operands={"g": Operand("batch heads len", lambda x: -F.softplus(x - 2.6))},  # -0.07 at x = 0
        default_scale=one,
    )
