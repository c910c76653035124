"""SEA: the attention matrix is estimated in a few columns at linear cost, and its largest parts are computed exactly.

    c_i = sum_{j <= i} phi(q_i).phi(k_j) [e_j; v_j] / sum_{j <= i} phi(q_i).phi(k_j),   h_i = gelu(LN(W [c_i; v_i]))
    A^_i = softmax over `width` columns of cnn(W' h)_i
    M_i = the round(heads top_k width / (i + 1)) largest entries of A^_i in all heads together, at least one
    o_i = s1 s0 sum_{j in M_i} softmax_{j in M_i}(q_i . k_j / sqrt(d)) v_j + (1 - s1) mean_{j <= i} v_j

with phi random features, e learned places, [s0, s1] = sigmoid(W'' h_i), and key j <= i in the column that it falls into
when `width` columns are stretched over i + 1 keys: `top_k` keys for each query and head on average. The cnn is two
dilated convolutions of 3 x 3 that see no later row, a quarter as wide, and a mixing of channels. The mask is computed
here a run of queries at a time against all keys: what is saved is memory, not work.

Losses teach the estimate, stretched to all keys as A~, what dense attention A with the same q and k is:
estimate_kl = 0.1 mean_i KL(A_i || A~_i), estimate_mse = mean_ij (A_ij - A~_ij)^2 over keys j <= i. In the paper A is a
trained model's, which also teaches o; this is the causal variant of the authors' code, without its random shifts.

Lee, Kim, Willette, Hwang. "SEA: Sparse Linear Attention with Estimated Attention Mask." 2023. arXiv:2310.01777.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.core import Recurrence
from manyheads.core.layer import layer
from manyheads.core.plain import cut
from manyheads.dispatch import attention
from manyheads.nn import Attention, from_front, positions_of, split, to_front

LINEAR = Recurrence()
ROWS = 128  # queries at a time


def reference(module, x):
    return torch.stack([reference_row(module, row) for row in x])


def reference_row(module, row):
    q, k, v = (cut(row @ p.weight.T, module.heads) for p in (module.q, module.k, module.v))
    state, scores = reference_estimate(module, q, k, v)
    tokens = []
    for i in range(len(row)):
        count = max(1, round(module.heads * module.top_k * module.width / (i + 1)))
        flat = scores[:, i].softmax(-1).flatten().tolist()
        best = sorted(range(len(flat)), key=lambda e, flat=flat: -flat[e])[:count]
        heads = []
        for h in range(module.heads):
            s0, s1 = torch.sigmoid(module.scales(state[h, i]))
            seen = [j for j in range(i + 1) if h * module.width + reference_column(module, i, j) in best]
            read = torch.softmax(k[h, seen] @ q[h, i] / q.shape[-1] ** 0.5, 0) @ v[h, seen]
            heads.append(s1 * s0 * read + (1 - s1) * v[h, : i + 1].mean(0))
        tokens.append(torch.cat(heads) @ module.o.weight.T)
    return torch.stack(tokens)


def reference_column(module, i, j):
    """The middle of key j's share of the row; on an edge the left column."""
    return math.ceil((j + 0.5) / (i + 1) * module.width - 1e-9) - 1


def reference_estimate(module, q, k, v):
    heads, n, d = q.shape
    phi_q, phi_k = (torch.relu(t / d**0.25 @ module.features.T) + 1e-3 for t in (q, k))
    state, image = torch.zeros(heads, n, 2 * d, dtype=q.dtype), []
    for h in range(heads):
        states = []
        for i in range(n):
            w = phi_k[h, : i + 1] @ phi_q[h, i]
            values = torch.cat([module.places[: i + 1], v[h, : i + 1]], -1)
            states.append(module.encode(torch.cat([w @ values / w.sum(), v[h, i]])))
        state = torch.cat([state[:h], torch.stack(states)[None], state[h + 1 :]])
        image += [torch.stack(rows) for rows in zip(*(module.decode(s).chunk(2) for s in states), strict=True)]
    image = module.norm_in(torch.stack(image))
    for conv in module.convs:
        image = torch.relu(reference_conv(conv, image))
    mixed = torch.einsum("hc,cnw->hnw", module.mix.weight[:, :, 0, 0], image) + module.mix.bias[:, None, None]
    return state, module.norm_out(torch.stack([mixed[..., w // 4] for w in range(module.width)], -1))


def reference_conv(conv, image):
    """Rows i, i - 2, i - 4; columns w - 2, w, w + 2."""
    _, n, width = image.shape
    out = []
    for i in range(n):
        for w in range(width):
            taps = [(a, b, i - 4 + 2 * a, w - 2 + 2 * b) for a in range(3) for b in range(3)]
            found = [conv.weight[:, :, a, b] @ image[:, r, c] for a, b, r, c in taps if r >= 0 and 0 <= c < width]
            out.append(sum(found) + conv.bias)
    return torch.stack(out, -1).view(-1, n, width)


def reference_losses(module, x):
    kl, mse, count = x.new_zeros(()), x.new_zeros(()), len(x) * x.shape[1] * module.heads
    for row in x:
        q, k, v = (cut(row @ p.weight.T, module.heads) for p in (module.q, module.k, module.v))
        _, scores = reference_estimate(module, q, k, v)
        for h in range(module.heads):
            for i in range(len(row)):
                truth = torch.softmax(k[h, : i + 1] @ q[h, i] / q.shape[-1] ** 0.5, 0).detach()
                guess = torch.softmax(scores[h, i, [reference_column(module, i, j) for j in range(i + 1)]], 0)
                kl = kl + 0.1 * (truth * (truth.log() - guess.log())).sum() / count
                mse = mse + (truth - guess).square().mean() / count
    return {"estimate_kl": kl, "estimate_mse": mse}


def every_key():
    """With room for every key, and both gates open, it is causal attention."""
    module, plain = SEA(8, 2, max_len=13, top_k=100, width=16), Attention(8, 2, rope_theta=None)
    module.q, module.k, module.v, module.o = plain.q, plain.k, plain.v, plain.o
    nn.init.zeros_(module.scales.weight)
    nn.init.constant_(module.scales.bias, 100.0)
    return module, plain


@layer(
    reference=reference,
    losses=reference_losses,
    arxiv="2310.01777",
    system="sea",
    examples=(
        {"dim": 8, "heads": 2, "top_k": 2, "width": 16, "max_len": 13},
        {"dim": 12, "heads": 3, "top_k": 1, "width": 12, "max_len": 20, "features": 5},
    ),
    laws=(every_key,),
)
class SEA(nn.Module):
    """Causal. `top_k` keys for each query and head on average, from `width` estimated columns; `features` of phi
    (None: head_dim log head_dim) are a buffer."""

    features: Tensor

    def __init__(
        self, dim: int, heads: int, *, max_len: int, top_k: int = 64, width: int = 256, features: int | None = None
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if width % 4:
            raise ValueError(f"width={width} is no multiple of 4, by which the convolutions are narrower")
        d = dim // heads
        self.dim, self.heads, self.top_k, self.width = dim, heads, top_k, width
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.register_buffer("features", torch.randn(features or max(1, int(d * math.log(d))), d))
        self.places = nn.Parameter(torch.randn(max_len, d))
        self.encode = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.LayerNorm(2 * d), nn.GELU())
        self.decode = nn.Linear(2 * d, width // 2)
        self.norm_in, self.norm_out = nn.LayerNorm(width // 4), nn.LayerNorm(width)
        self.convs = nn.ModuleList(nn.Conv2d(2 * heads, 2 * heads, 3, dilation=2) for _ in range(2))
        self.mix = nn.Conv2d(2 * heads, heads, 1)
        self.scales = nn.Linear(2 * d, 2)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions = positions_of(x, present, self.dim)
        q, k, v, state, scores = self._estimate(to_front(x, positions, x.shape[1]))
        best, i = self.choose(scores), torch.arange(q.shape[2], device=x.device)[:, None]
        # Computed again in the backward pass: memory stays linear.
        parts = [checkpoint(self._read, q, k, v, best, rows, use_reentrant=False) for rows in i.split(ROWS)]
        s0, s1 = self.scales(state).sigmoid().split(1, -1)
        o = s1 * s0 * torch.cat(parts, 2) + (1 - s1) * v.cumsum(2) / (i + 1)
        return from_front(self.o(o.transpose(1, 2).flatten(2)), positions, x.shape[1])

    def choose(self, scores: Tensor) -> Tensor:
        """The columns that each query reads, bool like scores [batch, heads, len, width]."""
        flat = scores.detach().softmax(-1).transpose(1, 2).flatten(2)
        i = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64)[:, None]
        count = (self.heads * self.top_k * self.width / (i + 1)).round().clamp(min=1)
        order = flat.argsort(-1, descending=True)
        kept = (torch.arange(flat.shape[-1], device=flat.device) < count).expand_as(order)
        return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def column(self, i: Tensor, n: int) -> Tensor:
        """In which column of the estimate keys 0 to n - 1 fall, for queries i [rows, 1]; later keys in the last."""
        j = torch.arange(n, device=i.device)
        return (((2 * j + 1) * self.width - 1) // (2 * (i + 1))).clamp(max=self.width - 1)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, best: Tensor, rows: Tensor) -> Tensor:
        n = k.shape[2]
        seen = best[:, :, rows[:, 0]].gather(-1, self.column(rows, n).expand(*q.shape[:2], -1, -1))
        seen = seen & (torch.arange(n, device=q.device) <= rows)
        s = (q[:, :, rows[:, 0]] @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
        return s.softmax(-1).masked_fill(~seen, 0.0) @ v

    def _estimate(self, x: Tensor) -> tuple[Tensor, ...]:
        """(q, k, v, h, scores) of whole rows; scores [batch, heads, len, width]."""
        if x.shape[1] > len(self.places):
            raise ValueError(f"x has {x.shape[1]} tokens, more than max_len {len(self.places)}")
        q, k, v = (split(p(x), self.heads) for p in (self.q, self.k, self.v))
        phi_q, phi_k = ((t * t.shape[-1] ** -0.25 @ self.features.T).relu() + 1e-3 for t in (q, k))
        values = torch.cat([self.places[: x.shape[1]].expand_as(v), v, torch.ones_like(v[..., :1])], -1)
        read = attention(phi_q, phi_k, values, LINEAR, scale=1.0)
        state = self.encode(torch.cat([read[..., :-1] / read[..., -1:], v], -1))
        image = self.norm_in(self.decode(state).unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2))
        for conv in self.convs:
            image = conv(nn.functional.pad(image, (2, 2, 4, 0))).relu()
        return q, k, v, state, self.norm_out(self.mix(image).repeat_interleave(4, -1))

    def losses(self, x: Tensor, *, present: Tensor | None = None) -> dict[str, Tensor]:
        positions = positions_of(x, present, self.dim)
        q, k, _, _, scores = self._estimate(to_front(x, positions, x.shape[1]))
        n = x.shape[1]
        i = torch.arange(n, device=x.device)[:, None]
        later = torch.arange(n, device=x.device) > i
        guess = scores.gather(-1, self.column(i, n).expand(*q.shape[:2], -1, -1))
        truth = q.detach() @ k.detach().mT * q.shape[-1] ** -0.5
        truth, guess = (t.masked_fill(later, torch.finfo(t.dtype).min).log_softmax(-1) for t in (truth, guess))
        here = torch.ones_like(x[..., 0]) if present is None else (i[:, 0] < present.sum(1)[:, None]).to(x.dtype)
        here = here[:, None] / (here.sum() * self.heads)
        kl = (truth.exp() * (truth - guess)).masked_fill(later, 0.0).sum(-1)
        mse = (truth.exp() - guess.exp()).square().sum(-1) / (i[:, 0] + 1)
        return {"estimate_kl": 0.1 * (kl * here).sum(), "estimate_mse": (mse * here).sum()}
