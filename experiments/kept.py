"""What a sparse mechanism keeps of dense attention: the pairs of query and key, and the softmax mass that they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from manyheads import attention
from manyheads.core.forms import Form, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.maps import attention_map, read
from manyheads.core.mechanism import Mechanism
from manyheads.core.tiling import choose, chunks

RANDOM_BLOCK = 32  # tokens on either side


def why_not(mechanism: Mechanism, form: Form) -> str | None:
    """Why a mechanism has no place among those that keep some of the pairs of dense attention as they are."""
    if mechanism.trained:
        return "needs training"
    if not mechanism.causal:
        return "sees later keys"
    if not isinstance(form, Scores | Selection):
        return f"is a `{type(form).__name__}`, which has no pairs to list"
    scores = form.scores if isinstance(form, Selection) else form
    if scores.program.has_score or scores.normaliser != "softmax" or scores.sink or form.operands or scores.operands:
        return "changes more than which pairs are kept"
    return None


@dataclass(frozen=True, eq=False)
class Dense:
    """Causal softmax attention over q [1, heads, len, head_dim], k [1, kv_heads, len, head_dim] and v, as maps."""

    q: Tensor
    k: Tensor
    v: Tensor

    @cached_property
    def weights(self) -> Tensor:
        return attention_map(self.q, self.k, self.q.shape[-1] ** -0.5, causal=True)

    @cached_property
    def rank(self) -> Tensor:
        """The place of each key among those of its query, from the heaviest on; later keys come last."""
        n = self.k.shape[2]
        later = torch.ones(n, n, dtype=torch.bool, device=self.k.device).triu(1)
        return self.weights.masked_fill(later, -1).argsort(-1, descending=True).argsort(-1).int()

    @cached_property
    def o(self) -> Tensor:
        return attention(self.q, self.k, self.v, "causal")

    def inputs(self, form: Form) -> Inputs:
        scale, n = form.default_scale(self.q.shape[-1]), self.k.shape[2]
        return Inputs(self.q, self.k, self.v, scale, *default_positions(n, n))


def settled(form: Form, dense: Dense) -> Form:
    """The form with its choice made, so that what follows costs no further one."""
    if not isinstance(form, Selection):
        return form
    blocks = choose(form, dense.inputs(form))
    return replace(form, select=lambda q, k, *, scale, offset: blocks)


def kept(form: Form, dense: Dense) -> Tensor:
    """bool [1, heads, len, len]: the pairs that a form computes, one that why_not has nothing against."""
    assert isinstance(form, Scores | Selection)
    seen = torch.zeros(*dense.q.shape[:3], dense.k.shape[2], dtype=torch.bool, device=dense.q.device)
    for chunk in chunks(form, dense.inputs(form)):
        allowed = chunk.allowed
        seen[:, :, chunk.rows, chunk.columns] = True if allowed is None else allowed
    return seen


def density(pairs: Tensor) -> float:
    """The share that pairs are of all causal ones."""
    heads, n = pairs.shape[1:3]
    return int(pairs.count_nonzero()) / (heads * n * (n + 1) // 2)


def worst(heads: list[float]) -> float:
    """The mean of the lowest tenth."""
    lowest = sorted(heads)[: math.ceil(len(heads) / 10)]
    return sum(lowest) / len(lowest)


def attend(dense: Dense, pairs: Tensor) -> tuple[list[float], Tensor]:
    """The share of dense attention's weights on the pairs, of each head in the mean over its queries; and o of softmax
    attention over the pairs alone, 0 where a query has none."""
    weights = dense.weights * pairs
    share = weights.sum(-1, keepdim=True)
    o = read(weights, dense.v) / share.clamp(min=torch.finfo(share.dtype).tiny)
    return share.mean((-2, -1), dtype=torch.float64)[0].tolist(), o


def error(dense: Dense, o: Tensor) -> float:
    """The distance of o from dense attention's, relative to that one's length."""
    wanted = dense.o.double()
    return ((o.double() - wanted).norm() / wanted.norm()).item()


def oracle(dense: Dense, pairs: Tensor) -> Tensor:
    """For each query as many keys as pairs has for it: those with the greatest weights. No choice holds more mass."""
    return dense.rank < pairs.sum(-1, keepdim=True, dtype=torch.int32)


def random_blocks(dense: Dense, pairs: Tensor) -> Tensor:
    """For each head as many pairs as pairs has in the mean, to half a block: each block of queries keeps its own keys,
    and of the past blocks of keys any are taken, all with one chance."""
    heads, n = pairs.shape[1:3]
    blocks, device = -(-n // RANDOM_BLOCK), pairs.device
    i = torch.arange(n, device=device)
    own = (i // RANDOM_BLOCK == i[:, None] // RANDOM_BLOCK) & (i <= i[:, None])
    count = round((int(pairs.count_nonzero()) / heads - int(own.sum())) / RANDOM_BLOCK**2)
    past = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril(-1)
    draw = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(0)).to(device)
    drawn = draw.masked_fill(~past, 2.0).flatten(1).argsort(-1).argsort(-1).view_as(draw) < count
    cells = (drawn & past)[:, :, None, :, None].expand(-1, -1, RANDOM_BLOCK, -1, RANDOM_BLOCK)
    return (cells.flatten(3).flatten(1, 2)[:, :n, :n] | own)[None]
