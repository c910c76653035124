"""Gated slot attention: a softmax over a fixed number of slots, each of which forgets as it is written to.

    K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t^T,   V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t^T
    o_t = V_t^T softmax(K_t q_t)

with K [slots, head_dim], V [slots, v_head_dim] and gates a_t = exp(g_t) in (0, 1) for each slot, the power 1 / tau of a
sigmoid. A slot is a weighted mean of keys, so that the softmax is that of attention over `slots` tokens. SiLU on q, k
and v before and the norm behind are the layer's. The paper's scale is 1.

Zhang, Yang, Zhu, Zhang, Cui, Wang, Wang, Shi, Wang, Bi, Zhou, Fu. "Gated Slot Attention for Efficient Linear-Time
Sequence Modeling." 2024. arXiv:2409.07146. Gates as in the authors' code in fla-org/flash-linear-attention.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Operand, Recurrence, as_linear, mechanism, one


def reference(q, k, v, *, slots=64, tau=8.0, g):
    keys, values = (x.new_zeros(*q.shape[:2], slots, x.shape[-1]) for x in (k, v))
    out = []
    for t in range(k.shape[-2]):
        a = g[..., t, :, None].exp()
        keys = a * keys + (1 - a) * k[..., t, None, :]
        values = a * values + (1 - a) * v[..., t, None, :]
        if t >= k.shape[-2] - q.shape[-2]:
            weights = torch.softmax(q[..., t - k.shape[-2], None, :] @ keys.mT, -1)
            out.append(weights @ values)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2409.07146",
    system="gated-slot-attention",
    examples=({"slots": 4}, {"slots": 7, "tau": 1.0}),
    trained=True,
    tolerance=2.0,
    tolerance_reason="in chunks, what is left of a write is the exponential of a difference of sums of log gates",
)
def gated_slot_attention(slots: int = 64, tau: float = 8.0) -> Recurrence:
    """Log gates `g` of `slots` slots for each head; the greater tau, the longer they remember."""
    # Slots that start alike would stay alike, so their gates' projection does not start at 0.
    gate = Operand(f"batch heads len {slots}", lambda x: F.logsigmoid(x) / tau, init=as_linear)
    return Recurrence(write="slots", operands={"g": gate}, default_scale=one)
