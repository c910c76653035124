"""A mechanism: a factory that returns a form, with the facts about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from manyheads.core.forms import Form
from manyheads.core.published import Published


@dataclass(frozen=True)
class Law:
    """`mechanism(**settings)` equals the mechanism `equals` with `other` settings, on any input."""

    settings: Mapping[str, Any]
    equals: str
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mechanism(Published):
    """One published mechanism. Call it with settings for its form; equal settings give the same form object.

    reference: the equation, position by position, (q, k, v, **settings, **operands) -> o, for equal numbers of heads.
    examples: settings to test with, small enough for a dozen tokens.
    laws: special cases that equal another mechanism.
    causal: no output depends on a later position. A setting of this name says otherwise for its form.
    sees_future: why an output may depend on later positions although later keys are masked; "" if it does not.
    trained: True if a model must be trained with it; False if it stands in for softmax attention in a trained model.
    at: settings for a context of n tokens, where the paper's defaults are made for longer ones.
    tolerance: a factor on the tests' bounds, with `tolerance_reason`.
    """

    family: str
    reference: Callable
    examples: tuple[Mapping[str, Any], ...]
    laws: tuple[Law, ...]
    causal: bool
    sees_future: str
    trained: bool
    at: Callable[[int], Mapping[str, Any]] | None
    tolerance: float
    tolerance_reason: str

    def __call__(self, **settings: Any) -> Form:
        self.check(settings)
        return self._form(tuple({**self.settings, **settings}.items()))

    @lru_cache(maxsize=256)  # noqa: B019  a mechanism lives as long as the process
    def _form(self, settings: tuple[tuple[str, Any], ...]) -> Form:
        return self.factory(**dict(settings))


def mechanism(
    *,
    reference: Callable,
    arxiv: str,
    system: str = "",
    examples: tuple[Mapping[str, Any], ...] = ({},),
    laws: tuple[Law, ...] = (),
    causal: bool = True,
    sees_future: str = "",
    trained: bool = False,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    at: Callable[[int], Mapping[str, Any]] | None = None,
    tolerance: float = 1.0,
    tolerance_reason: str = "",
) -> Callable[[Callable[..., Form]], Mechanism]:
    """Turn a factory of forms into a Mechanism; its name is the function's, its family the folder's."""

    def declare(factory: Callable[..., Form]) -> Mechanism:
        family = factory.__module__.split(".")[-2]
        return Mechanism(
            name=factory.__name__, family=family, factory=factory, reference=reference, arxiv=arxiv, system=system,
            examples=examples, laws=laws, causal=causal, sees_future=sees_future, trained=trained,
            ranges=ranges or {}, at=at, tolerance=tolerance, tolerance_reason=tolerance_reason,
        )  # fmt: skip

    return declare
