"""A memory that learns while it is read: a small network whose weights take a step of gradient descent for each token.

    M(x) = W_L silu(... silu(W_1 x)),   l_t(M) = |M(k_t) - v_t|^2
    S_t = eta_t S_{t-1} - theta_t grad l_t(M'),   M_t = (1 - alpha_t) M_{t-1} + S_t,   y_t = M_t(q_t)

with M' the memory before the chunk that token t is in. No token has weights of its own here: within a chunk, the
gradient of a layer is the product of the layer's input a_i and an error d_i, so that M_t x is

    A_t M' x + B_t S' x - sum_{i <= t} C_ti theta_i (a_i . x) d_i

with A, B and C made of products of 1 - alpha and eta alone: one linear attention for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """The weights of each layer and their momenta S, all [batch, heads, width in, width out]."""

    weights: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]


def recall(memory: Memory, x: Tensor) -> Tensor:
    """M(x) for x [batch, heads, len, width]; nothing is learned."""
    for weight in memory.weights[:-1]:
        x = F.silu(x @ weight)
    return x @ memory.weights[-1]


def memorise(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, keep: Tensor, carry: Tensor | None, chunk: int
) -> tuple[Tensor, Memory]:
    """(y, the memory behind the last token), of tokens q, k, v [batch, heads, len, width].

    theta, keep, carry: step sizes, log(1 - alpha) and log(eta), [batch, heads, len]; carry None stands for eta = 0.
    """
    out = []
    for start in range(0, q.shape[2], chunk):
        cut = slice(start, start + chunk)
        y, memory = _chunk(
            memory, q[:, :, cut], k[:, :, cut], v[:, :, cut], theta[:, :, cut], keep[:, :, cut],
            None if carry is None else carry[:, :, cut],
        )  # fmt: skip
        out.append(y)
    return (torch.cat(out, 2) if out else torch.zeros_like(v)), memory


def _chunk(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, keep: Tensor, carry: Tensor | None
) -> tuple[Tensor, Memory]:
    inputs, errors = _gradients(memory.weights, k, v)
    kept = _products(keep)
    if carry is None:
        carried, fading = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand_as(kept), torch.zeros_like(keep)
    else:
        carried, fading = _products(carry), carry.cumsum(-1).exp()
    of_weights = keep.cumsum(-1).exp()[..., None]  # A, and B and C behind it
    of_momenta = kept @ fading[..., None]
    written = kept @ carried * theta[:, :, None]
    last_momenta = (carried[:, :, -1] * theta)[..., None]

    weights, momenta, y = [], [], q
    for n, (a, d, weight, momentum) in enumerate(zip(inputs, errors, memory.weights, memory.momenta, strict=True)):
        y = y if n == 0 else F.silu(y)
        y = of_weights * (y @ weight) + of_momenta * (y @ momentum) - ((y @ a.mT) * written) @ d
        grown = a.mT @ (written[:, :, -1, :, None] * d)
        weights.append(of_weights[:, :, -1:] * weight + of_momenta[:, :, -1:] * momentum - grown)
        momenta.append(fading[:, :, -1, None, None] * momentum - a.mT @ (last_momenta * d))
    return y, Memory(tuple(weights), tuple(momenta))


def _gradients(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer the inputs a_i and the errors d_i [batch, heads, len, width], whose products a_i d_i^T are the
    gradients of |M(k_i) - v_i|^2."""
    inputs, slopes = [k], []
    for weight in weights[:-1]:
        z = inputs[-1] @ weight
        gate = torch.sigmoid(z)
        inputs.append(z * gate)
        slopes.append(gate * (1 + z * (1 - gate)))
    errors = [2 * (inputs[-1] @ weights[-1] - v)]
    for weight, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        errors.insert(0, (errors[0] @ weight.mT) * slope)
    return inputs, errors


def _products(logs: Tensor) -> Tensor:
    """P_ti = exp(sum of logs over i < r <= t), 0 for i > t: [..., len, len] of [..., len]."""
    total = logs.cumsum(-1)
    apart = total[..., :, None] - total[..., None, :]
    seen = torch.ones(apart.shape[-2:], dtype=torch.bool, device=logs.device).tril()
    return apart.masked_fill(~seen, -torch.inf).exp()
