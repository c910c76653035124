"""The first few tokens, which soak up attention that has nowhere to go, and the latest ones.

    kept = {j : j < sinks} together with {j : j > i - (budget - sinks)}, i the latest position

Keys keep the rotary positions that they were written with. The paper numbers the kept tokens anew, from 0, which
matters once a text is longer than the model was trained for.

Xiao et al. "Efficient Streaming Language Models with Attention Sinks." 2023. arXiv:2309.17453.
"""

import torch

from manyheads.cache.policy import Policy, policy, whole_number


@policy(arxiv="2309.17453")
def sink_window(sinks: int = 4) -> Policy:
    """`sinks` first tokens; the rest of the budget is a window over the latest."""
    whole_number("sinks", sinks, 0)

    def score(c):
        j = c.kv_positions[:, :1]  # all heads keep the same
        return torch.where(j < sinks, torch.inf, j.float())

    return Policy(score=score, when="always", per_head=False, least=sinks + 1, name="sink_window")
