"""Gluon's names on Hopper GPUs, as Triton 3.6 to 3.9 have them. Only this file knows that they moved."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor", "fence_async_shared", "gl", "gluon", "mbarrier", "reinterpret", "tma_load", "tma_store",
    "tma_store_wait", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

# 3.8 added the names async_load and async_store, and in 3.9 the older ones only raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
# 3.8 wants as many bytes as before, and 3.9 took the underscore away.
_shared = gl.shared_memory_descriptor
reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret
