"""The policies: one paper, one file, found by walking this folder.

A file `<name>.py` holds a function of the same name under `@policy(...)`. There is no list to edit.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from manyheads.cache.policy import Recipe
from manyheads.core.names import UnknownName, unknown


@cache
def _found() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        recipe = getattr(import_module(f"{__name__}.{module.name}"), module.name, None)
        if not isinstance(recipe, Recipe):
            raise TypeError(f"{__name__}.{module.name} must define {module.name}, a function under @policy(...)")
        found[module.name] = recipe
    return found


def names() -> tuple[str, ...]:
    """The names of all policies, in alphabetical order."""
    return tuple(sorted(_found()))


def get(name: str) -> Recipe:
    """The policy of that name. Raises KeyError with the nearest name if there is none."""
    try:
        return _found()[name]
    except KeyError:
        raise UnknownPolicy(unknown("cache policy", name, _found())) from None


class UnknownPolicy(UnknownName):
    """A name that no policy has."""
