"""Knocking-heads attention: before heads attend, one matrix that all of them share mixes their channels.

    v_i = 2 ((u T_up) * sigmoid(u T_gate)) T_down,   u = x W_V^i                     (KHA-MLP)
    q_i = x W_Q^i T_Q,   k_i = x W_K^i T_K,   v_i = x W_V^i T_V                       (KHA-Linear)

All T are d x d, d the size of a head. They start as the identity, T_gate as 0, so training starts from plain attention.
The linear ones can be multiplied into the projections once training is done. The paper finds that the values' T matters
most, and prefers the MLP.

Zhou, Chen, Chen, Lan, Li. "Knocking-Heads Attention." 2025. arXiv:2510.23052.
"""

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import heads_of
from manyheads.nn import Attention


def reference(module, x):
    t = module.t

    def change(q, k, v):
        if not module.mlp:
            return [torch.einsum("hnd,de->hne", z, t[name]) for z, name in ((q, "q"), (k, "k"), (v, "v"))]
        heads = []
        for head in v:
            up, gate = head @ t["up"], head @ t["gate"]
            heads.append(2 * (up / (1 + torch.exp(-gate))) @ t["down"])
        return q, k, torch.stack(heads)

    rows = [heads_of(module.attention, row, change) for row in x]
    return torch.stack([torch.cat(list(heads), -1) @ module.attention.o.weight.T for heads in rows])


def at_the_start():
    """A new module equals its attention without knocking."""
    module = KnockingHeads(12, 3)
    return module, module.attention


def absorbed():
    """Linear matrices multiplied into the projections before them give plain attention again."""
    module = KnockingHeads(12, 3, mlp=False, kv_heads=1)
    plain = Attention(12, 3, kv_heads=1)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            t = module.t[name].normal_()
            theirs, ours = getattr(plain, name).weight, getattr(module.attention, name).weight
            theirs.copy_((t.T @ ours.unflatten(0, (-1, 4))).flatten(0, 1))
    plain.o = module.attention.o
    return module, plain


def weights(dim, heads, mlp=True, kv_heads=None, rope_theta=None):
    d = dim // heads
    return 2 * dim * d * (heads + (kv_heads or heads)) + 3 * d**2


@layer(
    reference=reference,
    arxiv="2510.23052",
    system="knocking-heads",
    examples=(
        {"dim": 12, "heads": 3},
        {"dim": 12, "heads": 4, "mlp": False, "kv_heads": 2, "rope_theta": None},
    ),
    laws=(at_the_start, absorbed),
    weights=weights,
)
class KnockingHeads(nn.Module):
    """mlp: KHA-MLP, or else KHA-Linear. Further settings are those of Attention."""

    def __init__(self, dim: int, heads: int, *, mlp: bool = True, mechanism: str = "causal", **settings: Any):
        super().__init__()
        self.attention = Attention(dim, heads, mechanism, **settings)
        self.mlp, d = mlp, self.attention.head_dim
        names = ("up", "gate", "down") if mlp else ("q", "k", "v")
        self.t = nn.ParameterDict({name: torch.zeros(d, d) if name == "gate" else torch.eye(d) for name in names})

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        heads = self.attention.attend(x, present=present, change=self.knock)
        return self.attention.o(heads.transpose(1, 2).flatten(2))

    def knock(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = self.t
        if not self.mlp:
            return q @ t["q"], k @ t["k"], v @ t["v"]
        return q, k, 2 * ((v @ t["up"]) * torch.sigmoid(v @ t["gate"])) @ t["down"]
