"""That benchmarks/warm.py's processes compile all of what a kernel is tuned over, each once, and launch nothing."""

from __future__ import annotations

import ast
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import warm

    for kind in (Autotuner, JITFunction):  # which warm replaces
        monkeypatch.setattr(kind, "run", kind.run)
    return warm


class Kernel:
    """Writes down what it was asked for. 4 and 8 warps do not compile."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, int]] = []

    @staticmethod
    def fn() -> None: ...

    def run(self, *args: Any, grid: Any, warmup: bool, num_warps: int, **kwargs: Any) -> None:
        self.calls.append((warmup, num_warps))
        if num_warps == 8:
            raise PTXASError("too many registers")
        if num_warps == 4:
            raise CompileTimeAssertionFailure("a tile is too small", ast.Pass())


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_are_all_configurations_and_each_is_compiled_once(warm: ModuleType, of: int) -> None:
    launched, whole, shares = JITFunction.run, Autotuner.run, []
    for share in range(of):
        Autotuner.run, JITFunction.run = whole, launched
        first, second = Kernel(), Kernel()
        warm.compile_only(share, of)
        for kernel, warps in ((first, (1, 2, 4, 8)), (second, (16,))):
            tuner = Autotuner(kernel, ["x"], [Config({}, num_warps=n) for n in warps], ["x"], None, None)
            tuner[(1,)](5)
            assert not tuner.cache
        shares.append(first.calls + second.calls)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(chain.from_iterable(shares)) == [(True, n) for n in (1, 2, 4, 8, 16)]


def test_what_is_not_tuned_is_compiled_and_not_launched(warm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: asked.append((args, grid, warmup))
    )
    warm.compile_only(0, 1)
    JITFunction.__getitem__(object.__new__(JITFunction), (3,))(7)
    assert asked == [((7,), (3,), True)]
