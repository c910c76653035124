"""DeltaProduct: several corrections of the state for each token, so that it may be turned and not only mirrored.

    S_{t,0} = exp(g_t) S_{t-1},   S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T
    S_t = S_{t,n},   o_t = S_t^T q_t / sqrt(d)

with |q_t| = |k_{t,j}| = 1. A factor I - beta k k^T has the eigenvalue 1 - beta along k: with beta up to 2 it reaches
-1, a reflection, and two reflections are a rotation. k and v are those of the first write, more_keys and more_values of
the others. Gated DeltaProduct is the one with a decay. Short convolutions, SiLU and a gated norm are the layer's.

Siems, Carstensen, Zela, Hutter, Pontil, Grazzi. "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder
Products." 2025. arXiv:2502.10297. Normalisation, scale and the place of the decay as in the authors' code in
fla-org/flash-linear-attention.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Operand, Recurrence, as_linear, mechanism, unit


def reference(q, k, v, *, products=2, gated=False, negative=True, beta, more_keys=None, more_values=None, g=None):
    k = k[..., None, :] if more_keys is None else torch.cat([k[..., None, :], more_keys], -2)
    v = v[..., None, :] if more_values is None else torch.cat([v[..., None, :], more_values], -2)
    beta = beta[..., None] if beta.ndim == 3 else beta
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    out = []
    for t in range(k.shape[2]):
        if g is not None:
            state = g[..., t, None, None].exp() * state
        for j in range(products):
            k_j, v_j, beta_j = k[..., t, j, :], v[..., t, j, :], beta[..., t, j, None, None]
            state = (eye - beta_j * k_j[..., :, None] * k_j[..., None, :]) @ state
            state = state + beta_j * k_j[..., :, None] * v_j[..., None, :]
        if t >= k.shape[2] - q.shape[2]:
            out.append(q[..., t - k.shape[2], None, :] @ state / q.shape[-1] ** 0.5)
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2502.10297",
    system="deltaproduct",
    examples=({"products": 3, "gated": True}, {"products": 1, "negative": False}, {}),
    trained=True,
    tolerance=2.0,
    tolerance_reason="in chunks, the gradient of g is a difference of sums over the chunk",
)
def deltaproduct(products: int = 2, gated: bool = False, negative: bool = True) -> Recurrence:
    """`products` writes for each token, after a log decay `g` if `gated`; strengths `beta` reach to 2 if `negative`."""
    largest = 2 if negative else 1
    more = "" if products == 1 else f" {products}"
    operands = {"beta": Operand(f"batch heads len{more}", lambda x: largest * torch.sigmoid(x))}
    if products > 1:
        operands["more_keys"] = Operand(f"batch kv_heads len {products - 1} head_dim", init=as_linear)
        operands["more_values"] = Operand(f"batch kv_heads len {products - 1} v_head_dim", init=as_linear)
    if gated:
        operands["g"] = Operand("batch heads len", lambda x: -F.softplus(x))
    return Recurrence(query_feature=unit, key_feature=unit, write="delta", operands=operands)
