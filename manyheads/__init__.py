"""manyheads: every published attention mechanism behind one function."""

from __future__ import annotations

from typing import Any

from manyheads import layers
from manyheads.core import merge
from manyheads.dispatch import attention, explain
from manyheads.mechanisms import get, names
from manyheads.nn import Attention

__version__ = "0.1.0"
__all__ = ["Attention", "apply", "attention", "cache_bytes", "explain", "get", "layers", "merge", "names", "policies"]

_LAZY = {
    "apply": "manyheads.integrations.transformers",
    "cache_bytes": "manyheads.integrations.transformers",
    "policies": "manyheads.cache",
}


def __getattr__(name: str) -> Any:
    """What touches a foreign library is imported when it is first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")
