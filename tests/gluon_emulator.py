"""Runs Gluon kernels for Hopper in numpy: each warp group is a thread, barriers block, and what is read too early or
freed too soon shows.

A copy into shared memory lands the moment it is issued; a matrix product, and a copy out of it, read as late as the
kernel allows: only when it waits for them. What is loaded for a product is read when that begins. Shared memory starts
as NaN. Layouts, registers and speed are not emulated.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

TIMEOUT = 20.0
PAUSE = 2e-4  # after what frees memory, so that others may overwrite it
_changed = threading.Condition()
_local = threading.local()
_grid = SimpleNamespace(pid=0, programs=1)


class Int(int):
    """A scalar of the kernel."""

    def to(self, dtype: str) -> Any:
        if dtype == "uint32":  # a number that wraps around
            return Array.of(np.uint32(self & 0xFFFFFFFF))
        return self if dtype.startswith("int") else Array.of(np.float32(self))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "rshift", "lshift", "and", "or", "neg"):

    def _operation(self: Int, *other: Any, own: Any = getattr(int, f"__{_name}__")) -> Any:  # noqa: B008
        result = own(self, *other)
        return Int(result) if result is not NotImplemented else result

    setattr(Int, f"__{_name}__", _operation)


class Array(np.ndarray):
    """A tensor of the kernel, in float32 where the kernel has 16 bits."""

    type = SimpleNamespace(layout=None)
    late: Shared | None = None  # where it is still to be read from

    @staticmethod
    def of(values: Any) -> Array:
        return np.asarray(values).view(Array)

    def to(self, dtype: str, bitcast: bool = False) -> Array:
        if bitcast:  # numbers of 16 bits, which are kept as what they mean
            return self
        if dtype in ("bfloat16", "float16"):
            return Array.of(rounded(self, dtype))
        return Array.of(self.astype(dtype))


def rounded(values: Any, dtype: str) -> np.ndarray:
    plain = np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(plain.reshape(-1)).to(getattr(torch, dtype)).float().numpy().reshape(plain.shape)


# ---- shared memory, barriers, copies ----


class Shared:
    def __init__(self, values: np.ndarray, dtype: str):
        self.values, self.shape, self.dtype, self.layout = values, values.shape, dtype, None

    def index(self, k: Any) -> Shared:
        return Shared(self.values[int(k)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.values[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def reshape(self, shape: Any) -> Shared:
        return Shared(self.values.reshape(shape), self.dtype)

    def permute(self, order: Any) -> Shared:
        return Shared(self.values.transpose(order), self.dtype)

    def store(self, values: Any) -> None:
        self.values[...] = values

    def load(self, layout: Any) -> Array:
        found = Array.of(self.values.copy())
        found.late = self
        return found


def reinterpret(x: Shared, dtype: str, shape: Any, layout: Any) -> Shared:
    """The room of the first of its numbers, one for each of the others, as far as they go."""
    first, *rest = shape
    size = math.prod(rest)
    count = min(first, x.values.size // size)
    return Shared(x.values.reshape(-1)[: count * size].reshape(count, *rest), dtype)


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier was made for"
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.count
            _changed.notify_all()


class Barriers:
    def __init__(self, n: int):
        self.all = [Barrier() for _ in range(n)]

    def index(self, k: Any) -> Barrier:
        return self.all[int(k)]


class mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Barrier, bytes: int) -> None:
        with _changed:
            barrier.bytes += bytes
            barrier.pending -= 1
            barrier.settle()

    @staticmethod
    def arrive(barrier: Barrier, pred: Any = True) -> None:
        if not pred:
            return
        with _changed:
            barrier.pending -= 1
            barrier.settle()
        time.sleep(PAUSE)

    @staticmethod
    def wait(barrier: Barrier, phase: int) -> None:
        with _changed:
            if not _changed.wait_for(lambda: barrier.phase != phase, timeout=TIMEOUT):
                raise RuntimeError("a barrier is waited for that nobody completes")


class Descriptor:
    def __init__(self, given: Any):
        base = given.base.detach()
        self.tensor = base.as_strided(list(given.shape), list(given.strides), base.storage_offset())
        size, (*steps, last) = base.element_size(), given.strides
        fits = last == 1 and all(step > 0 and step * size % 16 == 0 for step in steps) and base.data_ptr() % 16 == 0
        assert fits, f"the hardware takes no strides {list(given.strides)} from address {base.data_ptr()} on"
        self.block_shape, self.layout = list(given.block_shape), None
        self.dtype = str(base.dtype).removeprefix("torch.")

    def box(self, at: Any) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """The part of a box that is inside, and where it lies in the box."""
        starts, sizes = [int(c) for c in at], [int(n) for n in self.block_shape]
        spans = [
            (min(max(c, 0), n), min(max(c + s, 0), n)) for c, s, n in zip(starts, sizes, self.tensor.shape, strict=True)
        ]
        inside = tuple(slice(a - c, b - c) for c, (a, b) in zip(starts, spans, strict=True))
        return self.tensor[tuple(slice(a, b) for a, b in spans)], inside


def tma_load(source: Descriptor, at: Any, barrier: Barrier, target: Shared) -> None:
    assert target.shape == tuple(source.block_shape)
    part, inside = source.box(at)
    target.values[...] = 0
    target.values[inside] = part.float().numpy()
    with _changed:
        barrier.bytes -= target.values.size * source.tensor.element_size()
        barrier.settle()


def tma_store(target: Descriptor, at: Any, source: Shared) -> None:
    assert min(at) >= 0, "an illegal instruction on an H100"
    _local.stores.append((target, at, source))


def tma_store_wait(pending: int) -> None:
    """Shared memory is read as late as the kernel allows."""
    time.sleep(PAUSE)
    while len(_local.stores) > pending:
        target, at, source = _local.stores.pop(0)
        part, inside = target.box(at)
        part.copy_(torch.from_numpy(np.ascontiguousarray(source.values[inside])))


def fence_async_shared() -> None:
    pass


# ---- matrix products ----


class Later:
    def __init__(self, compute: Any):
        self.compute, self.value = compute, None


def warpgroup_mma(a: Any, b: Any, c: Any, use_acc: bool = True, is_async: bool = False) -> Later:
    assert is_async
    for x in (a, b):
        if isinstance(x, Array) and x.late is not None:
            x[...], x.late = x.late.values, None

    def compute() -> Array:
        left, right = (x.values if isinstance(x, Shared) else np.asarray(x) for x in (a, b))
        before = (np.asarray(c.value if isinstance(c, Later) else c)) if use_acc else np.float32(0)
        return Array.of((left @ right).astype(np.float32) + before)

    later = Later(compute)
    _local.queue.append(later)
    return later


def warpgroup_mma_wait(outstanding: int, deps: list[Later]) -> Any:
    while len(_local.queue) > outstanding:
        later = _local.queue.pop(0)
        later.value = later.compute()
    assert all(d.value is not None for d in deps), "a product is used before it is waited for"
    return deps[0].value if len(deps) == 1 else tuple(d.value for d in deps)


# ---- the language ----


class Pointer:
    """narrow: the tensor of 16 bits that `values` are of, as float32."""

    def __init__(self, values: np.ndarray, at: Any = 0, narrow: torch.Tensor | None = None):
        self.values, self.at, self.narrow = values, at, narrow

    @staticmethod
    def to_tensor(x: torch.Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        flat = x.detach().as_strided((size,), (1,), 0)
        if x.dtype in (torch.bfloat16, torch.float16):
            return Pointer(flat.float().numpy(), x.storage_offset(), flat)
        return Pointer(flat.numpy(), x.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.at + offset, self.narrow)


def _load(at: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    index = np.asarray(at.at)
    if mask is not None:
        there = np.broadcast_to(np.asarray(mask), index.shape)
        inside = _load(Pointer(at.values, np.where(there, index, 0)))
        return Array.of(np.where(there, inside, np.asarray(other, at.values.dtype)))
    assert index.min() >= 0 and index.max() < at.values.size, "read outside of a tensor"
    found = at.values[index]
    return Int(found) if np.ndim(found) == 0 and found.dtype.kind == "i" else Array.of(found)


def _store(at: Pointer, values: Any, mask: Any = True) -> None:
    there = np.broadcast_to(np.asarray(mask), np.shape(at.at))
    index = np.asarray(at.at)[there]
    assert not index.size or (index.min() >= 0 and index.max() < at.values.size), "written outside of a tensor"
    given = np.broadcast_to(np.asarray(values), there.shape)[there]
    if at.narrow is None:
        at.values[index] = given
    else:
        at.narrow[torch.from_numpy(index)] = torch.from_numpy(np.array(given, np.float32)).to(at.narrow.dtype)
        at.values[index] = at.narrow[torch.from_numpy(index)].float().numpy()


def _atomic_or(at: Pointer, values: Any, mask: Any = True, sem: str = "") -> None:
    there = np.broadcast_to(np.asarray(mask), np.shape(at.at))
    index = np.asarray(at.at)[there]
    assert not index.size or (index.min() >= 0 and index.max() < at.values.size), "written outside of a tensor"
    np.bitwise_or.at(at.values, index, np.broadcast_to(np.asarray(values), there.shape)[there])


def _atomic_add(at: Pointer, value: Any, sem: str = "") -> Any:
    """Of one number."""
    before = at.values[int(at.at)]
    at.values[int(at.at)] += int(value)
    return Int(before)


def _where(test: Any, a: Any, b: Any) -> Any:
    narrow = [np.float32(x) if isinstance(x, float) else x for x in (a, b)]
    result = np.where(test, *narrow)
    return Int(result) if result.ndim == 0 and result.dtype.kind == "i" else Array.of(result)


def _either(choose: Any) -> Any:
    def of(a: Any, b: Any, propagate_nan: Any = None) -> Any:  # numpy's propagate NaN
        result = choose(a, b)
        return Int(result) if np.ndim(result) == 0 and np.asarray(result).dtype.kind == "i" else Array.of(result)

    return of


def _allocate(dtype: str, shape: list[int], layout: Any) -> Any:
    if dtype == "int64":
        return Barrier() if len(shape) == 1 else Barriers(shape[0])
    return Shared(np.full(shape, np.nan, np.float32), dtype)


def _alone(function: Any, args: Any) -> None:
    """What a warp group does."""
    _local.queue, _local.stores = [], []
    with np.errstate(all="ignore"):
        function(*args)
    assert not _local.queue, "a matrix product is never waited for"
    assert not _local.stores, "a copy out of shared memory is never waited for"


def _warp_specialize(parts: Any, warps: Any, registers: Any) -> None:
    errors = []

    def work(function: Any, args: Any) -> None:
        try:
            _alone(function, args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _unary(function: Any) -> Any:
    return lambda x: Array.of(function(np.asarray(x, np.float32)))


ASSEMBLY = {"lg2.approx.ftz.f32": np.log2, "rcp.approx.ftz.f32": np.reciprocal}


def _assembly(text: str, constraints: str, args: list[Any], **options: Any) -> Any:
    return _unary(ASSEMBLY[text.split()[0]])(*args) if args else None


gl: Any = SimpleNamespace(
    bfloat16="bfloat16", float16="float16", float32="float32", int16="int16", int32="int32",
    int64="int64", uint32="uint32",
    constexpr=lambda value: value, static_range=range,
    SliceLayout=lambda *a: None, BlockedLayout=lambda *a: None, DotOperandLayout=lambda *a: None,
    NVMMADistributedLayout=lambda *a: None, SwizzledSharedLayout=lambda *a: None,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *a: None),
    full=lambda shape, value, dtype, layout: Array.of(np.full(shape, value, np.float32)),
    arange=lambda start, end, layout=None: Array.of(np.arange(start, end)),
    convert_layout=lambda x, layout: x,
    where=_where, maximum=_either(np.maximum), minimum=_either(np.minimum),
    exp2=_unary(np.exp2), exp=_unary(np.exp), log2=_unary(np.log2), log=_unary(np.log), floor=_unary(np.floor),
    erf=_unary(np.vectorize(math.erf)), sqrt=_unary(np.sqrt),
    abs=lambda x: Int(abs(x)) if isinstance(x, int) else Array.of(np.abs(x)),
    cast=lambda x, dtype: x if isinstance(x, int) else Array.of(x).to(dtype),
    max=lambda x, axis: Array.of(x.max(axis)), min=lambda x, axis: Array.of(x.min(axis)),
    sum=lambda x, axis: Array.of(x.sum(axis)),
    associative_scan=lambda x, axis, add: Array.of(np.cumsum(x, axis)),
    div_rn=lambda a, b: Array.of(np.float32(a) / np.float32(b)),
    inline_asm_elementwise=_assembly, expand_dims=lambda x, axis: Array.of(np.expand_dims(x, axis)),
    load=_load, store=_store, allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    program_id=lambda axis: Int(_grid.pid), num_programs=lambda axis: Int(_grid.programs),
)  # fmt: skip
gluon: Any = SimpleNamespace(jit=lambda f=None, **options: f if f is not None else lambda g: g)


# ---- kernels ----


class Kernel:
    """A kernel with the launch syntax of a jitted one, over torch tensors in main memory."""

    def __init__(self, function: Any):
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            given = [self._given(a) for a in args]
            _grid.programs = grid[0]
            for pid in range(grid[0]):
                _grid.pid = pid
                _alone(self.function, given)

        return launch

    @staticmethod
    def _given(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer.to_tensor(x)
        return Descriptor(x) if hasattr(x, "block_shape") else Int(x) if type(x) is int else x


PACKAGE = "manyheads.engines.triton.hopper"


def load(*modules: str, package: str = PACKAGE) -> dict[str, ModuleType]:
    """Modules of a package's kernels/, each of which may import those before it, with this one for `names`."""
    found: dict[str, ModuleType] = {}
    for name in modules:
        path = Path(__import__(package, fromlist=["kernels"]).kernels.__path__[0]) / f"{name}.py"
        others = {f"{package}.kernels.{n}": module for n, module in found.items()}
        module = found[name] = ModuleType(f"emulated_{name}")
        with _replaced({f"{PACKAGE}.names": sys.modules[__name__], **others}):
            exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return found


def load_plain(name: str) -> ModuleType:
    """A module of kernels/ that is written in plain Triton."""
    path = Path(__import__(PACKAGE, fromlist=["kernels"]).kernels.__path__[0]) / f"{name}.py"
    tl = SimpleNamespace(
        **{**vars(gl), "full": lambda shape, value, dtype: Array.of(np.full(shape, value, dtype))},
        cumsum=lambda x, axis: Array.of(np.cumsum(x, axis)),
        atomic_or=_atomic_or,
        atomic_add=_atomic_add,
        debug_barrier=lambda: None,
    )
    module = ModuleType(f"emulated_{name}")
    with _replaced({"triton": SimpleNamespace(jit=gluon.jit, language=tl), "triton.language": tl}):
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def functions(text: str) -> dict[str, Any]:
    """The functions of a Gluon text."""
    namespace = {"tl": gl, "gluon": gluon, "PropagateNan": SimpleNamespace(ALL=None)}
    exec(re.sub(r"^from triton.*$", "", text, flags=re.MULTILINE), namespace)
    return namespace


@contextmanager
def _replaced(modules: dict[str, Any]) -> Any:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
