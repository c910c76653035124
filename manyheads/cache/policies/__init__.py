"""The policies: one paper, one file, found by walking this folder.

A file `<name>.py` holds a function of the same name under `@policy(...)`. There is no list to edit.
"""

from __future__ import annotations

from functools import cache

from manyheads.cache.policy import Recipe
from manyheads.core.names import UnknownName, unknown
from manyheads.core.published import find


@cache
def _found() -> dict[str, Recipe]:
    return find(__name__, __path__, Recipe, "a function under @policy(...)")


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
