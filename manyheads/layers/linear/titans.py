"""Titans: attention to the nearest tokens, and a long-term memory that learns the others while it reads them.

    M_t = (1 - alpha_t) M_{t-1} + S_t,   S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2,   m(x)_t = M_t(q_t)
    mac:  h = M(q(S)) before segment S,   y = Attn([P; h; S]),   o = y (x) m(y)
    mag:  o = SWA([P; x]) (x) m([P; x])         mal:  o = SWA(m([P; x]))         lmm:  o = m(x)
    a (x) b = norm(a) sigmoid(norm(b))

M is a network of `depth` layers, and its weights are the state. q, k and v are projections behind a short convolution
and SiLU, q and k of length 1, and a norm, a gate and a projection come behind M: all that is part of m. P are
`persistent` learned tokens. The gates alpha, eta and theta are sigmoids of projections of x, theta times `largest`, as
tokens of a chunk start from the same M and their steps add up (`core/gradient_steps.py`). With chunk 1, depth 1 and no
momentum M is the state of a gated delta rule.

In mac nothing may look ahead: h_i comes before token i of the segment, and attention is causal. m(y)_t reads the memory
that has learned y up to t. Sliding windows keep P in sight in mag.

Behrouz, Zhong, Mirrokni. "Titans: Learning to Memorize at Test Time." 2024. arXiv:2501.00663. The authors published no
code; what the paper leaves open (SiLU inside M, the gates' starts, rotary positions in attention) is chosen here.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from manyheads.core.gradient_steps import recall
from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.core.neural_memory import NeuralMemory
from manyheads.core.plain import convolved, cut, turned
from manyheads.mechanisms import get
from manyheads.nn import Attention, from_front, positions_of, to_front

Variant = Literal["mac", "mag", "mal", "lmm"]


def reference(module, x):
    return torch.stack([_row(module, row) for row in x])


def _row(module, row):
    m = module.memory
    start = ([*m.weights], [torch.zeros_like(w) for w in m.weights])
    if module.variant == "lmm":
        return _learned(m, row, 0, *start)[0]
    p = module.persistent
    if module.variant == "mag":
        whole = torch.cat([p, row])
        return _gated(module, _attended(module, whole), _learned(m, whole, 0, *start)[0])[len(p) :]
    if module.variant == "mal":
        return _attended(module, _learned(m, torch.cat([p, row]), 0, *start)[0])[len(p) :]
    asked, y, out = _projected(m, row)[0], row[:0], []
    for at in range(0, len(row), module.window):
        end = min(at + module.window, len(row))
        h = _behind(m, _network(start[0], asked[:, at:end]), row[at:end])
        tokens = [t for pair in zip(h, row[at:end], strict=True) for t in pair]
        y = torch.cat([y, _attended(module, torch.cat([p, torch.stack(tokens)]))[len(p) + 1 :: 2]])
        found, *start = _learned(m, y, at, *start)
        out.append(_gated(module, y[at:], found))
    return torch.cat(out)


def _learned(m, tokens, start, weights, momenta):
    """m(tokens) from token `start` on, and the weights and momenta then; gradients are torch's."""
    q, k, v = _projected(m, tokens)
    alpha, eta, theta = (
        0 * tokens[:, : m.heads] if gate is None else torch.sigmoid(tokens @ gate.weight.T + gate.bias)
        for gate in (m.forget, m.carry, m.step)
    )
    out, chunk_start = [], weights
    for t in range(start, len(tokens)):
        if (t - start) % m.chunk == 0:
            chunk_start = [w.clone() for w in weights]  # k and v may hang on the weights, but not on these
        loss = (_network(chunk_start, k[:, t, None]) - v[:, t, None]).square().sum()
        steps = torch.autograd.grad(loss, chunk_start, create_graph=True)
        alpha_t, eta_t, theta_t = (gate[t, :, None, None] for gate in (alpha, eta, theta))
        momenta = [eta_t * s - m.largest * theta_t * step for s, step in zip(momenta, steps, strict=True)]
        weights = [(1 - alpha_t) * w + s for w, s in zip(weights, momenta, strict=True)]
        out.append(_network(weights, q[:, t, None]))
    return _behind(m, torch.cat(out, 1), tokens[start:]), weights, momenta


def _projected(m, tokens):
    made = []
    for project, taps in ((m.q, m.q_taps), (m.k, m.k_taps), (m.v, m.v_taps)):
        y = convolved(tokens @ project.weight.T, taps)
        made.append(cut(y / (1 + torch.exp(-y)), m.heads))
    q, k, v = made
    return *(y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k)), v


def _network(weights, x):
    for n, w in enumerate(weights):
        x = (x / (1 + torch.exp(-x)) if n else x) @ w
    return x


def _behind(m, y, tokens):
    y = m.norm.weight * y / (y.square().mean(-1, keepdim=True) + m.norm.eps).sqrt()
    y = y.transpose(0, 1).flatten(1) * torch.sigmoid(tokens @ m.gate.weight.T)
    return y @ m.o.weight.T


def _gated(module, a, b):
    rms = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (a, b)]
    return module.norm_a.weight * rms[0] * torch.sigmoid(module.norm_b.weight * rms[1])


def _attended(module, tokens):
    a = module.attention
    q, k, v = (cut(tokens @ p.weight.T, a.heads) for p in (a.q, a.k, a.v))
    q, k = turned(q, a.rope_theta), turned(k, a.rope_theta)
    settings = {"mag": {"sinks": len(module.persistent)}, "mal": {"sinks": 0}}.get(module.variant)
    settings = {} if settings is None else {"window": module.window, **settings}
    o = get(a.mechanism).reference(q[None], k[None], v[None], **settings)[0]
    return o.transpose(0, 1).flatten(1) @ a.o.weight.T


def a_memory_that_never_learns():
    """With steps of size 0 and nothing forgotten, m is the same network for all tokens, whatever the chunk."""
    one, other = (Titans(12, 2, variant="mag", window=4, persistent=2, chunk=c) for c in (3, 64))
    other.load_state_dict(one.state_dict())
    for module in (one, other):
        nn.init.constant_(module.memory.step.bias, -1e4)
        nn.init.constant_(module.memory.forget.bias, -1e4)
    return one, other


@layer(
    reference=reference,
    arxiv="2501.00663",
    system="titans",
    examples=(
        {"dim": 12, "heads": 2, "variant": "mac", "window": 5, "persistent": 2, "chunk": 3, "widen": 2},
        {
            "dim": 12,
            "heads": 2,
            "variant": "mag",
            "window": 3,
            "persistent": 2,
            "memory_heads": 2,
            "chunk": 4,
            "depth": 3,
        },
        {
            "dim": 8,
            "heads": 2,
            "variant": "mal",
            "window": 4,
            "persistent": 1,
            "chunk": 5,
            "depth": 1,
            "momentum": False,
        },
        {"dim": 8, "heads": 1, "variant": "lmm", "chunk": 1, "memory_heads": 2, "widen": 1, "largest": 0.1},
    ),
    laws=(a_memory_that_never_learns,),
    ranges={"persistent": (0, float("inf"))},
)
class Titans(nn.Module):
    """variant: "mac", "mag", "mal", or "lmm", the memory alone. window: tokens in a segment of mac, and in the sliding
    window of mag and mal. memory_heads, depth, widen: M is that many networks side by side, each of `depth` layers,
    `widen` times as wide inside. conv: tokens that the short convolution sees. largest:
    what theta stays below; much above 1 / chunk, tokens that are alike may make it diverge."""

    def __init__(
        self, dim: int, heads: int, *, variant: str = "mac", window: int = 128, persistent: int = 4,
        memory_heads: int = 1, depth: int = 2, widen: int = 4, conv: int = 4, chunk: int = 64, momentum: bool = True,
        largest: float = 0.01,
    ):  # fmt: skip
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(unknown("variant", variant, get_args(Variant)))
        if dim % memory_heads:
            raise ValueError(f"dim {dim} is not a multiple of memory_heads {memory_heads}")
        self.dim, self.variant, self.window = dim, variant, window
        self.memory = NeuralMemory(dim, memory_heads, depth, widen, conv, chunk, momentum, largest)
        if variant == "lmm":
            return
        self.persistent = nn.Parameter(torch.randn(persistent, dim) * dim**-0.5)
        if variant == "mac":
            self.attention = Attention(dim, heads)
        else:
            sinks = persistent if variant == "mag" else 0
            self.attention = Attention(dim, heads, "sliding_window", window=window, sinks=sinks)
        if variant != "mal":
            self.norm_a, self.norm_b = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        x = to_front(x, positions, n)  # padding behind the last token changes nothing that is causal
        return from_front(getattr(self, f"_{self.variant}")(x), positions, n)

    def _lmm(self, x: Tensor) -> Tensor:
        return self.memory(x, self.memory.start(x))[0]

    def _mal(self, x: Tensor) -> Tensor:
        return self.attention(self._lmm(self._behind_persistent(x)))[:, len(self.persistent) :]

    def _mag(self, x: Tensor) -> Tensor:
        x = self._behind_persistent(x)
        return self._gated(self.attention(x), self._lmm(x))[:, len(self.persistent) :]

    def _mac(self, x: Tensor) -> Tensor:
        state, asked, out = self.memory.start(x), self.memory.asked(x), []
        for start in range(0, x.shape[1], self.window):
            cut = slice(start, start + self.window)
            h = self.memory.behind(recall(state.memory, asked[:, :, cut]), x[:, cut])
            tokens = self._behind_persistent(torch.stack([h, x[:, cut]], 2).flatten(1, 2))
            y = self.attention(tokens)[:, len(self.persistent) + 1 :: 2]
            found, state = self.memory(y, state)
            out.append(self._gated(y, found))
        return torch.cat(out, 1) if out else x

    def _behind_persistent(self, x: Tensor) -> Tensor:
        return torch.cat([self.persistent.to(x.dtype).expand(len(x), -1, -1), x], 1)

    def _gated(self, y: Tensor, found: Tensor) -> Tensor:
        y, found = (t.to(self.norm_a.weight.dtype) for t in (y, found))  # autocast leaves norms their dtype
        return self.norm_a(y) * self.norm_b(found).sigmoid()
