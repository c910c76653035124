"""The studies, published claims that can be run: one paper, one file, found by walking this folder.

A file `<name>.py` holds a function of the same name under `@study(...)`. There is no list to edit.
"""

from __future__ import annotations

from functools import cache

from manyheads.core.names import UnknownName, unknown
from manyheads.core.published import find
from manyheads.core.study import Study


@cache
def _found() -> dict[str, Study]:
    return find(__name__, __path__, Study, "a function under @study(...)")


def names() -> tuple[str, ...]:
    """The names of all studies, in alphabetical order."""
    return tuple(sorted(_found()))


def get(name: str) -> Study:
    """The study of that name. Raises KeyError with the nearest name if there is none."""
    try:
        return _found()[name]
    except KeyError:
        raise UnknownStudy(unknown("study", name, _found())) from None


class UnknownStudy(UnknownName):
    """A name that no study has."""
