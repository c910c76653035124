"""Multi-token attention: scores are convolved over neighbouring queries and keys, weights are mixed among heads.

    A^_ij = q_i . k_j / sqrt(d) for j <= i, and 0 for later keys
    s_ij = sum_{a < c_q} sum_b kernel_ab A^_{i-a, j-b},   b = -floor(c_k / 2) ... ceil(c_k / 2) - 1
    A^h = softmax_{j <= i}(s^h),   o^h_i = sum_{h' in group(h)} mix_hh' sum_{j <= i} A^h'_ij v_j

in which a query's own head comes out when kernel and mix are the identity, as they start. Queries before the first
given one count as zeros, so a decoding step passes the c_q - 1 queries before it.

This is the paper's convolution before the softmax, with its two masks (equation 5), and head mixing after it; each can
also stand on the other side. Its code stores the kernel mirrored, as convolution layers do. The norm and gate of each
head are the layer's, and the paper convolves in every fourth layer only.

Golovneva, Wang, Weston, Sukhbaatar. "Multi-Token Attention." 2025. arXiv:2504.00927.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Function, Law, Operand, mechanism


def reference(q, k, v, *, kernel, mix, c_q=6, c_k=11, c_h=None):
    heads, q_len = q.shape[1:3]
    offset, group, out = k.shape[-2] - q_len, c_h or heads, []
    scores = q @ k.mT / q.shape[-1] ** 0.5
    for i in range(q_len):
        last, s = offset + i, []
        for j in range(last + 1):
            near = [(a, b) for a in range(min(c_q, i + 1)) for b in range(-(c_k // 2), -(-c_k // 2))]
            inside = [(a, b) for a, b in near if 0 <= j - b <= last - a]
            s.append(sum(kernel[:, a, b + c_k // 2] * scores[..., i - a, j - b] for a, b in inside))
        w = torch.stack(s, -1).softmax(-1)
        for h in range(heads):
            first = h // group * group
            mixed = (mix[h, :, None] * w[:, first : first + group]).sum(1)
            out.append(mixed[:, None] @ v[:, h, : last + 1])
    return torch.cat(out, 1).unflatten(1, (q_len, heads)).transpose(1, 2)


@mechanism(
    reference=reference,
    arxiv="2504.00927",
    system="multi-token-attention",
    examples=({"c_q": 3, "c_k": 5}, {"c_q": 2, "c_k": 4, "c_h": 2}),
    laws=(Law({"c_q": 3, "c_k": 5}, "causal"), Law({"c_q": 2, "c_k": 4, "c_h": 2}, "causal")),
    trained=True,
)
def multi_token_attention(c_q: int = 6, c_k: int = 11, c_h: int | None = None) -> Function:
    """A kernel of `c_q` queries by `c_k` keys; heads mix in groups of `c_h` (None: all, as in the paper's models)."""
    left = c_k // 2

    def own_score(kernel):
        return kernel.zero_()[:, 0, left].fill_(1.0)

    def own_head(mix):
        h = torch.arange(mix.shape[0])
        mix.zero_()[h, h % mix.shape[1]] = 1.0

    def forward(q, k, v, *, scale, kernel, mix):
        batch, heads, q_len, _ = q.shape
        kv_heads, n = k.shape[1:3]
        group = c_h or heads
        if heads % group:
            raise ValueError(f"multi_token_attention mixes groups of c_h={group} heads, which do not divide {heads}")
        seen = torch.ones(q_len, n, dtype=torch.bool, device=q.device).tril(n - q_len)
        # The queries that share a key head stand one below the other before it.
        scores = (q.reshape(batch, kv_heads, -1, q.shape[-1]) @ k.mT).view(batch, heads, q_len, n) * scale
        padded = F.pad(scores.masked_fill(~seen, 0.0), (c_k - 1 - left, left, c_q - 1, 0))
        s = F.conv2d(padded, kernel.to(q.dtype).flip(-2, -1)[:, None], groups=heads)
        # The lowest number, not -inf: a query before the first key would be NaN; it sees nothing instead.
        w = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
        mixed = mix.to(q.dtype).view(-1, group, group) @ w.view(batch, -1, group, q_len * n)
        return (mixed.view(batch, kv_heads, -1, n) @ v).view(batch, heads, q_len, -1)

    return Function(
        forward=forward,
        query_context=c_q - 1,
        operands={
            "kernel": Operand(f"heads {c_q} {c_k}", init=own_score),
            "mix": Operand(f"heads {c_h or 'heads'}", init=own_head),
        },
    )
