"""The mechanisms: one paper, one file, found by walking this folder.

A file `<family>/<name>.py` holds a function of the same name under `@mechanism(...)`. There is no list to edit.
"""

from __future__ import annotations

from manyheads.core.mechanism import Mechanism
from manyheads.core.names import UnknownName
from manyheads.core.published import Shelf


class UnknownMechanism(UnknownName):
    """A name that no mechanism has."""


_SHELF = Shelf(
    __name__, __path__, Mechanism, rule="a function under @mechanism(...)", what="mechanism", error=UnknownMechanism
)
names, get = _SHELF.names, _SHELF.get
