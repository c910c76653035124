"""Agent attention: a few agent tokens, pooled from the queries, read the values for all the others.

    A = pool(Q),   V_A = softmax(A K^T / sqrt(d)) V,   O = softmax(Q A^T / sqrt(d)) V_A

with A [agents, d] the averages over `agents` equal runs of queries. The paper pools an image's queries over a square
grid, adds position biases inside both softmaxes and a depthwise convolution of V to the output: these know rows and
columns of pixels and belong to the vision block.

Han, Ye, Han, et al. "Agent Attention: On the Integration of Softmax and Linear Attention." 2023. arXiv:2312.08874.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Function, mechanism


def reference(q, k, v, *, agents=49):
    n, d = q.shape[-2:]
    # Run a holds the queries from floor(a n / agents) up to ceil((a + 1) n / agents), as adaptive pooling has it.
    runs = [slice(a * n // agents, -(-(a + 1) * n // agents)) for a in range(agents)]
    agent = torch.stack([q[..., run, :].mean(-2) for run in runs], -2)
    read = torch.cat([torch.softmax(a @ k.mT / d**0.5, -1) @ v for a in agent.split(1, -2)], -2)
    return torch.cat([torch.softmax(q_i @ agent.mT / d**0.5, -1) @ read for q_i in q.split(1, -2)], -2)


@mechanism(
    reference=reference,
    arxiv="2312.08874",
    system="agent-attention",
    examples=({"agents": 4}, {"agents": 1}),
    causal=False,
    trained=True,
)
def agent_attention(agents: int = 49) -> Function:
    """`agents` tokens stand between queries and keys."""

    def forward(q, k, v, *, scale):
        a = F.adaptive_avg_pool1d(q.flatten(0, 1).mT, agents).mT.unflatten(0, q.shape[:2])
        read = F.scaled_dot_product_attention(a, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return F.scaled_dot_product_attention(q, a, read, scale=scale)

    return Function(forward=forward)
