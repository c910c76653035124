"""Adaptive filter attention, isotropic: a key is carried to the query's time by a noisy linear system, then compared.

    E_ij = exp(-mu (i - j)),   V_ij = sigma2 (1 - E_ij^2) / (2 mu) + eta2 E_ij^2 + gamma2
    R_ij = |q_i|^2 + E_ij^2 |k_j|^2 - 2 E_ij q_i . k_j
    s_ij = -tau^2 (log V_ij + log(1 + R_ij / (nu d V_ij))),   A = softmax_{j <= i}(s)
    o_i = sum_{j <= i} A_ij E_ij turn(i - j) v_j

for each head: decay mu, variance V of what the system (sigma2), the key (eta2) and the query (gamma2) add as noise, and
squared distance R. d counts complex channels, two real ones each. q and k come turned by their positions, as by rotary
embeddings; turn does the same to the values: the system's rotation. With noise "gaussian" log(1 + x) is x: without
decay and process noise, and with keys of one length, this is then softmax attention.

Racioppo. "Attention as an Adaptive Filter." 2025. arXiv:2509.04154. The residual, its gate and the prediction of the
next step are a layer's.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Function, Operand, mechanism
from manyheads.core.maps import read, score_map, softmax_of_past
from manyheads.core.names import unknown

NOISES = ("student", "gaussian")


def reference(q, k, v, *, mu, sigma2, eta2, gamma2, nu, tau, noise="student", theta=10000.0):
    n, half = k.shape[-2], v.shape[-1] // 2
    speed = torch.tensor([theta ** (-c / half) for c in range(half)], dtype=torch.float64)
    out = []
    for i in range(n - q.shape[-2], n):
        s, values = [], []
        for j in range(i + 1):
            e = torch.exp(-mu * (i - j))
            variance = sigma2 * (1 - e**2) / (2 * mu) + eta2 * e**2 + gamma2
            apart = q[..., i - n + q.shape[-2], :] - e[:, None] * k[..., j, :]
            x = (apart**2).sum(-1) / (nu * (q.shape[-1] / 2) * variance)
            s.append(-(tau**2) * (torch.log(variance) + (torch.log(1 + x) if noise == "student" else x)))
            cos, sin = torch.cos(speed * (i - j)).to(v.dtype), torch.sin(speed * (i - j)).to(v.dtype)
            a, b, alone = v[..., j, :half], v[..., j, half : 2 * half], v[..., j, 2 * half :]
            values.append(e[:, None] * torch.cat([a * cos - b * sin, a * sin + b * cos, alone], -1))
        out.append(torch.softmax(torch.stack(s, -1), -1)[..., None, :] @ torch.stack(values, -2))
    return torch.cat(out, -2)


def slow(mu):
    return mu.fill_(-4.0)


def ones(tau):
    return tau.fill_(1.0)


def inverse_pairs(head_dim):
    return 2 / head_dim


@mechanism(
    reference=reference,
    arxiv="2509.04154",
    system="adaptive-filter-attention",
    examples=({}, {"noise": "gaussian", "theta": 100.0}),
    trained=True,
    ranges={"theta": (1.0, float("inf"))},
)
def adaptive_filter_attention(noise: str = "student", theta: float = 10000.0) -> Function:
    """`noise` is "student", which forgives outliers, or "gaussian"; values turn at speeds theta^(-c / pairs)."""
    if noise not in NOISES:
        raise ValueError(unknown("noise", noise, NOISES))

    def forward(q, k, v, *, scale, mu, sigma2, eta2, gamma2, nu, tau):
        wide, q_len, n = torch.promote_types(q.dtype, torch.float32), q.shape[2], k.shape[2]
        mu, sigma2, eta2, gamma2, nu, tau = (x.to(wide)[:, None, None] for x in (mu, sigma2, eta2, gamma2, nu, tau))
        j = torch.arange(n, device=q.device, dtype=wide)
        i = torch.arange(n - q_len, n, device=q.device, dtype=wide)
        steps = (i[:, None] - j).clamp(min=0)
        e, variance = torch.exp(-mu * steps), propagated(steps, mu, sigma2, eta2, gamma2)
        lengths = (k.to(wide).square().sum(-1)).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        distance = q.to(wide).square().sum(-1, keepdim=True) + e.square() * lengths - 2 * e * score_map(q, k, 1.0)
        x = scale * distance / (nu * variance)
        s = -tau.square() * (variance.log() + (x.log1p() if noise == "student" else x))
        found = read(softmax_of_past(s) * e, turned(v.to(wide), -j, theta))
        return turned(found, i, theta).to(v.dtype)

    positive = Operand("heads", F.softplus)
    operands = {"mu": Operand("heads", F.softplus, slow), **dict.fromkeys(("sigma2", "eta2", "gamma2", "nu"), positive)}
    return Function(
        forward=forward, operands={**operands, "tau": Operand("heads", init=ones)}, default_scale=inverse_pairs
    )  # fmt: skip


def propagated(steps, mu, sigma2, eta2, gamma2):
    """V: what dV = (sigma2 - 2 mu V) dt makes of eta2 in time, and gamma2."""
    rate = 2 * mu.clamp(min=1e-30)  # without decay the first term is sigma2 * steps, which this gives exactly
    return sigma2 * -torch.expm1(-rate * steps) / rate + eta2 * torch.exp(-rate * steps) + gamma2


def turned(x, at, theta):
    """Channels c and c + pairs as a complex number, turned by at theta^(-c / pairs); an odd one stays as it is."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    cos, sin = (at[:, None] * speed).cos(), (at[:, None] * speed).sin()
    a, b, alone = x.split((half, half, x.shape[-1] % 2), -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, alone], -1)
