"""Lifting: a function is rebuilt with the Python numbers that it captured replaced, so that they become arguments.

Numbers are found in closures, globals, defaults and partial applications, through lists, tuples, dicts and the helper
functions of the user. What libraries define, and the attributes of objects, stay as they are.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}


class Lifter:
    """Replaces numbers by what `number` gives for them. An object that is met twice is rebuilt once."""

    def __init__(self, number: Callable[[int | float], Any]):
        self._number = number
        self._lifted: dict[int, tuple[Any, Any]] = {}

    def lift(self, x: Any) -> Any:
        """x with each Python number in it replaced by a node, through containers and the functions of the user."""
        if id(x) in self._lifted:
            return self._lifted[id(x)][1]
        if isinstance(x, bool):
            return x
        if isinstance(x, (int, float)):
            return self._number(float(x) if isinstance(x, float) else int(x))
        if isinstance(x, types.FunctionType):
            return x if _is_library(x) else self._lift_function(x)
        if isinstance(x, types.MethodType):
            return x if _is_library(x) else types.MethodType(self.lift(x.__func__), x.__self__)
        lifted = x
        if type(x) in (list, tuple):
            lifted = type(x)(map(self.lift, x))
        elif type(x) is dict:
            lifted = {key: self.lift(value) for key, value in x.items()}
        elif type(x) is functools.partial:
            keywords = {key: self.lift(value) for key, value in x.keywords.items()}
            lifted = functools.partial(self.lift(x.func), *map(self.lift, x.args), **keywords)
        elif type(x).__module__ == "numpy" and hasattr(x, "dtype"):
            lifted = torch.as_tensor(x) if x.ndim else self.lift(x.item())
        self._lifted[id(x)] = x, lifted  # x is kept, so that its id stays its own
        return lifted

    def _lift_function(self, function: types.FunctionType) -> types.FunctionType:
        closure = function.__closure__
        cells = tuple(types.CellType() for _ in closure) if closure else None
        scope = dict(function.__globals__)
        lifted = types.FunctionType(function.__code__, scope, function.__name__, None, cells)
        self._lifted[id(function)] = function, lifted  # before what it captured: it may refer to itself
        for cell, original in zip(cells or (), closure or (), strict=True):
            try:
                cell.cell_contents = self.lift(original.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for name in _global_names(function.__code__) & scope.keys():
            scope[name] = self.lift(scope[name])
        lifted.__defaults__ = self.lift(function.__defaults__)
        lifted.__kwdefaults__ = self.lift(function.__kwdefaults__)
        lifted.__dict__.update(function.__dict__)
        return lifted


def _is_library(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> set[str]:
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_global_names, nested))
