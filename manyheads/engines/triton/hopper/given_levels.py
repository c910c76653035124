"""Entmax as other forms, once the levels tau are known: weights, and what gradients need, are functions of one score.

    form = given_levels(entmax, weights, first=0)           # reads tau as the operand TAU [batch, heads, queries]

    x_j = above s_j - tau,   p_j = x_j^(1 / above),   r_j = d p_j / d s_j = p_j^(1 - above)

above = alpha - 1. Where x_j <= 0, p_j = r_j = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from manyheads.core.forms import Scores
from manyheads.engines.triton.hopper.rescored import of_queries, own_score, with_score

LEAST = 2.0**-12  # of above: below it the power loses more of float32 than entmax differs from softmax
TAU, SLOPES, ENTROPIES = "entmax_levels", "entmax_slopes", "entmax_entropies"  # operands, a number for each query


class Power(NamedTuple):
    """known: 1 / above, if the kernel has it, else 0. raised: p, and log_slope: log r, for x > 0 and above."""

    known: int
    raised: Callable[[Any, Any], Any]
    log_slope: Callable[[Any, Any], Any]


KNOWN = {  # by alpha
    2.0: Power(1, lambda x, above: x, lambda x, above: 0.0),
    1.5: Power(2, lambda x, above: x * x, lambda x, above: torch.log(x)),
}
ANY = Power(
    0, lambda x, above: torch.exp2(torch.log2(x) * (1 / above)), lambda x, above: torch.log(x) * (1 / above - 1)
)


def power_of(form: Scores) -> Power:
    return ANY if isinstance(form.alpha, str) else KNOWN.get(form.alpha or 0, ANY)


# ---- functions of x and above, traced in all that follows ----


def weights(power, x, above):
    """p, which nothing divides."""
    return torch.where(x > 0, power.raised(x, above), 0.0)


def slopes(power, x, above):
    """log r, as scores of a softmax: its lse is log sum_j r_j, its o the mean of the values under r."""
    return torch.where(x > 0, power.log_slope(x, above), -math.inf)


def entropies(power, x, above):
    """log(-p log p), as scores of a softmax."""
    log = torch.log(x) * (1 / above)
    return torch.where((x > 0) & (log < 0), torch.log(-log) + log, -math.inf)


def by_alpha(power, x, above, slopes_lse, entropies_lse):
    """d p / d alpha, which nothing divides."""
    p, log = power.raised(x, above), torch.log(x) * (1 / above)
    share = torch.exp(power.log_slope(x, above) - slopes_lse)
    change = (p - share) * (1 / above) - p * log - share * torch.exp(entropies_lse)
    return torch.where(x > 0, change * (1 / above), 0.0)


ROWS = {weights: (TAU,), slopes: (TAU,), entropies: (TAU,), by_alpha: (TAU, SLOPES, ENTROPIES)}
DIVIDED = slopes, entropies


@lru_cache(maxsize=256)
def scaled(form: Scores) -> Scores:
    """Its scores times above, for the levels."""
    return with_score(form, *_scaled(form))


@lru_cache(maxsize=256)  # a step of decoding has a first position of its own, the same in all layers
def given_levels(form: Scores, what: Callable[..., Any], first: int) -> Scores:
    """One of these functions as scores, with ROWS as operands. first: the position of the first query."""
    (change, names), power, rows, above = _scaled(form), power_of(form), ROWS[what], _above(form)

    def score(s, b, h, i, j, **given):
        tau, *others = (given[name][b, h, i - first] for name in rows)
        return what(power, change(s, b, h, i, j, **given) - tau, above(h, given), *others)

    normaliser = "softmax" if what in DIVIDED else "none"
    return with_score(form, score, (*names, *rows), normaliser=normaliser, operands=of_queries(form, rows))


def _scaled(form: Scores) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The score function times above, and the operands that it reads."""
    (own, read), above = own_score(form), _above(form)

    def change(s, b, h, i, j, **given):
        return above(h, given) * own(s, b, h, i, j, given)

    return change, (*read, form.alpha) if isinstance(form.alpha, str) else read


def _above(form: Scores) -> Callable[..., Any]:
    alpha = form.alpha
    if isinstance(alpha, str):
        return lambda h, given: torch.clamp(given[alpha][h] - 1, min=LEAST)
    number = (alpha or 2) - 1
    return lambda h, given: number
