"""MoH: some heads speak for every token, and of the others each token chooses a few.

    out = sum_i g_i H_i W_O^i,   H_i the output of head i, W_O^i its rows of the output projection
    g_i = a_1 S softmax(W_s x)_i                                           for the S shared heads
    g_i = a_2 K softmax(W_r x)_i / (sum of the K greatest)                 for the K routed heads of greatest softmax
    [a_1, a_2] = 2 softmax(W_h x),   and g_i = 0 for all other heads

The factors S, K and 2 and the division are those of the authors' code, which starts with gates around 1; the paper
writes the softmaxes alone. All heads are computed, so nothing is saved here: the gates are what is published.
Loss: load_balance = E sum_i f_i P_i over the E routed heads, f_i the share of tokens that chose head i, P_i the mean of
softmax(W_r x)_i; the paper weights it 0.01.

Jin, Zhu, Yuan, Yan. "MoH: Multi-Head Attention as Mixture-of-Head Attention." 2024. arXiv:2410.11842.
"""

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of
from manyheads.nn import Attention


def reference(module, x):
    a, shared, top_k = module.attention, module.shared, module.top_k
    rows = []
    for row in x:
        heads, tokens = heads_of(a, row), []
        for t, x_t in enumerate(row):
            among_shared = torch.softmax(module.to_shared.weight @ x_t, 0)
            among_routed = torch.softmax(module.to_routed.weight @ x_t, 0)
            chosen = sorted(range(len(among_routed)), key=lambda i: -among_routed[i].item())[:top_k]
            chosen_sum = sum(among_routed[i] for i in chosen)
            a_1, a_2 = 2 * torch.softmax(module.to_kinds.weight @ x_t, 0)
            gates = {i: a_1 * shared * among_shared[i] for i in range(shared)}
            gates |= {shared + i: a_2 * top_k * among_routed[i] / chosen_sum for i in chosen}
            parts = [g * (a.o.weight.chunk(a.heads, 1)[i] @ heads[i, t]) for i, g in gates.items()]
            tokens.append(torch.stack(parts).sum(0))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def reference_losses(module, x):
    shares = [torch.softmax(module.to_routed.weight @ x_t, 0) for row in x for x_t in row]
    total = x.new_zeros(())
    for i in range(len(shares[0])):
        chosen = sum(sum((p > p[i]).tolist()) < module.top_k for p in shares) / len(shares)
        total = total + len(shares[0]) * chosen * sum(p[i] for p in shares) / len(shares)
    return {"load_balance": total}


def even_gates():
    """With every head active and routers of zero each gate is 1: multi-head attention."""
    module = MoH(12, 6, shared=2, top_k=4)
    for router in (module.to_shared, module.to_routed, module.to_kinds):
        nn.init.zeros_(router.weight)
    return module, module.attention


@layer(
    reference=reference,
    losses=reference_losses,
    arxiv="2410.11842",
    system="moh",
    examples=(
        {"dim": 12, "heads": 6, "shared": 2, "top_k": 2},
        {"dim": 10, "heads": 5, "shared": 2, "top_k": 2, "kv_heads": 1},
    ),
    laws=(even_gates,),
)
class MoH(nn.Module):
    """`shared` heads always speak; of the others each token takes `top_k`. Further settings are those of Attention."""

    def __init__(self, dim: int, heads: int, *, shared: int, top_k: int, mechanism: str = "causal", **settings: Any):
        super().__init__()
        self.attention = Attention(dim, heads, mechanism, **settings)
        if not (shared >= 1 and 1 <= top_k <= heads - shared):
            raise ValueError(f"shared={shared} and top_k={top_k} must be at least 1, and no more than {heads} together")
        self.shared, self.top_k = shared, top_k
        self.to_shared = nn.Linear(dim, shared, bias=False)
        self.to_routed = nn.Linear(dim, heads - shared, bias=False)
        self.to_kinds = nn.Linear(dim, 2, bias=False)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        heads = self.attention.attend(x, present=present).transpose(1, 2)
        return self.attention.o((self.gates(x)[..., None] * heads).flatten(2))

    def gates(self, x: Tensor) -> Tensor:
        """How loud each head is, [batch, len, heads]."""
        routed, chosen = self.route(x)
        routed = self.top_k * routed * chosen / (routed * chosen).sum(-1, keepdim=True)
        shared = self.shared * self.to_shared(x).softmax(-1)
        kinds = 2 * self.to_kinds(x).softmax(-1)
        return torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * routed], -1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax over the routed heads, and 1 for those that a token takes, else 0."""
        shares = self.to_routed(x).softmax(-1)
        return shares, torch.zeros_like(shares).scatter(-1, shares.topk(self.top_k, -1).indices, 1.0)

    def losses(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        shares, chosen = self.route(x if present is None else x[present])
        p, f = (t.reshape(-1, t.shape[-1]).mean(0) for t in (shares, chosen))
        return {"load_balance": len(p) * (f * p).sum()}
