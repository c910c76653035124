"""Everything stays: the ordinary cache, which the others are measured against.

    kept = {0, 1, ..., n - 1}

Shazeer. "Fast Transformer Decoding: One Write-Head is All You Need." 2019. arXiv:1911.02150.
"""

import torch

from manyheads.cache.policy import Policy, policy


@policy(arxiv="1911.02150")
def keep_all() -> Policy:
    """Needs no budget."""
    return Policy(
        score=lambda c: torch.ones(c.kv_positions.shape[0], 1, c.kv_positions.shape[2], device=c.k.device),
        when="never", per_head=False, name="keep_all",
    )  # fmt: skip
