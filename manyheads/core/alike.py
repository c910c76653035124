"""What is to be known of tensors to take one for another, where only the numbers in them may differ; and what is kept
of calls that are alike."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Any

from torch import Tensor

ALIGNED = 16  # bytes: what kernels and descriptors are told of where tensors begin
CALLS = 512  # kinds of calls that are kept in one place, the latest
LOCK = Lock()  # backward passes have threads of their own


def alike(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """Equal for tensors of equal sizes, strides, dtypes and devices, of which the same ones begin at the same place.
    None if one begins at no multiple of ALIGNED bytes."""
    found: list[Any] = []
    places: list[int] = []
    for t in tensors:
        if t is None:
            found.append(None)
            continue
        place = t.data_ptr()
        if place % ALIGNED:
            return None
        places.append(place)
        found += (t.shape, t.stride(), t.dtype, t.device)
    if len({*places}) < len(places):
        found += map(places.index, places)
    return tuple(found)


def keep_latest(kept: dict[Any, Any], key: Any, call: Any) -> None:
    with LOCK:
        kept[key] = call
        while len(kept) > CALLS:
            del kept[next(iter(kept))]
