"""Select and pack attention (SPA): a gate picks the tokens of each image that matter, and those alone are attended to.

    s = max(w . x + b, s_above),   g = sigmoid(s) x,   kept: sigmoid(s + noise) > threshold
    y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j,   q, k, v of g, over the kept j in i's container;   y_i = 0 else

so that x + y passes by what is not kept. The kept tokens of all images are packed one behind the other, and containers
hold `container` of them: as many as a window of the backbone. The gate learns from sigmoid(s) and straight through the
choice, which Gumbel noise makes a draw in training, and from labels that say where objects are: their cross-entropy
(`selection_loss`), times 0.01, is added to the loss, for without it the gate keeps almost everything. s_above are the
scores of the stage before, at this one's scale. Every second block rolls the picture first, so that other tokens share
a container.

In the paper a container takes the tokens of several images, who do not see each other; where an image is cut then hangs
on those before it. Here an image starts a container, and neither space nor time is lost: kernels skip what is masked.

Zhang, Li, Seo, Cao. "Context-Aware Token Selection and Packing for Enhanced Vision Transformer." 2024.
arXiv:2410.23608. What a threshold is where nothing is drawn, and that y is 0 for the others, was not at hand.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import Operand, Scores
from manyheads.core.layer import layer
from manyheads.core.plain import cut, softmax_heads
from manyheads.dispatch import attention
from manyheads.nn import Attention, positions_of, split

TOGETHER = Scores(
    mask=lambda b, h, i, j, place: place[b, i] == place[b, j],
    operands={"place": Operand("batch len")},
)


def reference(module, x):
    out = []
    for row in x:
        share = torch.sigmoid(torch.stack([module.gate.weight[0] @ token + module.gate.bias[0] for token in row]))
        kept = [i for i in range(len(row)) if share[i] > module.threshold]
        y = torch.zeros_like(row) + 0 * row
        for start in range(0, len(kept), module.container):
            here = kept[start : start + module.container]
            q, k, v = (cut(part, module.heads) for part in module.qkv(row[here] * share[here, None]).chunk(3, -1))
            o = softmax_heads(q, k, v, causal=False)
            for n, i in enumerate(here):
                y[i] = module.o(o[:, n].flatten())
        out.append(y)
    return torch.stack(out)


def everything_kept_in_one_container():
    """With a gate that is wide open and a container for all it is full attention."""
    module = SelectAndPack(12, 3, container=100)
    nn.init.zeros_(module.gate.weight)
    nn.init.constant_(module.gate.bias, 50.0)
    plain = Attention(12, 3, "full", bias=True, rope_theta=None)
    for name, weight, bias in zip("qkv", module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True):
        getattr(plain, name).weight, getattr(plain, name).bias = nn.Parameter(weight), nn.Parameter(bias)
    plain.o = module.o
    return module, plain


@layer(
    reference=reference,
    arxiv="2410.23608",
    system="spa-select-and-pack",
    examples=(
        {"dim": 12, "heads": 3, "container": 4, "noise": 0.0},
        {"dim": 8, "heads": 2, "container": 49, "threshold": 0.3, "noise": 0.0},
    ),
    laws=(everything_kept_in_one_container,),
    causal=False,
    ranges={"threshold": (0, 1)},
)
class SelectAndPack(nn.Module):
    """Tokens whose gate exceeds `threshold`, `container` to a container; `noise` scales that of training."""

    def __init__(self, dim: int, heads: int, *, container: int = 49, threshold: float = 0.5, noise: float = 1.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dim, self.heads, self.container, self.threshold, self.noise = dim, heads, container, threshold, noise
        self.gate = nn.Linear(dim, 1)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, above: Tensor | None = None, *, present: Tensor | None = None) -> Tensor:
        """x [batch, len, dim]; above [batch, len], the scores of the stage before; present: bool [batch, len], False
        where a row is padding. Returns [batch, len, dim]."""
        positions_of(x, present, self.dim)
        s = self.scores(x, above)
        # The difference of two Gumbel numbers has the distribution of logit(u), u uniform.
        drawn = (s + self.noise * torch.rand_like(s).logit() if self.training else s).sigmoid()
        kept = drawn > self.threshold if present is None else (drawn > self.threshold) & present
        g = x * s.sigmoid()[..., None]
        if self.training:
            g = g * (1 + drawn - drawn.detach())[..., None]
        q, k, v = (split(part[None], self.heads) for part in self.qkv(g[kept]).chunk(3, -1))
        o = attention(q, k, v, TOGETHER, place=self.places(kept)[kept][None])
        y = self.o(o.transpose(1, 2).flatten(2)[0])
        return torch.zeros_like(x).masked_scatter(kept[..., None], y)

    def scores(self, x: Tensor, above: Tensor | None = None) -> Tensor:
        """s [batch, len]: a token is kept for sure where it is far above 0."""
        s = self.gate(x).squeeze(-1)
        return s if above is None else torch.maximum(s, above)

    def places(self, kept: Tensor) -> Tensor:
        """The number of each kept token's container, float32 [batch, len], others for each row of a batch."""
        rows, length = kept.shape
        first = torch.arange(rows, device=kept.device)[:, None] * math.ceil(length / self.container)
        return (first + (kept.cumsum(1) - 1) // self.container).float()

    def selection_loss(
        self, x: Tensor, labels: Tensor, above: Tensor | None = None, *, present: Tensor | None = None
    ) -> Tensor:
        """The cross-entropy of the gate with labels [batch, len], 1 where an object is and 0 elsewhere."""
        loss = F.binary_cross_entropy_with_logits(self.scores(x, above), labels.to(x.dtype), reduction="none")
        return (loss if present is None else loss[present]).mean()
