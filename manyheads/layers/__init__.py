"""The layers, x -> x: one paper, one file, found by walking this folder.

A file `<family>/<name>.py` holds a torch module under `@layer(...)`. There is no list to edit.
"""

from __future__ import annotations

from manyheads.core.layer import Layer
from manyheads.core.names import UnknownName
from manyheads.core.published import Shelf


class UnknownLayer(UnknownName):
    """A name that no layer has."""


_SHELF = Shelf(__name__, __path__, Layer, rule="a class under @layer(...)", what="layer", error=UnknownLayer)
names, get = _SHELF.names, _SHELF.get
