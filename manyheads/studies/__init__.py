"""The studies, published claims that can be run: one paper, one file, found by walking this folder.

A file `<name>.py` holds a function of the same name under `@study(...)`. There is no list to edit.
"""

from __future__ import annotations

from manyheads.core.names import UnknownName
from manyheads.core.published import Shelf
from manyheads.core.study import Study


class UnknownStudy(UnknownName):
    """A name that no study has."""


_SHELF = Shelf(__name__, __path__, Study, rule="a function under @study(...)", what="study", error=UnknownStudy)
names, get = _SHELF.names, _SHELF.get
