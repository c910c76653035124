"""The layers, x -> x: one paper, one file, found by walking this folder.

A file `<family>/<name>.py` holds a torch module under `@layer(...)`. There is no list to edit.
"""

from __future__ import annotations

from functools import cache

from manyheads.core.layer import Layer
from manyheads.core.names import UnknownName, unknown
from manyheads.core.published import find


@cache
def _found() -> dict[str, Layer]:
    return find(__name__, __path__, Layer, "a class under @layer(...)")


def names() -> tuple[str, ...]:
    """The names of all layers, in alphabetical order."""
    return tuple(sorted(_found()))


def get(name: str) -> Layer:
    """The layer of that name. Raises KeyError with the nearest name if there is none."""
    try:
        return _found()[name]
    except KeyError:
        raise UnknownLayer(unknown("layer", name, _found())) from None


class UnknownLayer(UnknownName):
    """A name that no layer has."""
