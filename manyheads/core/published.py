"""What mechanisms, cache policies and layers have in common: a paper, settings, and a file that is found."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from manyheads.core.names import UnknownName, unknown


@dataclass(frozen=True, eq=False, kw_only=True)
class Published:
    """A published idea that settings turn into something that runs.

    name: the file's. factory: takes the settings. arxiv: the paper's number, or "".
    system: the catalogue's name of the published system, or "" for one that stands beside it.
    ranges: the least and the greatest value of a setting; without an entry whole numbers start at 1, others at 0.
    """

    name: str
    factory: Callable[..., Any]
    arxiv: str
    system: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings and their defaults; a size that has none is not among them."""
        return {name: p.default for name, p in self._named.items() if p.default is not p.empty}

    @property
    def required(self) -> tuple[str, ...]:
        """The sizes that have no default."""
        return tuple(name for name in self._named if name not in self.settings)

    @property
    def text(self) -> str:
        """The file's docstring: one sentence, the equation, the citation."""
        return inspect.cleandoc(inspect.getmodule(self.factory).__doc__ or "")

    @property
    def summary(self) -> str:
        return self.text.split("\n\n")[0].replace("\n", " ")

    def check_names(self, given: Iterable[str]) -> None:
        """Raises TypeError for a setting that there is not, unless the factory passes such on with **."""
        for name in given:
            if name not in self._named and not self._passes_on:
                raise TypeError(unknown(f"setting of {self.name}", name, self._named))

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises TypeError for an unknown setting or a wrong type, ValueError for a number out of range."""
        self.check_names(given)
        for name, value in given.items():
            if name not in self._named:
                continue
            if not _fits(value, self._types[name]):
                raise TypeError(f"{name} of {self.name} must be {_written(self._types[name])}, not {value!r}")
            low, high = self.range(name)
            if isinstance(value, int | float) and not low <= value <= high:  # NaN is nowhere
                raise ValueError(f"{name} of {self.name} must be {_between(low, high)}, not {value!r}")

    def range(self, name: str) -> tuple[float, float]:
        """The least and the greatest value of a setting that is a number."""
        kinds = get_args(self._types[name]) or (self._types[name],)
        return self.ranges.get(name, (0 if float in kinds or bool in kinds else 1, math.inf))

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.factory).parameters)

    @cached_property
    def _named(self) -> dict[str, inspect.Parameter]:
        return {name: p for name, p in self._parameters.items() if p.kind is not p.VAR_KEYWORD}

    @property
    def _passes_on(self) -> bool:
        return len(self._named) < len(self._parameters)

    @cached_property
    def _types(self) -> dict[str, Any]:
        factory = self.factory.__init__ if inspect.isclass(self.factory) else self.factory
        hints = get_type_hints(factory)
        return {name: hints.get(name, object) for name in self._named}


Kind = TypeVar("Kind", bound=Published)


def find(package: str, path: Iterable[str], kind: type[Kind], rule: str) -> dict[str, Kind]:
    """What the files below a package publish: one thing of this kind each, under the file's own name.

    A class is published by its attribute `published`. rule: for messages, how such a thing is written.
    """
    found: dict[str, Kind] = {}
    for module in pkgutil.walk_packages(path, f"{package}."):
        if module.ispkg:
            continue
        name = module.name.rpartition(".")[2]
        defined = (getattr(value, "published", value) for value in vars(import_module(module.name)).values())
        own = next((one for one in defined if isinstance(one, kind) and one.name == name), None)
        if own is None:
            raise TypeError(f"{module.name} must define {name}, {rule}")
        if name in found:
            raise TypeError(f"{name} is defined twice, the second time in {module.name}")
        found[name] = own
    return found


class Shelf(Generic[Kind]):
    """What a package publishes, by name: `find`, done when it is first asked for.

    what: for messages, what such a thing is called. error: what an unknown name raises.
    """

    def __init__(
        self, package: str, path: Iterable[str], kind: type[Kind], *, rule: str, what: str, error: type[UnknownName]
    ):
        self._look = cache(lambda: find(package, path, kind, rule))
        self._what, self._error = what, error

    def names(self) -> tuple[str, ...]:
        """All names, in alphabetical order."""
        return tuple(sorted(self._look()))

    def get(self, name: str) -> Kind:
        """What has that name. Raises KeyError with the nearest name if nothing has."""
        found = self._look()
        if name not in found:
            raise self._error(unknown(self._what, name, found))
        return found[name]


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
