"""The mechanisms: one paper, one file, found by walking this folder.

A file `<family>/<name>.py` holds a function of the same name under `@mechanism(...)`. There is no list to edit.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from manyheads.core.mechanism import Mechanism
from manyheads.core.names import UnknownName, unknown


@cache
def _found() -> dict[str, Mechanism]:
    found: dict[str, Mechanism] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg:
            continue
        name = module.name.rpartition(".")[2]
        mechanism = getattr(import_module(module.name), name, None)
        if not isinstance(mechanism, Mechanism):
            raise TypeError(f"{module.name} must define {name}, a function under @mechanism(...)")
        if name in found:
            raise TypeError(f"{name} is defined twice, in {found[name].family} and in {mechanism.family}")
        found[name] = mechanism
    return found


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
