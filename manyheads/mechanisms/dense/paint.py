"""PAINT: a trained vision-language model's scores on informed image tokens are raised while it generates.

    s_ij = q_i . k_j / sqrt(d)
    s'_ij = s_ij + (alpha local_j + beta summary_j) |s_ij| for i >= prompt - 1, s_ij for earlier queries
    o_i = sum_{j <= i} softmax_j(s'_ij) v_j

with local_j = 1 for image tokens with details, summary_j = 1 for those with the gist, and no token both:
`informed_tokens` finds them in the vision encoder. The paper raises scores in some layers of the language model, there
in all heads.

Arif, Dip, Hussain, Zhang, Thomas. "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
Vision-Language Model." 2025. arXiv:2501.12206.
"""

import torch

from manyheads.core import Operand, Scores, mechanism


def reference(q, k, v, *, local, summary, alpha=0.7, beta=0.3, prompt=1):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        seen = slice(0, offset + i + 1)
        s = q[..., i : i + 1, :] @ k[..., seen, :].mT / q.shape[-1] ** 0.5
        if offset + i >= prompt - 1:
            s = s + (alpha * local + beta * summary)[:, None, None, seen] * s.abs()
        out.append(torch.softmax(s, dim=-1) @ v[..., seen, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2501.12206",
    system="paint-vlm-attention",
    examples=({}, {"alpha": 0.4, "beta": 1.5, "prompt": 4}),
)
def paint(alpha: float = 0.7, beta: float = 0.3, prompt: int = 1) -> Scores:
    """Scores of `local` tokens rise by `alpha` of their size, of `summary` tokens by `beta`, from the last token of a
    prompt of `prompt` tokens on."""

    def raised(s, b, h, i, j, local, summary):
        gain = alpha * local[b, j] + beta * summary[b, j]
        return torch.where(i >= prompt - 1, s + gain * abs(s), s)

    membership = Operand("batch len", torch.sigmoid)
    return Scores(
        mask=lambda b, h, i, j: j <= i,
        score=raised,
        operands={"local": membership, "summary": membership},
    )


def informed_tokens(early: torch.Tensor, late: torch.Tensor, share: float = 0.25) -> tuple[torch.Tensor, torch.Tensor]:
    """(local, summary), bool [tokens], from the attention that a vision encoder's class token pays to image tokens.

    early, late: [heads, tokens], in the encoder's first layer and in the last but one. Local are the best `share` of
    the first without summary tokens; summary are the outliers of the second, above the third quartile by more than
    one and a half times the distance between the quartiles.
    """
    early, late = early.sum(0), late.sum(0)
    low, high = late.float().quantile(0.25), late.float().quantile(0.75)
    summary = late > high + 1.5 * (high - low)
    local = torch.zeros_like(summary)
    local[early.topk(int(share * len(early))).indices] = True
    return local & ~summary, summary
