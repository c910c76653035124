"""Re-ttention: a denoising step reads a window, weighed as in the last full step, and adds what else that one saw.

    o_i = rho_i sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d)) v_j + R_i
    S_i = {j : |i - j| <= reach, or i or j < text}
    at a full step:   rho_i = sum_{S_i} exp(s_ij) / sum_j exp(s_ij),   R_i = o_i(full) - rho_i o_i(window)

A softmax over a window gives its keys more than they have among all keys; rho gives back their share, and R is what the
others held. Both come from a step of full attention (`cache`), which they reproduce exactly, and serve 4 more steps.
After each of these rho grows by 0.04 (`ramp`), as the share does while a picture clears up; as in the released code it
may grow beyond 1. The first steps, 5 of 20 or 15 of 50, are full.

Defaults: 1/32 of 4096 tokens. Text stands before the picture or video, and sees and is seen by all.

Chen, Mills, Jiang, Gao, Niu. "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape." 2025.
arXiv:2505.22918.
"""

import math

import torch

from manyheads.core import Function, Operand, Scores, Sum, mechanism


def reference(q, k, v, *, rho, residual, reach=64, text=0):
    n, out = k.shape[-2], []
    for i in range(n - q.shape[-2], n):
        seen = [j for j in range(n) if abs(i - j) <= reach or min(i, j) < text]
        w = torch.softmax(q[..., i - n, None, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5, dim=-1)
        out.append(rho[..., i, None, None] * (w @ v[..., seen, :]) + residual[..., i, None, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2505.22918",
    system="re-ttention",
    examples=({"reach": 2, "text": 1}, {"reach": 0}),
    causal=False,
    ranges={"reach": (0, math.inf), "text": (0, math.inf)},
)
def re_ttention(reach: int = 64, text: int = 0) -> Sum:
    """A window of `reach` keys on either side, and the first `text` tokens; rho and residual as `cache` gives them."""

    def others(q, k, v, *, scale, residual):
        return residual[:, :, k.shape[2] - q.shape[2] :]

    rho, residual = Operand("batch heads len", torch.sigmoid), Operand("batch heads len v_head_dim")
    window = Scores(mask=lambda b, h, i, j: ((i - j).abs() <= reach) | (i < text) | (j < text))
    rest = Function(forward=others, operands={"residual": residual})
    return Sum(parts=(window, rest), gates=("rho", None), operands={"rho": rho, "residual": residual})


def cache(q, k, v, attend, **settings):
    """A full step's o, and its {rho, residual} for the steps that follow; attend is `manyheads.attention`."""
    form = re_ttention(**settings)
    assert isinstance(form, Sum)
    o, whole = attend(q, k, v, "full", return_lse=True)
    window, part = attend(q, k, v, form.parts[0], return_lse=True)
    rho = (part - whole).exp()
    return o, {"rho": rho, "residual": o - rho[..., None].to(o.dtype) * window}


def ramp(statistics, step=0.04):
    """The statistics for one step later."""
    return {**statistics, "rho": statistics["rho"] + step}
