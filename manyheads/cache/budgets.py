"""How much stays: tokens, or a share of a row's own tokens; for all layers, or one for each."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

Budget = int | float


def per_layer(budget: Any, layers: int, least: int = 1) -> tuple[Budget, ...]:
    """One checked budget for each of `layers` layers, from one for all or a sequence.

    An integer counts tokens and must be at least `least`; a float is a share in (0, 1].
    Raises ValueError, in one sentence, for what is neither.
    """
    if isinstance(budget, Iterable) and not isinstance(budget, str):
        each = tuple(_checked(one, least) for one in budget)
        if len(each) != layers:
            raise ValueError(
                f"budget has {len(each)} entries, but the policy is for {layers} layers: give one for each"
            )
        return each
    return (_checked(budget, least),) * layers


def _checked(budget: Any, least: int) -> Budget:
    wanted = f"a whole number of tokens, at least {least}, or a share of a row's tokens, a float in (0, 1]"
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise ValueError(f"budget must be {wanted}, not {budget!r}")
    if isinstance(budget, Integral):
        if int(budget) < least:
            raise ValueError(f"budget must be {wanted}, not {budget!r}")
        return int(budget)
    share = float(budget)
    if not 0 < share <= 1:  # NaN too
        raise ValueError(f"budget must be {wanted}, not {budget!r}")
    return share


def tokens(budget: Budget, lengths: Tensor, least: int = 1) -> Tensor:
    """The budget of each row in tokens, int64 [batch], for rows with `lengths` tokens.

    A share is rounded to the nearest number of tokens and never falls below `least`.
    """
    if isinstance(budget, int):
        return torch.full_like(lengths, budget)
    return (lengths * budget).round().long().clamp(min=least)
