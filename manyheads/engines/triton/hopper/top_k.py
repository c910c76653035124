"""A softmax over the k largest scores of each row: kernels/levels.py finds a level that k of them reach, and the
kernels of the softmax do the rest, over scores that are -inf where they do not reach it.

Where levels lie between two scores, as nearly all do, it does not matter if a kernel rounds a score differently than
the one that counted; where the k-th score has equals, the level is a little below them (kernels/brackets.py). What is
left are scores that happen to be within float32's rounding of a level: such a key may count in one pass and not in
another, with the weight of the least of k.

Zhao, Lin, Zhang, et al. "Explicit Sparse Transformer." 2019. arXiv:1912.11637.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton.hopper import backward, forward
from manyheads.engines.triton.hopper.looks import find, why_not, with_rows
from manyheads.engines.triton.hopper.rescored import of_queries, own_score, with_score

__all__ = ["gradients", "levels_of", "run", "why_not"]

REACH, NEAR = 88.0, 2.0**-19  # as in kernels/brackets.py
LOOKS = 1 + math.ceil(math.log2(REACH / NEAR) / 2)  # after which no bracket is wider than NEAR
LEVEL = "kth_largest"  # an operand, a number for each query


def run(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    """o and levels, float32 [batch, heads, q_len]."""
    level = levels_of(form, x)
    return forward.run(above_level(form, row_start(x.q_positions)), with_rows(x, {LEVEL: level}))[0], level


def gradients(
    form: Scores, x: Inputs, level: Tensor, do: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv; None for those that are not needed. Levels are kept from the forward pass, and lse is found again."""
    inner, y = above_level(form, row_start(x.q_positions)), with_rows(x, {LEVEL: level})
    o, lse = forward.run(inner, y)
    return backward.run(inner, y, o, lse, do, None, needed)


def levels_of(form: Scores, x: Inputs) -> Tensor:
    """What at least k scores reach, and more only if they are as good as equal to the k-th; -inf if there are no more
    than k. float32 [batch, heads, q_len]."""
    level = torch.full(x.q.shape[:3], -math.inf, dtype=torch.float32, device=x.q.device)
    count = form.top_k or 0
    if x.kv_len > count and x.q.numel():
        find(found_in(form), x, LOOKS, level, ends=torch.empty_like(level), count=count)
    return level


@lru_cache(maxsize=256)
def found_in(form: Scores) -> Scores:
    """A softmax over all scores, which has a score function in any case: its scores come with the scale."""
    own, names = own_score(form)
    return with_score(form, lambda s, b, h, i, j, **given: own(s, b, h, i, j, given), names)


@lru_cache(maxsize=256)  # as for entmax
def above_level(form: Scores, first: int) -> Scores:
    """A softmax over the scores that reach LEVEL. first: the position of the first query."""
    own, names = own_score(form)

    def score(s, b, h, i, j, **given):
        changed = own(s, b, h, i, j, given)
        # A sum, as its derivative is that of the score alone: the weight is 0 where it must be, and registers are few.
        return changed + torch.where(changed >= given[LEVEL][b, h, i - first], 0.0, -math.inf)

    return with_score(form, score, (*names, LEVEL), operands=of_queries(form, (LEVEL,)))
