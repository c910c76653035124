"""A mechanism: a factory that returns a form, with the facts about it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, get_args, get_type_hints

from manyheads.core.forms import Form
from manyheads.core.names import unknown


@dataclass(frozen=True)
class Law:
    """`mechanism(**settings)` equals the mechanism `equals` with `other` settings, on any input."""

    settings: Mapping[str, Any]
    equals: str
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Mechanism:
    """One published mechanism. Call it with settings for its form; equal settings give the same form object.

    reference: the equation, position by position, (q, k, v, **settings, **operands) -> o, for equal numbers of heads.
    system: the catalogue's name of the published system, or "" for one that stands beside it.
    examples: settings to test with, small enough for a dozen tokens.
    laws: special cases that equal another mechanism.
    causal: no output depends on a later position.
    sees_future: why an output may depend on later positions although later keys are masked; "" if it does not.
    trained: True if a model must be trained with it; False if it stands in for softmax attention in a trained model.
    ranges: the least and the greatest value of a setting; without an entry whole numbers start at 1, others at 0.
    at: settings for a context of n tokens, where the paper's defaults are made for longer ones.
    tolerance: a factor on the tests' bounds, with `tolerance_reason`.
    """

    name: str
    family: str
    factory: Callable[..., Form]
    reference: Callable
    arxiv: str
    system: str
    examples: tuple[Mapping[str, Any], ...]
    laws: tuple[Law, ...]
    causal: bool
    sees_future: str
    trained: bool
    ranges: Mapping[str, tuple[float, float]]
    at: Callable[[int], Mapping[str, Any]] | None
    tolerance: float
    tolerance_reason: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.factory).parameters.items()}

    @cached_property
    def _types(self) -> dict[str, Any]:
        hints = get_type_hints(self.factory)
        return {name: hints.get(name, object) for name in self.settings}

    @property
    def text(self) -> str:
        """The file's docstring: one sentence, the equation, the citation."""
        return inspect.cleandoc(inspect.getmodule(self.factory).__doc__ or "")

    @property
    def summary(self) -> str:
        return self.text.split("\n\n")[0].replace("\n", " ")

    def __call__(self, **settings: Any) -> Form:
        for name, value in settings.items():
            if name not in self.settings:
                raise TypeError(unknown(f"setting of {self.name}", name, self.settings))
            if not _fits(value, self._types[name]):
                raise TypeError(f"{name} of {self.name} must be {_written(self._types[name])}, not {value!r}")
            low, high = self.range(name)
            if isinstance(value, int | float) and not low <= value <= high:  # NaN is nowhere
                raise ValueError(f"{name} of {self.name} must be {_between(low, high)}, not {value!r}")
        return self._form(tuple({**self.settings, **settings}.items()))

    def range(self, name: str) -> tuple[float, float]:
        """The least and the greatest value of a setting that is a number."""
        kinds = get_args(self._types[name]) or (self._types[name],)
        return self.ranges.get(name, (0 if float in kinds else 1, math.inf))

    @lru_cache(maxsize=256)  # noqa: B019  a mechanism lives as long as the process
    def _form(self, settings: tuple[tuple[str, Any], ...]) -> Form:
        return self.factory(**dict(settings))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a class, or several with | between them."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _between(low: float, high: float) -> str:
    return f"{low} or more" if high == math.inf else f"between {low} and {high}"


def _written(kind: Any) -> str:
    return " or ".join(getattr(k, "__name__", str(k)).replace("NoneType", "None") for k in get_args(kind) or (kind,))


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
