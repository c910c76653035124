"""Kernels for choosing blocks: for tensors on a GPU they take the place of torch operations in core/builders.py, once
this is called. Triton is loaded when the first of them runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from manyheads.core import builders

NAMES = {
    "launches": ("block_means", "heaviest", "best", "best_past", "fewest_past", "listed", "transposed"),
    "weighing": ("best_windows", "stripes"),
    "estimating": ("tournament", "by_four_bits"),
    "crossing": ("heaviest_stripes", "heaviest_cells", "crossed"),
    "sorting": ("hashed", "in_order", "to_blocks", "from_blocks"),
    "attending": ("attended", "attended_gradients"),
}


def register() -> None:
    for module, names in NAMES.items():
        for name in names:
            getattr(builders, name).register_kernel("cuda", _later(module, name))


def _later(module: str, name: str) -> Any:
    def run(*args: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(*args)

    return run
