"""Attention calibration (ACT): hidden attention sinks are turned down and what they held goes to the other tokens.

    a_t = mean over the queries i >= t of A_it,   S = {t > 0 : a_t > alpha / n},   A = causal softmax
    A'_it = beta A_it for t in S,   A'_it = A_it (1 + (1 - beta) sum_{S} A_i / sum_{not S} A_i) for the others

so rows keep their sum and token 0, the sink that models need, is never turned down. It is done to chosen heads of a
trained model: those for which it alone raises accuracy on a few samples. S comes from the whole map of a prompt.

Yu, Wang, Fu, Shi, Shaikh, Lin. "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models
without Training through Attention Calibration." 2024. arXiv:2406.15765. The released code compares a_t with a constant.
"""

import math

import torch

from manyheads.core import Function, Law, mechanism
from manyheads.core.maps import attention_map, read


def reference(q, k, v, *, alpha=5.0, threshold=None, beta=0.4, heads=None):
    n, q_len = k.shape[-2], q.shape[-2]
    maps = q.new_zeros(*q.shape[:3], n)
    for i in range(q_len):
        seen = n - q_len + i + 1
        maps[:, :, i, :seen] = torch.softmax(q[:, :, i : i + 1] @ k[:, :, :seen].mT / q.shape[-1] ** 0.5, -1)[:, :, 0]
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            a = maps[b, h]
            sinks = []
            for t in range(1, n):
                asked = [a[i, t] for i in range(q_len) if n - q_len + i >= t]
                limit = alpha / n if threshold is None else threshold
                if (heads is None or h in heads) and sum(asked) / len(asked) > limit:
                    sinks.append(t)
            others = [t for t in range(n) if t not in sinks]
            for row in a:
                taken = (1 - beta) * row[sinks].sum()
                changed = torch.stack(
                    [beta * row[t] if t in sinks else row[t] + taken * row[t] / row[others].sum() for t in range(n)]
                )
                out.append(changed @ v[b, h])
    return torch.stack(out).view(*q.shape[:3], -1)


@mechanism(
    reference=reference,
    arxiv="2406.15765",
    system="act-attention-calibration",
    examples=({"alpha": 1.5}, {"threshold": 0.2, "beta": 0.1, "heads": (0, 2)}),
    laws=(
        Law({"alpha": 0.0, "beta": 1.0}, "causal"),
        Law({"threshold": 1.0}, "causal"),
        Law({"alpha": 0.0, "heads": ()}, "causal"),
    ),
    sees_future="which tokens are sinks is decided by the whole attention map",
    ranges={"beta": (0.0, 1.0), "threshold": (0.0, math.inf)},
)
def attention_calibration(
    alpha: float = 5.0, threshold: float | None = None, beta: float = 0.4, heads: tuple | None = None
) -> Function:
    """Sinks receive `alpha` times the average (or more than `threshold`) and keep the share `beta`, in `heads`
    (None: all)."""

    def forward(q, k, v, *, scale):
        q_len, n = q.shape[2], k.shape[2]
        a = attention_map(q, k, scale, causal=True)
        t = torch.arange(n, device=q.device)
        askers = torch.clamp(n - t, max=q_len)
        sink = (a.sum(2) / askers > (alpha / n if threshold is None else threshold)) & (t > 0)
        if heads is not None:
            sink &= torch.isin(torch.arange(q.shape[1], device=q.device), torch.tensor(heads, device=q.device))[:, None]
        sink = sink[:, :, None].to(a.dtype)
        kept = a * (1 - sink)
        taken = (1 - beta) * (a * sink).sum(-1, keepdim=True)
        # Token 0 is kept, so only a query that sees no key has nothing left.
        left = kept.sum(-1, keepdim=True)
        return read(beta * a * sink + kept * (1 + taken / torch.where(left > 0, left, 1.0)), v)

    return Function(forward=forward)
