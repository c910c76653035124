"""The mechanisms: one paper, one file, found by walking this folder.

A file `<family>/<name>.py` holds a function of the same name under `@mechanism(...)`. There is no list to edit.
"""

from __future__ import annotations

from functools import cache

from manyheads.core.mechanism import Mechanism
from manyheads.core.names import UnknownName, unknown
from manyheads.core.published import find


@cache
def _found() -> dict[str, Mechanism]:
    return find(__name__, __path__, Mechanism, "a function under @mechanism(...)")


def names() -> tuple[str, ...]:
    """The names of all mechanisms, in alphabetical order."""
    return tuple(sorted(_found()))


def get(name: str) -> Mechanism:
    """The mechanism of that name. Raises KeyError with the nearest name if there is none."""
    try:
        return _found()[name]
    except KeyError:
        raise UnknownMechanism(unknown("mechanism", name, _found())) from None


class UnknownMechanism(UnknownName):
    """A name that no mechanism has."""
