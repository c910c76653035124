"""The policies: one paper, one file, found by walking this folder.

A file `<name>.py` holds a function of the same name under `@policy(...)`. There is no list to edit.
"""

from __future__ import annotations

from manyheads.cache.policy import Recipe
from manyheads.core.names import UnknownName
from manyheads.core.published import Shelf


class UnknownPolicy(UnknownName):
    """A name that no policy has."""


_SHELF = Shelf(
    __name__, __path__, Recipe, rule="a function under @policy(...)", what="cache policy", error=UnknownPolicy
)
names, get = _SHELF.names, _SHELF.get
