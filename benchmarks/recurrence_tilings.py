"""Time recurrences under other tiles and numbers of segments, on the GPU at hand.

    python benchmarks/recurrence_tilings.py                             four cases at 1x16k and 4x16k
    python benchmarks/recurrence_tilings.py --cases step --shapes 1x64k

A line for each: milliseconds of a whole pass (backward: of both), the median of many runs, forward as a CUDA graph, and
whether the result is that of the table in use. The first line of a case and pass is the table's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attention
import torch
from recurrences import CASES, HEAD_DIM, SHAPES, inputs, ours
from torch import Tensor

from manyheads import dispatch
from manyheads.engines.triton import replay
from manyheads.engines.triton.chunked import tables
from manyheads.engines.triton.chunked.tables import Tile

CARRIED = (Tile(32, 4, 2), Tile(64, 4, 2), Tile(64, 4, 3), Tile(64, 8, 2), Tile(64, 8, 3), Tile(128, 8, 2))
FORWARD = {"walk": CARRIED}
BACKWARD = {
    "back": CARRIED,
    "gradients": (Tile(64, 8, 2), Tile(64, 8, 1), Tile(32, 8, 1), Tile(32, 8, 2)),
    "inner": (Tile(16, 4, 1), Tile(32, 4, 1), Tile(64, 4, 1), Tile(64, 8, 1)),
}
AT_ONCE = (1, 2, 3, 4, 8)  # programs for each multiprocessor that a row is cut into segments for


def forget() -> None:
    """Calls that were made before, whose launches have the tiles of then."""
    replay.forget()
    dispatch._KNOWN.clear()


@contextmanager
def tile(key: tuple[str, int, int], other: Tile) -> Iterator[None]:
    before, tables.TILES[key] = tables.TILES[key], other
    forget()
    try:
        yield
    finally:
        tables.TILES[key] = before
        forget()


@contextmanager
def at_once(count: int) -> Iterator[None]:
    before, tables.AT_ONCE = tables.AT_ONCE, count
    forget()
    try:
        yield
    finally:
        tables.AT_ONCE = before
        forget()


def variants(which: str, channels: bool) -> Iterator[tuple[str, Any]]:
    """What is changed, in words, and for how long."""
    for kernel, others in (FORWARD if which == "forward" else BACKWARD).items():
        if kernel != "inner" or channels:
            key = tables.key_of(kernel, 2, HEAD_DIM, channels)
            for other in others:
                if other != tables.TILES[key]:
                    yield f"{kernel} {other}", tile(key, other)
    for count in AT_ONCE:
        if count != tables.AT_ONCE:
            yield f"{count} programs at once", at_once(count)


def near(found: tuple[Tensor, ...], usual: tuple[Tensor, ...]) -> bool:
    """Two roundings to bfloat16, and a correction's more."""
    return all(
        bool((a.float() - b.float()).norm() <= 2e-2 * b.float().norm()) for a, b in zip(found, usual, strict=True)
    )


def passes(name: str, shape: str) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]], Callable[[], Any]]]:
    """A pass: its name, what it gives, and what is timed."""
    case, leaves = CASES[name], inputs(CASES[name], *SHAPES[shape])
    run = ours(case)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(leaves),)

    yield "forward", forward, forward
    do = torch.randn_like(leaves["v"])

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaves), list(leaves.values()), do)

    yield "backward", backward, backward  # with its forward, which cuts into the same segments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["step", "channel", "gated delta", "kda"], choices=CASES)
    parser.add_argument("--shapes", nargs="+", default=["1x16k", "4x16k"], choices=SHAPES)
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=("forward", "backward"))
    parser.add_argument("--seconds", type=float, default=0.05, help="of timed runs for each line")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/recurrence_tilings.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    wrong = 0
    for shape in given.shapes:
        for name in given.cases:
            for which, call, timed in passes(name, shape):
                if which not in given.passes:
                    continue
                usual = call()
                show = partial(line, f"{name} {shape} {which}", which, timed, given.seconds)
                show("as it is", True)
                for words, changed in variants(which, name in ("channel", "kda")):
                    with changed:
                        try:
                            right = near(call(), usual)
                            wrong += not right
                            show(words, right)
                        except Exception as e:  # too much shared memory, for instance, is a line, not the end
                            print(
                                f"{name} {shape} {which}: {words}: {type(e).__name__}: {e}".splitlines()[0], flush=True
                            )
    return int(wrong > 0)


def line(about: str, which: str, timed: Callable[[], Any], seconds: float, words: str, right: bool) -> None:
    spent = attention.graphed(timed, seconds) if which == "forward" else attention.measured(timed, seconds)["median_ms"]
    print(f"{about:30} {spent or float('nan'):8.3f} ms {'' if right else 'WRONG'} {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
