"""The prompt's last queries vote for the tokens before them; clusters around the winners stay, head by head.

    a_j = sum_{i in the last `window` queries} softmax_j(scale q_i . k_j)
    kept = {j : j in the last `window`} together with the top (budget - window) of pool_{kernel}(a)_j

It works on the prompt, or on each part of a prompt that comes in parts; what is generated is added to what stayed.
Query heads that share a key head vote together: their attention is averaged, then pooled. The paper has no such groups;
there each query head keeps tokens of its own. The pool is the authors' default, a mean; for LongBench they take the
maximum over 7.

Li et al. "SnapKV: LLM Knows What You are Looking for Before Generation." 2024. arXiv:2404.14469.
"""

import torch
import torch.nn.functional as F

from manyheads.cache.policy import Policy, policy, whole_number


@policy(arxiv="2404.14469", system="snapkv")
def snapkv(window: int = 32, kernel: int = 5, pooling: str = "mean") -> Policy:
    """`window` queries vote; `kernel` neighbours share their votes by `pooling`, "mean" or "max"."""
    whole_number("window", window, 1)
    if whole_number("kernel", kernel, 1) % 2 == 0:
        raise ValueError(f"kernel must be odd, so that it has a middle, not {kernel}")
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling must be 'mean' or 'max', not {pooling!r}")
    pool = F.avg_pool1d if pooling == "mean" else F.max_pool1d

    def score(c):
        # A row's last queries, wherever its padding stands.
        i, at = c.q_positions.topk(min(window, c.q_positions.shape[1]), dim=-1)
        q = c.q.gather(2, at[:, None, :, None].expand(-1, c.q.shape[1], -1, c.q.shape[3]))
        batch, kv_heads, n, _ = c.k.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        s = q.to(wide).reshape(batch, kv_heads, -1, q.shape[3]) @ c.k.to(wide).mT * c.scale
        s = s.view(batch, kv_heads, -1, q.shape[2], n)
        i, j = i[:, None, None, :, None], c.kv_positions[:, :, None, None, :]
        seen = (j <= i) & (j >= 0)
        a = s.masked_fill(~seen, -torch.inf).softmax(-1)
        votes = torch.where(seen, a, 0.0).sum(-2).mean(2)  # absent queries see nothing: NaN, taken out here
        recent = c.kv_positions > c.q_positions.amax(-1)[:, None, None] - window
        pooled = pool(votes.masked_fill(recent, 0.0), kernel, stride=1, padding=kernel // 2)
        return pooled.masked_fill(recent, torch.inf)

    return Policy(score=score, when="prefill", per_head=True, least=window, name="snapkv")
