"""SHA-RNN's block: a recurrent network remembers, and one head of attention with one matrix looks back.

    h = LSTM(norm(x));   m = norm(h),   h = norm(h)
    q = norm(W_q h) * s(a),   k = m * s(b),   v = m * s(f) * tanh(c),   [c, f] = W_v s(e)
    h = h + softmax(q K^T / sqrt(dim)) V,   out = norm(h) + boom(norm(h)),   boom(y) = sum of the chunks of gelu(W_1 y)

s is the sigmoid; a, b and e are vectors, so once training is done the values need a vector, too. `boom` widens to a
multiple of dim and adds the pieces up where others have a second matrix; its gelu is y s(1.702 y). No positions are
encoded. As in the authors' code, nothing goes around the LSTM. In their model all blocks but one lack the attention,
and a memory of 5000 tokens is put in front; here memory is a longer x. Dropout is left to the model.

Merity. "Single Headed Attention RNN: Stop Thinking With Your Head." 2019. arXiv:1911.11423.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.core.plain import softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import from_front, positions_of, to_front


def reference(module, x):
    def norm(z, name):
        own, centred = getattr(module, name), z - z.mean()
        return own.weight * centred / (centred.square().mean() + 1e-12).sqrt() + own.bias

    def s(z):
        return 1 / (1 + torch.exp(-z))

    lstm, rows = module.lstm, []
    c_gate, f_gate = (module.v_gate.weight @ s(module.v_scale) + module.v_gate.bias).chunk(2)
    for row in x:
        hidden = cell = torch.zeros_like(row[0])
        remembered = []
        for x_t in row:
            u = (
                lstm.weight_ih_l0 @ norm(x_t, "norm_in")
                + lstm.bias_ih_l0
                + lstm.bias_hh_l0
                + lstm.weight_hh_l0 @ hidden
            )
            i, f, g, o = u.chunk(4)
            cell = s(f) * cell + s(i) * torch.tanh(g)
            hidden = s(o) * torch.tanh(cell)
            remembered.append(hidden)
        memory = torch.stack([norm(h, "norm_memory") for h in remembered])
        h = torch.stack([norm(h, "norm_query_in") for h in remembered])
        q = torch.stack([norm(module.q.weight @ h_t + module.q.bias, "norm_query") for h_t in h]) * s(module.q_scale)
        v = memory * s(f_gate) * torch.tanh(c_gate)
        h = h + softmax_heads(q[None], (memory * s(module.k_scale))[None], v[None])[0]
        out = []
        for h_t in h:
            wide = module.boom.weight @ norm(h_t, "norm_boom") + module.boom.bias
            out.append(norm(h_t, "norm_out") + sum((wide * s(1.702 * wide)).split(module.dim)))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def weights(dim, widen=4):
    lstm, norms, single_head = 8 * dim**2 + 8 * dim, 6 * 2 * dim, dim**2 + dim + 3 * dim
    return lstm + norms + single_head + 2 * dim**2 + 2 * dim + widen * (dim**2 + dim)


@layer(
    reference=reference,
    arxiv="1911.11423",
    system="sha-rnn",
    examples=({"dim": 6, "widen": 3}, {"dim": 5, "widen": 1}),
    weights=weights,
)
class SHARNN(nn.Module):
    """Causal. widen: how many times dim the boom is wide."""

    def __init__(self, dim: int, *, widen: int = 4):
        super().__init__()
        self.dim = dim
        self.norm_in, self.norm_memory, self.norm_query_in = (nn.LayerNorm(dim, eps=1e-12) for _ in range(3))
        self.norm_query, self.norm_boom, self.norm_out = (nn.LayerNorm(dim, eps=1e-12) for _ in range(3))
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.q = nn.Linear(dim, dim)
        self.q_scale, self.k_scale, self.v_scale = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        self.v_gate = nn.Linear(dim, 2 * dim)
        self.boom = nn.Linear(dim, widen * dim)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, length = positions_of(x, present, self.dim), x.shape[1]
        x = to_front(x, positions, length)  # padding behind the last token changes nothing in a causal block
        h, _ = self.lstm(self.norm_in(x))
        memory, h = self.norm_memory(h), self.norm_query_in(h)
        h = h + self.look_back(h, memory)
        y = self.boom(self.norm_boom(h))
        y = (y * torch.sigmoid(1.702 * y)).unflatten(-1, (-1, self.dim)).sum(-2)
        return from_front(self.norm_out(h) + y, positions, length)

    def look_back(self, h: Tensor, memory: Tensor) -> Tensor:
        """The single head: queries from h, keys and values from memory, both [batch, len, dim]."""
        c, f = self.v_gate(torch.sigmoid(self.v_scale)).chunk(2)
        q = self.norm_query(self.q(h)) * torch.sigmoid(self.q_scale)
        k, v = memory * torch.sigmoid(self.k_scale), memory * torch.sigmoid(f) * torch.tanh(c)
        return attention(q[:, None], k[:, None], v[:, None], "causal")[:, 0]
