"""Adaptive sparse attention: each head learns how many of its weights are exactly zero.

    o_i = sum_j entmax_j(q_i . k_j / sqrt(d); alpha_h) v_j,   alpha_h = 1 + sigmoid(a_h)
    entmax_j(s; alpha) = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)),   tau such that the weights sum to 1

between softmax at alpha = 1 and sparsemax at 2, with a gradient for alpha: self-attention over a whole utterance.

Zhao, Wang, Wei, et al. "Adaptive Sparse and Monotonic Attention for Transformer-based Automatic Speech Recognition."
2022. arXiv:2209.15176. Only its abstract was at hand: the learned entmax is that of Correia, Niculae, Martins
(arXiv:1909.00015). The paper's other half is `monotonic_attention`.
"""

import torch

from manyheads.core import Law, Operand, Scores, mechanism


def reference(q, k, v, *, alpha):
    above, out = alpha[:, None] - 1, []
    for i in range(q.shape[-2]):
        s = above * (q[..., i, None, :] * k).sum(-1) / q.shape[-1] ** 0.5
        with torch.no_grad():
            low = s.amax(-1, keepdim=True) - 1
            high = low + 1
            for _ in range(60):
                tau = (low + high) / 2
                heavy = (torch.relu(s - tau) ** (1 / above)).sum(-1, keepdim=True) >= 1
                low, high = torch.where(heavy, tau, low), torch.where(heavy, high, tau)
            inside = s > low
            slope = ((s - low).where(inside, 1.0) ** (1 / above - 1) / above).where(inside, 0.0).sum(-1, keepdim=True)
        # A step of Newton's at the root moves tau by nothing, and gives it the derivatives of an implicit function.
        tau = low + ((torch.relu(s - low) ** (1 / above)).sum(-1, keepdim=True) - 1) / slope
        out.append((torch.relu(s - tau) ** (1 / above))[..., None, :] @ v)
    return torch.cat(out, -2)


def above_one(a):
    return 1 + torch.sigmoid(a)


@mechanism(
    reference=reference,
    arxiv="2209.15176",
    system="adaptive-sparse-monotonic-asr",
    laws=(Law({}, "entmax_attention", {"alpha": 1.5}),),
    causal=False,
    trained=True,
)
def adaptive_sparse_attention() -> Scores:
    """Entmax over all keys, its alpha learned for each head; it starts at 1.5."""
    return Scores(normaliser="entmax", alpha="alpha", operands={"alpha": Operand("heads", above_one)})
