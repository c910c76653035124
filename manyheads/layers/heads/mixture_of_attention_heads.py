"""Mixture of attention heads (MoA): each token picks k of N experts, which are query heads over shared keys and values.

    p = softmax(x W_g),   w_i = p_i / (sum of the k greatest p, without gradient)
    out = sum_i w_i softmax((x W_q^i) K^T / sqrt(d)) V W_o^i,   i the k experts of greatest p,   K = X W_k, V = X W_v

A token computes the query and output projections of its own experts alone, so parameters grow with N and work with k.
The authors' code leaves the division out and can add noise to x W_g in training; this follows the paper. Its layer
encodes no positions.
Losses: load_balance = N sum_i f_i P_i, f_i the share of choices that fell on expert i, P_i the mean of p_i;
router_z = mean of logsumexp(x W_g)^2. The paper weights them 0.01 and 0.001.

Zhang, Shen, Huang, Zhou, Rong, Xiong. "Mixture of Attention Heads: Selecting Attention Heads Per Token." 2022.
arXiv:2210.05144.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of


def reference(module, x):
    rows = []
    for row in x:
        k, v = (row @ p.weight.T for p in (module.k, module.v))
        tokens = []
        for t, x_t in enumerate(row):
            p = torch.softmax(module.router.weight @ x_t, 0)
            chosen = sorted(range(len(p)), key=lambda i: -p[i].item())[: module.top_k]
            total = sum(p[i].item() for i in chosen)
            y = 0.0
            for i in chosen:
                q = (module.q[i].T @ x_t).expand(1, t + 1, -1)  # of this many queries the last one sees all of t
                y = y + p[i] / total * (softmax_heads(q, k[None, : t + 1], v[None, : t + 1])[0, t] @ module.o[i])
            tokens.append(y)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def reference_losses(module, x):
    balance, z, n = x.new_zeros(()), x.new_zeros(()), len(module.q)
    tokens = x.flatten(0, 1)
    p = [torch.softmax(module.router.weight @ x_t, 0) for x_t in tokens]
    for i in range(n):
        hits = sum(sum((p_t > p_t[i]).tolist()) < module.top_k for p_t in p)
        balance = balance + n * hits / (len(p) * module.top_k) * sum(p_t[i] for p_t in p) / len(p)
    for x_t in tokens:
        z = z + (module.router.weight @ x_t).exp().sum().log() ** 2 / len(p)
    return {"load_balance": balance, "router_z": z}


def all_experts():
    """With every expert chosen by an even router, N times the output is multi-query attention of N heads."""
    module = MixtureOfAttentionHeads(10, experts=4, top_k=4, head_dim=6)
    plain = Attention(10, 4, kv_heads=1, head_dim=6, rope_theta=None)
    plain.k, plain.v = module.k, module.v
    with torch.no_grad():
        module.router.weight.zero_()
        plain.q.weight.copy_(module.q.transpose(1, 2).flatten(0, 1))
        plain.o.weight.copy_(module.o.flatten(0, 1).T / 4)
    return module, plain


@layer(
    reference=reference,
    losses=reference_losses,
    arxiv="2210.05144",
    system="mixture-of-attention-heads",
    examples=(
        {"dim": 10, "experts": 5, "top_k": 2, "head_dim": 6},
        {"dim": 8, "experts": 3, "top_k": 3, "head_dim": 4},
    ),
    laws=(all_experts,),
    weights=lambda dim, experts, top_k, head_dim: 2 * experts * dim * head_dim + 2 * dim * head_dim + dim * experts,
)
class MixtureOfAttentionHeads(nn.Module):
    """Causal. Weights of the experts: q [experts, dim, head_dim], o [experts, head_dim, dim]."""

    def __init__(self, dim: int, *, experts: int, top_k: int, head_dim: int = 256):
        super().__init__()
        if top_k > experts:
            raise ValueError(f"top_k={top_k} is more than there are experts ({experts})")
        self.dim, self.top_k = dim, top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.q = nn.Parameter(torch.empty(experts, dim, head_dim).normal_(std=dim**-0.5))
        self.k = nn.Linear(dim, head_dim, bias=False)
        self.v = nn.Linear(dim, head_dim, bias=False)
        self.o = nn.Parameter(torch.empty(experts, head_dim, dim).normal_(std=(top_k * head_dim) ** -0.5))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        p, chosen = self.router(x).softmax(-1).topk(self.top_k, -1)
        w = p / p.sum(-1, keepdim=True).detach()
        # A query head here is a token's first, second, ... choice; all read the one key and value head.
        q = by_expert(x[:, :, None].expand(-1, -1, self.top_k, -1), chosen, self.q).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        heads = attention(q, k, v, "causal", q_positions=positions, kv_positions=positions).transpose(1, 2)
        return (w[..., None] * by_expert(heads, chosen, self.o)).sum(2)

    def losses(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.router(x if present is None else x[present]).flatten(0, -2)
        p = logits.softmax(-1)
        hits = torch.bincount(p.topk(self.top_k, -1).indices.flatten(), minlength=p.shape[1])
        balance = p.shape[1] * (hits.to(p.dtype) / hits.sum() * p.mean(0)).sum()
        return {"load_balance": balance, "router_z": logits.logsumexp(-1).square().mean()}


def by_expert(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """x [..., d] times weight[chosen] [..., d, e]: one product for each expert, over the tokens that chose it."""
    flat, order = x.flatten(0, -2), chosen.flatten().argsort(stable=True)
    groups = flat[order].split(torch.bincount(chosen.flatten(), minlength=len(weight)).tolist())
    sorted_y = torch.cat([group @ w for group, w in zip(groups, weight, strict=True)])
    return torch.zeros_like(sorted_y).index_copy(0, order, sorted_y).unflatten(0, chosen.shape)
