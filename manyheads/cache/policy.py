"""A policy: which of the stored keys and values stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from manyheads.core.published import Published


@dataclass(frozen=True, eq=False)
class Context:
    """What a policy sees after a step's attention: the step's queries and everything that is stored.

    q: [batch, heads, q_len, head_dim]; k: [batch, kv_heads, n, head_dim]; v: [batch, kv_heads, n, v_head_dim].
    q_positions: int64 [batch, q_len]; kv_positions: int64 [batch, kv_heads, n]. They count a row's own tokens from 0;
        -1 marks an absent one (padding, a free place). Stored tokens are in ascending order.
    scale: multiplies q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_positions: Tensor
    kv_positions: Tensor
    scale: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy:
    """Keeps the `budget` tokens of highest importance, and gives back the memory of the others.

    score: Context -> importance [batch, kv_heads, n], or [batch, 1, n] if not per_head. Equal ones go to the earlier
        token; what is absent never stays, whatever its score.
    when: "always", after every step; "prefill", after steps of more than one token; "never", and all stays.
    per_head: whether kv heads may keep different tokens. If not, they share one list of positions.
    least: the smallest budget that the policy makes sense with.
    name: for messages.
    """

    score: Callable[[Context], Tensor]
    when: Literal["always", "prefill", "never"] = "always"
    per_head: bool = True
    least: int = 1
    name: str = "this policy"


@dataclass(frozen=True, eq=False, kw_only=True)
class Recipe(Published):
    """One published policy. Call it with settings for a Policy."""

    def __call__(self, **settings: Any) -> Policy:
        """Raises TypeError for an unknown setting, ValueError for a value that does not fit."""
        self.check_names(settings)
        return self.factory(**settings)


def policy(*, arxiv: str = "", system: str = "") -> Callable[[Callable[..., Policy]], Recipe]:
    """Turn a factory of policies into a Recipe; its name is the function's."""

    def declare(factory: Callable[..., Policy]) -> Recipe:
        return Recipe(name=factory.__name__, factory=factory, arxiv=arxiv, system=system)

    return declare


def whole_number(name: str, value: Any, least: int) -> int:
    """The value, if it is an integer of at least `least`. Raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value
