"""The long-term memory of Titans as a module: a network that learns, between projections, norms and gates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.convolution import causal_conv
from manyheads.core.gradient_steps import Memory, memorise


@dataclass(frozen=True)
class State:
    """A memory, and the tokens [batch, conv - 1, dim] that the convolutions see before the next one."""

    memory: Memory
    before: Tensor


class NeuralMemory(nn.Module):
    """`heads` memories side by side, each a network of `depth` layers, `widen` times as wide inside as at its ends.

    q, k and v are projections of x behind a convolution over `conv` tokens and SiLU, q and k of length 1; the sigmoids
    alpha, eta (0 without `momentum`) and theta / `largest` are linear in x.
    """

    def __init__(
        self, dim: int, heads: int, depth: int, widen: int, conv: int, chunk: int, momentum: bool, largest: float
    ):
        super().__init__()
        self.heads, self.chunk, self.largest = heads, chunk, largest
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.q_taps, self.k_taps, self.v_taps = (nn.Parameter(torch.empty(dim, conv)) for _ in range(3))
        for taps in (self.q_taps, self.k_taps, self.v_taps):
            nn.init.uniform_(taps, -(conv**-0.5), conv**-0.5)
        self.forget, self.step = nn.Linear(dim, heads), nn.Linear(dim, heads)
        nn.init.constant_(self.forget.bias, -8.0)  # a memory that lasts for thousands of tokens
        self.carry = nn.Linear(dim, heads) if momentum else None
        width = dim // heads
        sizes = [width, *[widen * width] * (depth - 1), width]
        self.weights = nn.ParameterList(torch.randn(heads, a, b) * a**-0.5 for a, b in pairwise(sizes))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def start(self, x: Tensor) -> State:
        """What there is before the first token of x [batch, len, dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = tuple(w.to(wide).expand(len(x), -1, -1, -1) for w in self.weights)
        before = x.new_zeros(len(x), self.q_taps.shape[1] - 1, x.shape[2])
        return State(Memory(weights, tuple(torch.zeros_like(w) for w in weights)), before)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [batch, len, dim] learned and read token by token, and the state behind it."""
        whole = torch.cat([state.before, x], 1)
        q = self.asked(whole)[:, :, -x.shape[1] :]
        k = _unit(self._convolved(whole, self.k, self.k_taps))[:, :, -x.shape[1] :]
        v = self._convolved(whole, self.v, self.v_taps)[:, :, -x.shape[1] :]
        theta = self.largest * self.step(x).to(q.dtype).sigmoid().mT
        keep = F.logsigmoid(-self.forget(x).to(q.dtype)).mT
        carry = None if self.carry is None else F.logsigmoid(self.carry(x).to(q.dtype)).mT
        with torch.autocast(x.device.type, enabled=False):
            y, memory = memorise(state.memory, q, k, v, theta, keep, carry, self.chunk)
        return self.behind(y, x), State(memory, whole[:, x.shape[1] :])

    def asked(self, x: Tensor) -> Tensor:
        """The queries [batch, heads, len, width] of x [batch, len, dim], in float32 or wider."""
        return _unit(self._convolved(x, self.q, self.q_taps))

    def behind(self, y: Tensor, x: Tensor) -> Tensor:
        """What the memory gives for x, [batch, heads, len, width], as [batch, len, dim]."""
        y = self.norm(y.to(self.norm.weight.dtype)).transpose(1, 2).flatten(2)
        return self.o((y * self.gate(x).sigmoid()).to(x.dtype))

    def _convolved(self, x: Tensor, project: nn.Linear, taps: Tensor) -> Tensor:
        y = F.silu(causal_conv(project(x), taps)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return y.to(torch.promote_types(y.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
