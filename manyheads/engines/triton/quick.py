"""Launches past Triton's binder, which takes longer than a short kernel. The first call of a kind goes the ordinary way
and leaves a compiled kernel behind; the next ones find it under all that could compile differently.

    box = Box(q, tuple(q.shape), q.stride(), kind)          # in place of a TensorDescriptor
    launch(entry, programs, (box, ..., lse, q_len, ...), num_warps=4)

Two things that the ordinary launch does are left out: it compares the kernel's globals with what they were when it was
compiled, and it encodes descriptors anew each time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from copy import copy
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import getclosurevars, signature
from itertools import repeat
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import AsyncCompileMode, knobs
from triton._C.libtriton import native_specialize_impl as specialise
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ENCODED = 256  # descriptors that are kept for a compiled kernel
LEAST_PYTHON = 3, 11, 8  # of threads that parse at the same time: python/cpython#106905

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Kind:
    """What is compiled of a descriptor. Make each once: kinds are told apart by identity.

    make: TensorDescriptor. block, layout: as it takes them.
    """

    make: Callable[..., Any]
    block: tuple[int, ...]
    layout: Any


class Box(NamedTuple):
    """A tensor that the hardware copies box by box."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: Kind

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self.kind.block

    def descriptor(self) -> Any:
        return self.kind.make(self.base, list(self.shape), list(self.strides), list(self.kind.block), self.kind.layout)


def launch(entry: Any, programs: int, arguments: Sequence[Any], **options: Any) -> None:
    """entry[(programs,)](*arguments, **options), for a grid of one dimension. Boxes come before all other arguments."""
    unknown = getattr(_WATCH, "unknown", None)
    if why_not(entry) is not None:
        if not unknown:
            ordinary(entry, programs, arguments, **options)
        return
    active: Any = driver.active
    device = active.get_current_device()
    key, boxes, rest = _kind(entry, device, arguments, options)
    direct = _KNOWN.get(key)
    if unknown is not None and direct is None:
        unknown.append((entry, arguments, options))
    if unknown:
        return
    if direct is None:
        compiled = ordinary(entry, programs, arguments, **options)
        if isinstance(compiled, CompiledKernel):  # a hook of Triton's may have kept it from being compiled
            _KNOWN[key] = Direct(compiled, len(boxes))
        return
    if (seen := _watching()) is not None and seen.launches is not None:
        seen.launches.append(Watched(direct, programs, boxes, rest))
    direct(programs, active.get_current_stream(device), boxes, rest)


def _kind(
    entry: Any, device: int, arguments: Sequence[Any], options: dict[str, Any]
) -> tuple[tuple[Any, ...], Sequence[Box], Sequence[Any]]:
    """All that could compile differently; the boxes, and the other arguments."""
    count = 0
    while count < len(arguments) and type(arguments[count]) is Box:
        count += 1
    boxes, rest = arguments[:count], arguments[count:]
    key = (
        entry, device, _knobs(), *options.items(), *[(box.kind, box.base.dtype) for box in boxes],
        *_types(entry, count)(rest),
    )  # fmt: skip
    return key, boxes, rest


def _described(arguments: Sequence[Any]) -> list[Any]:
    return [a.descriptor() if type(a) is Box else a for a in arguments]


def ordinary(entry: Any, programs: int, arguments: Sequence[Any], **options: Any) -> Any:
    if (seen := _watching()) is not None:
        seen.launches = None
    return entry[(programs,)](*_described(arguments), **options)


def why_not(entry: Any) -> str | None:
    """Why `launch` goes the ordinary way each time."""
    if not isinstance(entry, JITFunction):
        return "it is interpreted"
    if entry.pre_run_hooks:
        return "it has hooks that run before it"
    if hooks_wait():
        return "hooks wait for launches, as a profiler's do"
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return "a hook may change how it is compiled"
    return None


def hooks_wait() -> bool:
    return _waiting(knobs.runtime.launch_enter_hook) or _waiting(knobs.runtime.launch_exit_hook)


def _waiting(hook: Any) -> bool:
    """A hook is a chain of calls, which may be empty, or a function that was put in its place."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _knobs() -> tuple[Any, ...]:
    """What is compiled of Triton's settings; the last one came with 3.9."""
    compilation = knobs.compilation
    debug, mode = knobs.runtime.debug, compilation.instrumentation_mode
    return debug, mode, getattr(compilation, "fpsan_homomorphic_casts", None)


_KNOWN: dict[tuple[Any, ...], Direct] = {}


@cache
def _types(entry: JITFunction, boxes: int) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What is compiled of the arguments behind the boxes: constants with their values, of others what Triton's binder
    finds, by the same function and with the same flags."""
    own = list(enumerate(entry.params[boxes:]))
    fixed = _picked([place for place, p in own if p.is_constexpr])
    others = [(place, p) for place, p in own if not p.is_constexpr]
    free = _picked([place for place, _ in others])
    flags = [(p.is_const, not p.do_not_specialize, not p.do_not_specialize_on_alignment) for _, p in others]
    columns = tuple(zip(*flags, strict=True))
    active: Any = driver.active
    backend = entry.device_caches[active.get_current_device()][3]

    def types(arguments: Sequence[Any]) -> tuple[Any, ...]:
        constants = fixed(arguments)
        return *map(specialise, repeat(backend), free(arguments), *columns), *constants, *map(type, constants)

    return types


def _picked(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda arguments: tuple(arguments[place] for place in places)


class Direct:
    """A compiled kernel that takes descriptors encoded, with their shapes and strides behind them."""

    def __init__(self, compiled: Any, boxes: int):
        self.run = _below(compiled.run) if boxes else compiled.run
        self.compiled = compiled  # which unloads itself when it goes
        self.of = compiled.function, compiled.packed_metadata
        self.encode = _encoder(compiled) if boxes else None
        self.encoded = lru_cache(ENCODED)(self.encode) if self.encode else None

    def __call__(self, programs: int, stream: int, boxes: Sequence[Box], arguments: Sequence[Any]) -> None:
        expanded: list[Any] = []
        for place, (base, shape, strides, _) in enumerate(boxes):
            expanded += self.encoded(place, base.data_ptr(), shape, strides)  # type: ignore[misc]  there are boxes
        self.start(programs, stream, expanded, arguments)

    def start(self, programs: int, stream: int, expanded: Sequence[Any], arguments: Sequence[Any]) -> None:
        """expanded: the boxes, encoded."""
        self.run(programs, 1, 1, stream, *self.of, None, None, None, *expanded, *arguments)


def _below(run: Any) -> Any:
    """The launcher without what encodes descriptors: a function around another one, which it calls `launcher`, in
    Triton 3.6 to 3.9. How the inner one is called differs, but the launcher object knows."""
    below = copy(run)
    below.launch = getclosurevars(run.launch).nonlocals["launcher"]
    return below


class _Base(NamedTuple):
    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


class _Described(NamedTuple):
    """What is read of a TensorDescriptor when it is encoded."""

    base: _Base
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


def _encoder(compiled: Any) -> Callable[..., list[Any]]:
    from triton.backends.nvidia.driver import make_tensordesc_arg as make

    known = compiled.metadata.tensordesc_meta
    spare = [None] * (len(signature(make).parameters) - 2)  # 3.8 added one that it does not read

    def encode(place: int, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[Any]:
        return make(_Described(_Base(pointer), shape, strides), known[place], *spare)

    return encode


# ---- kernels that are compiled side by side ----


def together(compute: Callable[[], Made]) -> Made:
    """compute(), but kernels that are not known yet are compiled side by side. If there are some, nothing is launched
    behind the first of them, and all is computed once more: `compute` writes to nothing but what it makes, and asks for
    none of its numbers."""
    if sys.version_info < LEAST_PYTHON:
        return compute()
    seen = _watching()
    count = 0 if seen is None else len(seen.fresh)
    unknown = _WATCH.unknown = []
    try:
        made = compute()
    finally:
        _WATCH.unknown = None
    if not unknown:
        return made
    del made  # before as much is made again
    if seen is not None:
        del seen.fresh[count:]
    Context().run(_compile, unknown)  # where no other such mode is active, and this one stays
    unknown.clear()
    return compute()


def _compile(kernels: Sequence[tuple[Any, Sequence[Any], dict[str, Any]]]) -> None:
    """What fails here is left for the launch to tell of."""
    with ThreadPoolExecutor(len(kernels)) as pool:
        submitting: Any = SimpleNamespace(submit=lambda compile: pool.submit(_ready, compile))
        with AsyncCompileMode(submitting, ignore_errors=True):
            for entry, arguments, options in kernels:
                entry.warmup(*_described(arguments), grid=(1,), **options)


def _ready(compile: Callable[[], CompiledKernel]) -> CompiledKernel:
    """Compiled, and what launches it, which Triton 3.6 has from a C compiler, in its cache."""
    kernel = compile()
    driver.active.launcher_cls(kernel.src, kernel.metadata)  # type: ignore[attr-defined]  those of GPUs have it
    return kernel


# ---- what a call launches ----


class Watched(NamedTuple):
    direct: Direct
    programs: int
    boxes: Sequence[Box]
    arguments: Sequence[Any]


@dataclass
class Seen:
    """What was launched, None if some of it went the ordinary way, and the tensors of `empty`, `zeros` and
    `empty_like`, each with what makes another like it."""

    launches: list[Watched] | None
    fresh: list[tuple[Callable[[Tensor], Tensor], Tensor]]


@contextmanager
def watched() -> Iterator[Seen]:
    """What this thread launches meanwhile."""
    before, _WATCH.seen = _watching(), Seen([], [])
    try:
        yield _WATCH.seen
    finally:
        _WATCH.seen = before


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor for launches to fill."""
    return _noted(torch.empty_like, torch.empty(shape, dtype=dtype, device=device))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, of zeros."""
    return _noted(torch.zeros_like, torch.zeros(shape, dtype=dtype, device=device))


def empty_like(t: Tensor) -> Tensor:
    """The same, laid out as torch.empty_like does."""
    return _noted(torch.empty_like, torch.empty_like(t))


def _noted(make: Callable[[Tensor], Tensor], made: Tensor) -> Tensor:
    if (seen := _watching()) is not None:
        seen.fresh.append((make, made))
    return made


def _watching() -> Seen | None:
    return getattr(_WATCH, "seen", None)


_WATCH = threading.local()
