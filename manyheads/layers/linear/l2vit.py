"""L2ViT's attention: linear and global in one block, with convolutions that concentrate it, softmax in windows in the
next.

    global:  x = x + dw3(x);   x = x + W_o LGA(norm(x));   x = x + dw7(BN(gelu(dw7(norm(x)))))
    LGA:     o_i = tau relu(q_i) (sum_j relu(k_j) v_j^T) / max(relu(q_i) . sum_j relu(k_j), 100)
    local:   x = x + dw3(x);   x = x + W_o LWA(norm(x)),   LWA: softmax attention in each window of 7 x 7 tokens

with a learned tau for each head, 1 / sqrt(d) at first, and dw3 and dw7 depthwise convolutions of the image, the first
of them for positions. The bound of the divisor keeps training stable. Blocks of a model take turns, local first. Each
is followed by an MLP, which is the model's, behind another dw3 in a local block.

An image is x [batch, rows * width, dim], line by line, and its last line may stop early. What is beyond it counts as
zeros for convolutions and is not seen in windows, where the authors' code has keys that are the bias alone.

Zheng. "The Linear Attention Resurrection in Vision Transformer." 2025. arXiv:2501.16182. Start, bound and the order
within the convolutions are those of the authors' code (ChuanyangZheng/L2ViT).
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Recurrence, one
from manyheads.core.batch_norm import batch_normed
from manyheads.core.layer import layer
from manyheads.core.names import unknown
from manyheads.core.plain import cut, standardised
from manyheads.dispatch import attention
from manyheads.nn import from_front, positions_of, split, to_front

Kind = Literal["global", "local"]


def reference(module, x):
    rows = []
    for row in x:
        y = row + _convolved(module.place, row, module.width)
        q, k, v = (
            cut(_normed(module.norm, y) @ p.weight.T + p.bias, module.heads) for p in (module.q, module.k, module.v)
        )
        heads = [(_windows if module.kind == "local" else _global)(module, h, q[h], k[h], v[h]) for h in range(len(q))]
        y = y + torch.cat(heads, -1) @ module.o.weight.T + module.o.bias
        if module.concentrate is not None:
            c = module.concentrate
            z = _convolved(c.conv_in, _normed(c.norm, y), module.width)
            z = standardised(c.batch_norm, z * (1 + torch.erf(z / math.sqrt(2))) / 2)
            y = y + _convolved(c.conv_out, z, module.width)
        rows.append(y)
    return torch.stack(rows)


def _global(module, h, q, k, v):
    w = q.clamp(min=0) @ k.clamp(min=0).T
    return module.temperature[h] * w @ v / torch.maximum(w.sum(-1, keepdim=True), w.new_tensor(module.least))


def _windows(module, h, q, k, v):
    n, out = len(q), []
    window_of = [(i // module.width // module.window, i % module.width // module.window) for i in range(n)]
    for i in range(n):
        seen = [j for j in range(n) if window_of[i] == window_of[j]]
        out.append(torch.softmax(k[seen] @ q[i] / q.shape[-1] ** 0.5, 0) @ v[seen])
    return torch.stack(out)


def _normed(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() + norm.bias


def _convolved(conv, x, width):
    """Token by token, over those neighbours in the image that there are."""
    size, out = conv.kernel_size[0], []
    for i in range(len(x)):
        total = conv.bias
        for r in range(size):
            for c in range(size):
                row, column = i // width + r - size // 2, i % width + c - size // 2
                j = row * width + column
                if row >= 0 and 0 <= column < width and j < len(x):
                    total = total + conv.weight[:, 0, r, c] * x[j]
        out.append(total)
    return torch.stack(out)


class LocalConcentration(nn.Module):
    """dw7(BN(gelu(dw7(norm(x))))) for images."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.norm, self.batch_norm = nn.LayerNorm(dim), nn.BatchNorm1d(dim)
        self.conv_in, self.conv_out = (depthwise(dim, kernel) for _ in range(2))

    def forward(self, x: Tensor, there: Tensor | None, width: int) -> Tensor:
        """x [batch, rows * width, dim], there: bool [batch, rows * width], or None for everywhere."""
        y = F.gelu(convolved(self.conv_in, self.norm(x), there, width))
        return convolved(self.conv_out, batch_normed(self.batch_norm, y, there), there, width)


def depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def convolved(conv: nn.Conv2d, x: Tensor, there: Tensor | None, width: int) -> Tensor:
    """x [batch, rows * width, dim] as an image, with zeros where nothing is."""
    x = x if there is None else x.masked_fill(~there[..., None], 0.0)
    return conv(x.mT.unflatten(-1, (-1, width))).flatten(2).mT


def windows(height: int, width: int, side: int) -> Tensor:
    """The tokens of each window, int64 [windows, side * side], with -1 for places beyond the image."""
    image = torch.arange(height * width).view(height, width)
    image = F.pad(image, (0, -width % side, 0, -height % side), value=-1)
    return image.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)


@layer(
    reference=reference,
    arxiv="2501.16182",
    system="l2vit",
    examples=(
        {"dim": 8, "heads": 2, "width": 4, "kernel": 3, "least": 2.0},
        {"dim": 6, "heads": 1, "width": 5, "concentrate": False},
        {"dim": 8, "heads": 2, "kind": "local", "width": 5, "window": 2},
    ),
    causal=False,
)
class L2ViT(nn.Module):
    """kind: "global" or "local". width: of the image, in tokens. window, kernel: sides of a window, and of the
    convolutions behind global attention, which `concentrate` turns off. least: the bound of the divisor."""

    def __init__(
        self, dim: int, heads: int, *, kind: str = "global", width: int = 14, window: int = 7, kernel: int = 7,
        concentrate: bool = True, least: float = 100.0,
    ):  # fmt: skip
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if kind not in get_args(Kind):
            raise ValueError(unknown("kind of L2ViT's attention", kind, get_args(Kind)))
        if not kernel % 2:
            raise ValueError(f"kernel {kernel} must be odd, to have a middle")
        self.dim, self.heads, self.kind, self.width, self.window, self.least = dim, heads, kind, width, window, least
        self.place, self.norm = depthwise(dim, 3), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.concentrate = LocalConcentration(dim, kernel) if kind == "global" and concentrate else None
        if kind == "global":
            self.temperature = nn.Parameter(torch.full((heads,), (dim // heads) ** -0.5))
            self.form = Recurrence(
                query_feature=F.relu, key_feature=F.relu, causal=False, normaliser="sum", least=least, default_scale=one
            )

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; present: bool [batch, len], False where a row is padding. Returns [batch, len, dim]."""
        positions, n = positions_of(x, present, self.dim), x.shape[1]
        y = F.pad(to_front(x, positions, n), (0, 0, 0, -n % self.width))
        places, there = torch.arange(y.shape[1], device=x.device), None
        if positions is not None or n % self.width:
            counts = places.new_full((len(y),), n) if positions is None else (positions >= 0).sum(1)
            there = places < counts[:, None]
        y = y + convolved(self.place, y, there, self.width)
        z = self.norm(y)
        q, k, v = (split(p(z), self.heads) for p in (self.q, self.k, self.v))
        o = self._global(q, k, v, there) if self.kind == "global" else self._local(q, k, v, there)
        y = y + self.o(o.transpose(1, 2).flatten(2))
        if self.concentrate is not None:
            y = y + self.concentrate(y, there, self.width)
        return from_front(y, positions, n)

    def _global(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        at = _positions(there)
        o = attention(q, k, v, self.form, q_positions=at, kv_positions=at)
        return o * self.temperature.to(o.dtype)[:, None, None]

    def _local(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        """Each window is a row of the batch."""
        batch, length = len(q), q.shape[2]
        index = windows(length // self.width, self.width, self.window).to(q.device)
        inside = None
        if there is not None or index.numel() > length:
            inside = (index >= 0).expand(batch, -1, -1) if there is None else there[:, index] & (index >= 0)
            inside = inside.flatten(0, 1)
        q, k, v = (t[:, :, index].transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        at = _positions(inside)
        o = attention(q, k, v, "full", q_positions=at, kv_positions=at)
        return o.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, index.flatten().argsort()[-length:]]


def _positions(there: Tensor | None) -> Tensor | None:
    """What attention is told of bool [batch, len]."""
    return None if there is None else torch.where(there, torch.arange(there.shape[1], device=there.device), -1)
