"""ByTheWay (BroadWay): a video model's temporal attention is pulled towards an earlier block's and made livelier.

    A = softmax(q k^T / sqrt(d)),   G = softmax(q' k'^T / sqrt(d')),   B = A + alpha (G - A)
    E(X) = mean over heads and rows of sum_f X_f^2 = low(X) + high(X)
    b = max(beta, sqrt((E(A) - low(B)) / high(B))),   C = iDFT(b on high frequencies, 1 on low ones, of DFT(B))
    o_i = sum_j C_ij / (sum_f C_if) v_j

with q', k' the frames of the first decoder block at the same place, resized. Frequencies f with |f - F // 2| <= tau are
high; low and high are their parts of the energy, by Parseval. The paper leaves A as it is after the first fifth of the
denoising steps. Weights of C may be negative.

Tokens are frames, a row of the batch is one video and heads are the heads of all its places, as the energy is a mean
over them. The released code takes the energy of the video with the prompt for the one without it too.

Bu, Ling, Zhang, et al. "ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free Way."
2024. arXiv:2410.06241.
"""

import math

import torch

from manyheads.core import Function, Operand, mechanism
from manyheads.core.maps import attention_map, read


def reference(q, k, v, *, guide_q, guide_k, alpha=0.6, beta=1.5, tau=7):
    n, q_len = k.shape[-2], q.shape[-2]
    a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    guide = torch.softmax(guide_q[..., n - q_len :, :] @ guide_k.mT / guide_q.shape[-1] ** 0.5, -1)
    mixed = a + alpha * (guide - a)
    waves = []  # of each frequency: what it adds to every frame, by its real part
    for f in range(n):
        angle = 2 * math.pi * f * torch.arange(n, dtype=q.dtype) / n
        cos, sin = (mixed * angle.cos()).sum(-1, keepdim=True), (mixed * angle.sin()).sum(-1, keepdim=True)
        waves.append(((cos * angle.cos() + sin * angle.sin()) / n, (cos**2 + sin**2).mean((1, 2)) / n))
    high = [abs(f - n // 2) <= tau for f in range(n)]
    high_energy = sum(energy for (_, energy), is_high in zip(waves, high, strict=True) if is_high)
    low_energy = sum((energy for (_, energy), is_high in zip(waves, high, strict=True) if not is_high), 0 * high_energy)
    ratio = ((a**2).sum(-1).mean((1, 2))[:, None] - low_energy) / high_energy
    b = torch.where(ratio > beta**2, ratio.clamp(min=beta**2).sqrt(), beta)[..., None, None]
    c = torch.stack([wave * b if is_high else wave for (wave, _), is_high in zip(waves, high, strict=True)]).sum(0)
    return c / c.sum(-1, keepdim=True) @ v


@mechanism(
    reference=reference,
    arxiv="2410.06241",
    system="bytheway-broadway",
    examples=({"tau": 2}, {"alpha": 1.0, "beta": 1.0, "tau": 1}),
    causal=False,
    ranges={"alpha": (0.0, 1.0), "beta": (1.0, math.inf), "tau": (0, math.inf)},
)
def bytheway(alpha: float = 0.6, beta: float = 1.5, tau: int = 7) -> Function:
    """`alpha` of the way to the guiding map, then 2 `tau` + 1 frequencies times `beta` or what restores the energy."""

    def forward(q, k, v, *, scale, guide_q, guide_k):
        n, q_len = k.shape[2], q.shape[2]
        a = attention_map(q, k, scale)
        guide = attention_map(guide_q[:, :, n - q_len :], guide_k, guide_q.shape[-1] ** -0.5)
        waves = torch.fft.fft(a + alpha * (guide - a), dim=-1)
        energy = waves.abs().square().mean((1, 2)) / n
        high = (torch.arange(n, device=q.device) - n // 2).abs() <= tau
        missing = a.square().sum(-1).mean((1, 2)) - energy[:, ~high].sum(-1)
        there = energy[:, high].sum(-1)
        # A uniform map has high frequencies by rounding alone, and nothing could restore its energy from them.
        weaker = (missing > beta**2 * there) & (there > torch.finfo(a.dtype).eps * energy.sum(-1))
        # The square root of what is not taken must not reach 0, where it has no gradient.
        restoring = torch.where(weaker, missing / torch.where(weaker, there, 1.0), 1.0).sqrt()
        b = torch.where(weaker, restoring, beta)[:, None, None, None]
        c = torch.fft.ifft(torch.where(high, b, 1.0) * waves, dim=-1).real
        return read(c / c.sum(-1, keepdim=True), v)

    dims = "batch heads len head_dim"
    # A layer's projections start at 0, where a product of two has no gradient: one of them starts at 1.
    return Function(forward=forward, operands={"guide_q": Operand(dims, lambda x: 1 + x), "guide_k": Operand(dims)})
