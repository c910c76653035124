"""Aaren: attention as a recurrent network, as each head asks the same learned question of every prefix.

    s_i = q . k_i / sqrt(d),   o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i)
    m_t = max(m_{t-1}, s_t),   o_t = w_t / u_t
    u_t = exp(m_{t-1} - m_t) u_{t-1} + exp(s_t - m_t),   w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t

with q = W_q p of one learned token p, and k, v of the tokens as ever. It equals causal softmax attention with that
query, and (m, u, w) is all that a stream keeps of its past. The pairs (u, w) are a recurrence with keys of one channel,
exp(s_t - m_t), and log decays m_{t-1} - m_t, which engines compute in chunks where the paper scans in a logarithmic
number of steps. m cancels, so no gradient goes through it. No positions are encoded.

Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori. "Attention as an RNN." 2024. arXiv:2405.13956.
"""

import torch
from torch import Tensor, nn

from manyheads.core import Operand, Recurrence, one
from manyheads.core.layer import layer
from manyheads.core.plain import cut
from manyheads.dispatch import attention
from manyheads.nn import Attention, from_front, positions_of, split, to_front

PREFIXES = Recurrence(normaliser="sum", default_scale=one, operands={"g": Operand("batch heads len")})


def reference(module, x):
    q = (module.q.weight @ module.query).view(module.heads, -1)
    rows = []
    for row in x:
        k, v = cut(row @ module.k.weight.T, module.heads), cut(row @ module.v.weight.T, module.heads)
        heads = []
        for h in range(module.heads):
            s = k[h] @ q[h] / q.shape[-1] ** 0.5
            heads.append(torch.stack([torch.softmax(s[: t + 1], 0) @ v[h, : t + 1] for t in range(len(row))]))
        rows.append(torch.cat(heads, -1) @ module.o.weight.T)
    return torch.stack(rows)


def one_query():
    """It is causal attention whose queries are all the same."""
    module, plain = Aaren(12, 3), Attention(12, 3, bias=True, rope_theta=None)
    nn.init.zeros_(plain.q.weight)
    for p in (plain.k, plain.v, plain.o):
        nn.init.zeros_(p.bias)
    with torch.no_grad():
        plain.q.bias.copy_(module.q(module.query))
    plain.k.weight, plain.v.weight, plain.o.weight = module.k.weight, module.v.weight, module.o.weight
    return module, plain


@layer(
    reference=reference,
    arxiv="2405.13956",
    system="aaren",
    examples=({"dim": 12, "heads": 3}, {"dim": 8, "heads": 1}),
    laws=(one_query,),
    weights=lambda dim, heads: 4 * dim**2 + dim,
)
class Aaren(nn.Module):
    """Causal."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads = dim, heads
        self.query = nn.Parameter(torch.randn(dim))
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        return from_front(self.stream(to_front(x, positions, n))[0], positions, n)

    def stream(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The next tokens x [batch, len, dim], at least one, after those that left this state: y, and the state behind
        them, (m [batch, heads, 1], (w, u) [batch, heads, 1, head_dim + 1]), in float32 or wider."""
        q = split(self.q(self.query)[None, None], self.heads)
        k, v = (split(p(x), self.heads) for p in (self.k, self.v))
        wide = torch.promote_types(k.dtype, torch.float32)
        s = (k.to(wide) * q.to(wide)).sum(-1) * k.shape[-1] ** -0.5
        before, past = state or (s[..., :1].detach(), None)
        m = torch.cat([before, s.detach()], -1).cummax(-1).values
        key, g = (s - m[..., 1:]).exp()[..., None], m[..., :-1] - m[..., 1:]
        o, past = attention(torch.ones_like(key), key, v.to(wide), PREFIXES, g=g, state=past, return_state=True)
        return self.o(o.to(v.dtype).transpose(1, 2).flatten(2)), (m[..., -1:], past)
