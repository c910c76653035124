"""Calls once more, with other tensors: the second call of a kind is watched, the ones after it only launch what it did.

    key = key_of(form, x, (x.q, x.k, x.v))
    o, lse = replayed(key, (x.q, x.k, x.v), still, lambda: forward.run(form, x))

Between two calls with equal keys nothing differs but where tensors lie, so that shapes, tables of tiles, descriptors'
strides and a kernel's specialisation need not be found again, which takes several times as long as a short kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.engines.triton import quick

CALLS = 512  # kinds of calls that are kept, the latest used
ALIGNED = 16  # bytes: what descriptors and kernels are told of pointers

Key = tuple[Any, ...]
Made = tuple[Tensor | None, ...]


def key_of(form: Scores, x: Inputs, given: Sequence[Tensor | None], *rest: Any) -> Key | None:
    """What a call depends on besides the numbers in `given`; None if that is not all known by name."""
    if x.operands or x.ragged or x.dropout is not None or any(t.is_inference() for t in form.program.tensors):
        return None
    places = [0 if t is None else t.data_ptr() for t in given]
    if any(place % ALIGNED for place in places):
        return None
    tensors = [None if t is None else (t.shape, t.stride(), t.dtype) for t in given]
    same = [places.index(place) for place in places]  # a tensor may be given twice
    versions = [t._version for t in form.program.tensors]
    return form, x.q.device, x.scale, x.q_positions, x.kv_positions, *tensors, *same, *versions, *rest


def replayed(
    key: Key | None, given: Sequence[Tensor | None], still: Callable[[], Iterable[Tensor]], compute: Callable[[], Made]
) -> Made:  # fmt: skip
    """What `compute` gives: tensors of `quick.empty`, or None. still: what its launches may read besides `given`, the
    same for equal keys."""
    if key is None:
        return compute()
    call = _KNOWN.get(key)
    made = None if call is None else call(given)
    if made is not None:
        return made
    with quick.watched() as seen:
        made = compute()
    call = call_of(seen, given, made, still())
    if call is not None:
        _KNOWN[key] = call
        while len(_KNOWN) > CALLS:
            del _KNOWN[next(iter(_KNOWN))]
    return made


def known(key: Key | None) -> Call | None:
    return None if key is None else _KNOWN.get(key)


_KNOWN: dict[Key, Call] = {}


@dataclass(frozen=True, eq=False)
class Launch:
    """boxes: which tensor, its shape and strides. slots: places among the arguments, and which tensor goes there."""

    direct: quick.Direct
    programs: int
    boxes: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    arguments: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Call:
    """Launches. Tensors are numbered: given ones, then fresh ones, of these shapes and dtypes. made: the results."""

    device: torch.device
    fresh: tuple[tuple[torch.Size, torch.dtype], ...]
    launches: tuple[Launch, ...]
    made: tuple[int | None, ...]

    def __call__(self, given: Sequence[Tensor | None]) -> Made | None:
        """None if it has to go the ordinary way."""
        active: Any = driver.active
        device = active.get_current_device()
        if device != (self.device.index or 0) or quick.hooks_wait():
            return None
        fresh = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.fresh]
        tensors: Any = (*given, *fresh)
        stream = active.get_current_stream(device)
        for launch in self.launches:
            expanded: list[Any] = []
            for place, (number, shape, strides) in enumerate(launch.boxes):
                expanded += launch.direct.encoded(place, tensors[number].data_ptr(), shape, strides)  # type: ignore[misc]
            arguments = [*launch.arguments]
            for place, number in launch.slots:
                arguments[place] = tensors[number]
            launch.direct.start(launch.programs, stream, expanded, arguments)
        return tuple([None if number is None else tensors[number] for number in self.made])


def call_of(seen: quick.Seen, given: Sequence[Tensor | None], made: Made, still: Iterable[Tensor]) -> Call | None:
    """None if some launch was not direct, or touched what is neither given, nor fresh, nor still: a copy of something
    given, as it was then."""
    known = (*given, *seen.fresh)
    numbers = {t.data_ptr(): number for number, t in reversed([*enumerate(known)]) if t is not None}
    kept = {t.data_ptr() for t in still}
    launches = []
    for direct, programs, boxes, arguments in seen.launches or ():
        slots = {
            at: a.data_ptr() for at, a in enumerate(arguments) if isinstance(a, Tensor) and a.data_ptr() not in kept
        }
        if not {*slots.values(), *(box.base.data_ptr() for box in boxes)} <= numbers.keys():
            return None
        rest = tuple(None if at in slots else a for at, a in enumerate(arguments))
        own = tuple((numbers[box.base.data_ptr()], tuple(box.shape), tuple(box.strides)) for box in boxes)
        launches.append(Launch(direct, programs, own, rest, tuple((at, numbers[p]) for at, p in slots.items())))
    if not launches or any(t is not None and t.data_ptr() not in numbers for t in made):
        return None
    fresh = tuple((t.shape, t.dtype) for t in seen.fresh)
    results = tuple(None if t is None else numbers[t.data_ptr()] for t in made)
    return Call(seen.fresh[0].device, fresh, tuple(launches), results)
