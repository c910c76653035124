"""The consciousness prior: of many elements a few are attended to, and all others know of the world through those few.

    a_j = k_j . W c_{t-1} / sqrt(d),   I_t = the `slots` elements of greatest a_j + noise z_j
    c_t = sum_{j in I_t} softmax_{j in I_t}(a_j) v_j
    y_i = W_o sum_{j in I_T} softmax_{j in I_T}(q_i . k_j / sqrt(d) + a_j) v_j

c_0 is learned, and z is Gumbel noise, in training alone. Elements are those of a set, such as the variables that a
state of the world is made of, and I_T, each with its key for a name, is what is conscious after T `steps`.

The paper is a position paper: it has c_t = C(h_t, c_{t-1}, z_t) for some function C that chooses few elements of h_t
by attention, and says that all modules get to know them; the equations are one way to write that. Its memory of earlier
conscious states, the words for them, and what verifies them against later states are left out.

Bengio. "The Consciousness Prior." 2017. arXiv:1709.08568.
"""

import torch
from torch import Tensor, nn

from manyheads.core.layer import layer
from manyheads.nn import Attention, positions_of


def reference(module, x):
    return torch.stack([reference_row(module, row) for row in x])


def reference_row(module, row):
    q, k, v = (row @ p.weight.T for p in (module.q, module.k, module.v))
    root, c, chosen, a = module.dim**0.5, module.start, [], []
    for _ in range(module.steps):
        a = [k_j @ module.ask.weight @ c / root for k_j in k]
        chosen = sorted(range(len(row)), key=lambda j, a=a: -a[j].item())[: module.slots]
        w = torch.softmax(torch.stack([a[j] for j in chosen]), 0)
        c = sum(w_j * v[j] for w_j, j in zip(w, chosen, strict=True))
    s = torch.stack([torch.stack([q_i @ k[j] / root + a[j] for j in chosen]) for q_i in q])
    return torch.softmax(s, -1) @ v[chosen] @ module.o.weight.T


def all_conscious():
    """With a slot for everyone, and nothing in mind, it is full attention."""
    module, plain = ConsciousnessPrior(8, slots=100), Attention(8, 1, "full", rope_theta=None)
    module.q, module.k, module.v, module.o = plain.q, plain.k, plain.v, plain.o
    nn.init.zeros_(module.start)
    return module, plain


@layer(
    reference=reference,
    arxiv="1709.08568",
    system="consciousness-prior",
    examples=({"dim": 8, "slots": 2}, {"dim": 6, "slots": 3, "steps": 3}),
    laws=(all_conscious,),
    weights=lambda dim, slots, steps=1: 5 * dim * dim + dim,
    causal=False,
)
class ConsciousnessPrior(nn.Module):
    """`slots` elements are chosen `steps` times; `noise` scales what is added to the choice in training,
    without which an element that is not chosen is never tried."""

    def __init__(self, dim: int, *, slots: int = 4, steps: int = 1, noise: float = 0.0):
        super().__init__()
        self.dim, self.slots, self.steps, self.noise = dim, slots, steps, noise
        self.q, self.k, self.v, self.o, self.ask = (nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.start = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions_of(x, present, self.dim)  # refuses other shapes; a set has no positions
        here = torch.ones_like(x[..., 0], dtype=torch.bool) if present is None else present
        q, k, v = self.q(x), self.k(x), self.v(x)
        at, a, c = self._attend(k, v, here, self.start.expand(len(x), -1))
        for _ in range(self.steps - 1):
            at, a, c = self._attend(k, v, here, c)
        k, v = take(k, at), take(v, at)
        o = (q @ k.mT * self.dim**-0.5 + a[:, None]).softmax(-1) @ v
        return self.o(o).masked_fill(~here[..., None], 0.0)

    def _attend(self, k: Tensor, v: Tensor, here: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the chosen elements are and how much they are liked, both [batch, slots], and c_t [batch, dim]."""
        a = (k @ self.ask(c)[..., None]).squeeze(-1) * self.dim**-0.5
        # The lowest number, not -inf: a row of padding alone would be NaN.
        a = a.masked_fill(~here, torch.finfo(a.dtype).min)
        likes = a.detach()
        if self.training:
            likes = likes - self.noise * torch.empty_like(likes).exponential_().log()
        at = likes.topk(min(self.slots, a.shape[1]), -1).indices
        a = a.gather(1, at)
        return at, a, (a.softmax(-1)[:, None] @ take(v, at)).squeeze(1)


def take(x: Tensor, at: Tensor) -> Tensor:
    """x [batch, len, dim] at places [batch, n]: [batch, n, dim]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
