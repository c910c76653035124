"""Calls once more, with other tensors: the second call of a kind is watched, the ones after it only launch what it did.

    given = x.q, x.k, x.v, *x.operands.values()
    o, lse = replayed(key_of(form, x, given), given, form.program.tensors, tables, lambda: forward.run(form, x))

Between two calls with equal keys nothing differs but where tensors lie, so that shapes, tables of tiles, descriptors'
strides and a kernel's specialisation need not be found again, which takes several times as long as a short kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from manyheads.core.alike import alike, keep_latest
from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs
from manyheads.engines.triton import quick

Key = tuple[Any, ...]
Made = tuple[Tensor | None, ...]
Given = Sequence[Tensor | None]
Make = Callable[[Tensor], Tensor]
APART = 512  # bytes


def key_of(form: Scores, x: Inputs, given: Given, *rest: Any) -> Key | None:
    """What a call depends on besides the numbers in `given`, x's operands among them, and in captured tensors; None if
    that is not all known by name."""
    if x.ragged or x.dropout is not None:
        return None
    facts = alike(given)
    return None if facts is None else (form, x.scale, x.q_positions, x.kv_positions, *x.operands, *rest, facts)


def replayed(
    key: Key | None, given: Given, captured: Sequence[Tensor], still: Callable[[], Iterable[Tensor]],
    compute: Callable[[], Made],
) -> Made:  # fmt: skip
    """What `compute` gives: tensors of `quick.empty` and the like, given ones, or None. still: what its launches may
    read besides `given`, the same for equal keys as long as nobody writes to the captured tensors."""
    if key is None:
        return compute()
    call = _KNOWN.get(key)
    made = None if call is None else call(given)
    if made is not None:
        return made
    with quick.watched() as seen:
        made = compute()
    call = call_of(seen, given, made, captured, still())
    if call is not None:
        keep_latest(_KNOWN, key, call)
    return made


def forget() -> None:
    """For who changed what calls depend on besides, as tables of tiles."""
    _KNOWN.clear()


def known(key: Key | None) -> Call | None:
    return None if key is None else _KNOWN.get(key)


_KNOWN: dict[Key, Call] = {}


@dataclass(frozen=True, eq=False)
class Launch:
    """Tensors by their numbers. boxes: a tensor, and from where it lies to its descriptor. slots: places among the
    arguments, and which tensor goes there."""

    direct: quick.Direct
    programs: int
    boxes: tuple[tuple[int, Callable[[int], list[Any]]], ...]
    arguments: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]

    def __call__(self, places: Sequence[int], stream: int) -> None:
        expanded: list[Any] = []
        for number, encoded in self.boxes:
            expanded += encoded(places[number])
        arguments = [*self.arguments]
        for at, number in self.slots:
            arguments[at] = places[number]
        self.direct.start(self.programs, stream, expanded, arguments)


@dataclass(frozen=True, eq=False)
class Call:
    """Launches. Tensors are numbered: given ones, then fresh ones that are results, each made like one in `fresh`, then
    those that nobody sees, which are parts of few: `scratch`, with where in it they begin. made: the results. captured:
    tensors and the versions that they must have still. kept: what launches read besides."""

    device: int
    fresh: tuple[tuple[Make, Tensor], ...]
    scratch: tuple[tuple[Make, Tensor, tuple[int, ...]], ...]
    launches: tuple[Launch, ...]
    made: tuple[int | None, ...]
    captured: tuple[tuple[Tensor, int, int], ...]
    kept: tuple[Tensor, ...]

    def __call__(self, given: Given) -> Made | None:
        """None if it has to go the ordinary way."""
        active: Any = driver.active
        device = active.get_current_device()
        if device != self.device or quick.hooks_wait():
            return None
        for tensor, version, place in self.captured:
            if tensor._version != version or tensor.data_ptr() != place:
                return None
        tensors: list[Any] = [*given, *[make(like) for make, like in self.fresh]]
        places = [0 if t is None else t.data_ptr() for t in tensors]
        blocks = [make(like) for make, like, _ in self.scratch]
        for block, (_, _, begins) in zip(blocks, self.scratch, strict=True):
            first = block.data_ptr()
            places += [first + begin for begin in begins]
        stream = active.get_current_stream(device)
        for launch in self.launches:
            launch(places, stream)
        return tuple([None if number is None else tensors[number] for number in self.made])


def call_of(
    seen: quick.Seen, given: Given, made: Made, captured: Sequence[Tensor], still: Iterable[Tensor]
) -> Call | None:  # fmt: skip
    """None if some launch was not direct, or touched what is neither given, nor fresh, nor still: a copy of something
    given, as it was then. Nor is it known when a tensor of inference mode is written to. And if torch wrote to what is
    fresh, that is not repeated."""
    if not seen.launches or any(t.is_inference() for t in captured):
        return None
    if any(not t.is_inference() and t._version for _, t in seen.fresh):
        return None
    results = [(make, t) for make, t in seen.fresh if any(t is own for own in made)]
    hidden: dict[Make, list[Tensor]] = {}
    for make, t in seen.fresh:
        if not any(t is own for own in made):
            hidden.setdefault(make, []).append(t)
    known = (*given, *[t for _, t in results], *chain(*hidden.values()))
    numbers = {t.data_ptr(): number for number, t in reversed([*enumerate(known)]) if t is not None}
    kept = {t.data_ptr(): t for t in still}
    launches, used = [], {}
    for direct, programs, boxes, arguments in seen.launches:
        places = [a.data_ptr() if isinstance(a, Tensor) else None for a in arguments]
        slots = {at: place for at, place in enumerate(places) if place is not None and place not in kept}
        used |= {place: kept[place] for place in places if place in kept}
        if not {*slots.values(), *(box.base.data_ptr() for box in boxes)} <= numbers.keys():
            return None
        # An address is less work for Triton's launcher than a tensor.
        rest = tuple(a if place is None else place for a, place in zip(arguments, places, strict=True))
        own = tuple((numbers[box.base.data_ptr()], _encoder(direct, at, box)) for at, box in enumerate(boxes))
        launches.append(Launch(direct, programs, own, rest, tuple((at, numbers[p]) for at, p in slots.items())))
    found = tuple(None if t is None else next((n for n, own in enumerate(known) if own is t), -1) for t in made)
    if used.keys() & numbers.keys() or -1 in found:
        return None
    # Torch takes a tensor to make another like it in half the time that it takes sizes.
    fresh = tuple((make, _without_numbers(t)) for make, t in results)
    scratch = tuple((make, *_together(tensors)) for make, tensors in hidden.items())
    versions = tuple((t, t._version, t.data_ptr()) for t in captured)
    device = seen.fresh[0][1].device.index or 0
    return Call(device, fresh, scratch, tuple(launches), found, versions, tuple(used.values()))


def _without_numbers(t: Tensor) -> Tensor:
    """As empty_like sees it laid out as t."""
    return _bare(t.new_empty(1).expand(t.shape) if t.is_contiguous() else torch.empty_like(t))


def _together(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """What a tensor with room for all is made like, and where in it they begin, aligned as torch's tensors are."""
    *begins, end = accumulate([-(-t.untyped_storage().nbytes() // APART) * APART for t in tensors], initial=0)
    return _bare(tensors[0].new_empty(1, dtype=torch.uint8).expand(end)), tuple(begins)


def _bare(t: Tensor) -> Tensor:
    """Without memory, which would be held as long as a call is known, and may be a graph's own."""
    t.untyped_storage().resize_(0)
    return t


def _encoder(direct: quick.Direct, at: int, box: quick.Box) -> Callable[[int], list[Any]]:
    shape, strides = tuple(box.shape), tuple(box.strides)
    encode: Any = direct.encode  # there, as there are boxes
    return lru_cache(quick.ENCODED)(lambda place: encode(at, place, shape, strides))
