"""Direct launches hand kernels what ordinary ones do. A driver without a GPU records both, below all of Triton."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, default_positions
from manyheads.engines.triton import hopper, quick
from manyheads.engines.triton.hopper import forward, launching
from manyheads.engines.triton.hopper.kernels import attend
from manyheads.engines.triton.hopper.names import TensorDescriptor

SLOPES = torch.tensor([0.3, 0.05, 0.01, 0.2])
FORMS = {
    "causal": Scores(mask=lambda b, h, i, j: j <= i),
    "ALiBi": Scores(mask=lambda b, h, i, j: j <= i, score=lambda s, b, h, i, j: s - SLOPES[h] * (i - j)),
    "full": Scores(),
}


@triton.jit(do_not_specialize=["fixed"])
def small(target, step, fixed, factor, absent, FLAG: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, 16) * step + fixed * SIZE
    if absent is not None:
        at += absent
    tl.store(target + at, (at * factor).to(target.dtype.element_ty), mask=at < (SIZE if FLAG else step))


class Recorder:
    """What Triton's launchers call of a driver, in 3.6 (where a launcher is compiled) and after it."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        self.launches, self.encoded, self.ordinary, handles = [], [], [], itertools.count(100)
        self.utils = SimpleNamespace(
            launch=lambda *given: self.launches.append(plain(given)),
            build_signature_metadata=tuple,
            fill_tma_descriptor=self.encode,
            fill_tma_descriptor_tiled=self.encode,
            load_binary=lambda *_: (1, next(handles), 0, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 2**18},
        )

    def encode(self, *given):
        self.encoded.append(given)
        return "map", plain(given)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 7

    def set_current_device(self, _):
        pass


def plain(x):
    """Comparable; hooks that do nothing, and what they would have been told, are nothing."""
    if isinstance(x, tuple | list):
        return tuple(map(plain, x))
    if isinstance(x, torch.Tensor):
        return "tensor", x.data_ptr(), x.dtype
    return None if type(x).__name__ in ("HookChain", "LazyDict") else x


def counted(function, calls: list):
    def count(entry, *arguments, **options):
        calls.append(entry)
        return function(entry, *arguments, **options)

    return count


@pytest.fixture
def recorder(monkeypatch):
    if not isinstance(small, JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    recorder = Recorder()
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: recorder.utils, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(nvidia, "PyKernelArg", namedtuple("PyKernelArg", "nested_tuple type"), raising=False)
    monkeypatch.setattr(quick, "_KNOWN", {})
    monkeypatch.setattr(quick, "ordinary", counted(quick.ordinary, recorder.ordinary))
    quick._types.cache_clear()
    monkeypatch.setattr(driver, "_active", recorder)
    yield recorder
    quick._types.cache_clear()
    quick._KNOWN.clear()
    for entry in recorder.ordinary:  # what was compiled here must not be found by who has a GPU
        if isinstance(entry, JITFunction):
            entry.device_caches.clear()
    gc.collect()  # kernels unload themselves, by their driver


@pytest.fixture
def threads(monkeypatch):
    """Kernels are compiled in threads here, too. Python before 3.11.8 changes threads while it parses where garbage is
    collected."""
    monkeypatch.setattr(quick, "LEAST_PYTHON", (3, 11))
    gc.disable()
    yield
    gc.enable()


def launched(recorder, launch) -> tuple:
    """What a launch hands to the kernel."""
    recorder.launches.clear()
    launch()
    assert len(recorder.launches) == 1
    return recorder.launches[0]


def same(recorder, entry, programs, arguments, **options) -> tuple:
    """Both ways, the direct one twice: the first time it may have to compile."""
    ordinary = launched(recorder, lambda: quick.ordinary(entry, programs, arguments, **options))
    again = launched(recorder, lambda: quick.launch(entry, programs, arguments, **options))
    count = len(recorder.ordinary)
    direct = launched(recorder, lambda: quick.launch(entry, programs, arguments, **options))
    assert len(recorder.ordinary) == count, "the second launch is direct"
    assert direct == again == ordinary
    return direct


# ---- the Hopper kernel ----


@cache
def kind(block, layout):
    return quick.Kind(TensorDescriptor, block, layout)


def boxed(arguments) -> tuple:
    """Boxes in place of descriptors."""
    return tuple(
        quick.Box(a.base, tuple(a.shape), tuple(a.strides), kind(tuple(a.block_shape), a.layout))
        if isinstance(a, TensorDescriptor)
        else a
        for a in arguments
    )


class Catch:
    """In place of an entry: `seen` is given each launch."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *given, **options: self.seen(grid[0], boxed(given), options)


def inputs(q_len, kv_len, dtype=torch.bfloat16, dim=64, transposed=False, batch=1):
    shapes = (batch, 4, q_len, dim), (batch, 2, kv_len, dim), (batch, 2, kv_len, dim)
    if transposed:
        made = [torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2) for b, h, n, d in shapes]
    else:
        made = [torch.randn(s, dtype=dtype) for s in shapes]
    return Inputs(*made, dim**-0.5, *default_positions(q_len, kv_len))


@pytest.mark.parametrize("name", FORMS)
def test_hands_over_the_same(recorder, monkeypatch, name):
    real, kernels = launching.Kernel.entry, set()

    def both(entry):
        def check(programs, arguments, options):
            assert sum(isinstance(a, quick.Box) for a in arguments) == 4
            kernels.add(same(recorder, entry, programs, arguments, **options)[4])

        return Catch(check)

    if name == "full":
        monkeypatch.setattr(attend, "attend", both(attend.attend))
    else:
        monkeypatch.setattr(launching.Kernel, "entry", lambda *given: both(real(*given)))
    for x in (
        inputs(512, 512), inputs(128, 512), inputs(1, 1), inputs(130, 300, batch=2), inputs(300, 300, transposed=True),
        inputs(512, 512, torch.float16), inputs(256, 256, dim=128),
    ):  # fmt: skip
        hopper.run(FORMS[name], x)
    forward.run(FORMS[name], inputs(512, 512), forward.Tiling(64, 4))  # other boxes alone
    # Lengths and strides compile nothing; a dtype does, a head_dim, and a last tile that sticks out.
    assert len(kernels) == 5 == len(quick._KNOWN)


def test_descriptors_are_kept(recorder, monkeypatch):
    x = inputs(256, 256)
    entry, found = forward.ATTEND.entry(FORMS["causal"].program.source("gluon")), []
    with monkeypatch.context() as patch:
        patch.setattr(launching.Kernel, "entry", lambda *_: Catch(lambda *given: found.append(given)))
        first = hopper.run(FORMS["causal"], x), x
        second = hopper.run(FORMS["causal"], x.with_(q=x.q.clone())), x
    assert first[0][0].data_ptr() != second[0][0].data_ptr()

    def encoded(programs, arguments, options) -> int:
        recorder.encoded.clear()
        quick.launch(entry, programs, arguments, **options)
        return len(recorder.encoded)

    assert [encoded(*found[0]) for _ in range(3)] == [4, 4, 0], "compiled; encoded for itself; kept"
    assert [encoded(*found[1]) for _ in range(2)] == [2, 0], "another q and another o"
    assert encoded(*found[0]) == 0


# ---- what compiles differently ----


def test_finds_the_kernel_that_triton_finds(recorder):
    whole = torch.zeros(64, dtype=torch.float32)
    targets = whole, whole[4:], whole[1:], whole.bfloat16(), whole.int()
    functions = set()
    for target, step, fixed, absent, flag, size in itertools.product(
        targets, (1, 2, 16, 2**40), (1, 3, 2**40), (None, 5), (True,), (8, 16)
    ):
        sent = same(recorder, small, 3, (target, step, fixed, 0.5, absent, flag, size), num_warps=1)
        functions.add(sent[4])
    caches = small.device_caches[0][0]
    assert len(functions) == len(caches) > 100
    assert same(recorder, small, 3, (whole, 2, 3, 0.5, None, True, 8), num_warps=2)[4] not in functions
    assert same(recorder, small, 3, (whole, 2, 3, 0.5, None, False, 8), num_warps=1)[4] not in functions


def test_settings_of_triton_are_looked_at(recorder, monkeypatch):
    given = torch.zeros(64), 2, 3, 0.5, None, True, 8
    usual = same(recorder, small, 3, given)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert same(recorder, small, 3, given)[4] != usual[4]


# ---- side by side ----


@triton.jit
def wrong(target, SIZE: tl.constexpr):
    tl.static_assert(SIZE > 99, "too small")


SIZES = 8, 16, 16, 32, 8


def several(calls: list):
    """Launches three kernels."""

    def compute(sizes=SIZES):
        calls.append(sizes)
        made = quick.zeros((64,), torch.float32, torch.device("cpu"))
        for size in sizes:
            quick.launch(small, size, (made, 2, 3, 0.5, None, True, size), num_warps=1)
        return made

    return compute


def test_unknown_kernels_are_compiled_at_the_same_time(recorder, threads, monkeypatch):
    calls, met, launchers = [], threading.Barrier(2), []
    compute, ready = several(calls), quick._ready
    compute(SIZES[:1])
    recorder.launches.clear()

    def both_begun(compile):
        met.wait(60)  # seconds; a broken barrier raises, and none is left to be compiled by the launch
        return ready(compile)

    def launcher(*given):
        launchers.append(threading.current_thread() is threading.main_thread())
        return nvidia.CudaLauncher(*given)

    monkeypatch.setattr(quick, "_ready", both_begun)
    monkeypatch.setattr(recorder, "launcher_cls", launcher, raising=False)
    with quick.watched() as seen:
        made = quick.together(compute)
    assert len(calls) == 3 and not met.broken
    assert launchers == [False, False, True, True], "where it is compiled, then where it is launched"
    # The known one in front of those two is launched twice, and everything behind them once.
    assert [launch[0] for launch in recorder.launches] == [8, *SIZES]
    assert seen.launches is None and [t is made for _, t in seen.fresh] == [True]
    recorder.launches.clear()
    with quick.watched() as seen:
        quick.together(compute)
    assert len(calls) == 4 and [launch[0] for launch in recorder.launches] == [*SIZES]
    assert len(seen.launches) == len(SIZES)


def test_a_mode_of_the_callers_is_left_alone(recorder, threads):
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        quick.together(several([]))
    assert [launch[0] for launch in recorder.launches] == [*SIZES]


def test_what_fails_to_compile_says_so_at_its_launch(recorder, threads):
    given = torch.zeros(64), 8

    def compute():
        quick.launch(small, 3, (given[0], 2, 3, 0.5, None, True, 8), num_warps=1)
        quick.launch(wrong, 3, given)

    said = []
    for run in (compute, lambda: quick.together(compute)):
        with pytest.raises(triton.CompilationError, match="too small") as error:
            run()
        said.append(str(error.value))
        wrong.device_caches.clear()
        quick._KNOWN.clear()
    assert said[0] == said[1]
    same(recorder, small, 3, (given[0], 2, 3, 0.5, None, True, 8))  # and no mode of Triton's is left on


def test_what_is_not_launched_directly_waits_for_its_turn(recorder, threads):
    """Behind a kernel that is not known yet."""
    given, ran = torch.zeros(64), []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *given: ran.append(len(recorder.launches))

    def compute():
        quick.launch(small, 3, (given, 2, 3, 0.5, None, True, 8), num_warps=1)
        quick.launch(Interpreted(), 3, (given,))

    for _ in range(2):
        quick.together(compute)
    assert ran == [1, 2]


def test_old_python_compiles_one_after_another(recorder, monkeypatch):
    monkeypatch.setattr(quick, "LEAST_PYTHON", (99,))
    monkeypatch.setattr(quick, "_compile", None)
    calls: list = []
    quick.together(several(calls))
    assert len(calls) == 1 and [launch[0] for launch in recorder.launches] == [*SIZES]


# ---- the ordinary way ----


def test_hooks_see_every_launch(recorder):
    given = torch.zeros(64), 2, 3, 0.5, None, True, 8
    same(recorder, small, 3, given)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        assert "hooks" in quick.why_not(small)
        count = len(recorder.ordinary)
        quick.launch(small, 3, given)
        assert len(recorder.ordinary) == count + 1
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert quick.why_not(small) is None
    small.pre_run_hooks.append(lambda *a, **o: seen.append(a))
    try:
        assert "before" in quick.why_not(small)
        quick.launch(small, 3, given)
    finally:
        small.pre_run_hooks.clear()
    assert len(seen) == 1


def test_what_is_interpreted_is_called():
    called = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *given, **options: called.append((grid, given, options))

    assert "interpreted" in quick.why_not(Interpreted())
    for _ in range(2):
        quick.launch(Interpreted(), 5, (1, 2), num_warps=4)
    assert called == [((5,), (1, 2), {"num_warps": 4})] * 2
