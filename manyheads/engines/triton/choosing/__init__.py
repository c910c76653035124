"""Kernels for choosing blocks: for tensors on a GPU they take the place of torch operations in core/builders.py, once
this is called. Triton is loaded when the first of them runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from manyheads.core import builders

NAMES = ("block_means", "heaviest", "best", "best_past", "fewest_past", "listed", "transposed")


def register() -> None:
    for name in NAMES:
        getattr(builders, name).register_kernel("cuda")(_later(name))


def _later(name: str) -> Any:
    def run(*args: Any) -> Any:
        return getattr(import_module(f"{__name__}.launches"), name)(*args)

    return run
