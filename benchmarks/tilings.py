"""Time the Hopper kernels alone under several tilings, forward and backward, on the GPU at hand.

    python benchmarks/tilings.py                       the shapes of SHAPES, the cases full, causal, softcap and alibi
    python benchmarks/tilings.py --cases causal --head-dims 64

A line for each tiling: milliseconds, the median of many runs, and whether the result is that of the tiling in use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import NAMES, case
from torch import Tensor

from manyheads.core.checks import build_inputs
from manyheads.core.inputs import Inputs
from manyheads.engines.triton.hopper import backward, forward
from manyheads.engines.triton.hopper.backward import KeysTiling, QueriesTiling
from manyheads.engines.triton.hopper.forward import Tiling

SHAPES = ((4, 4096), (1, 16384))  # batch, length
HEADS = 16
ATTEND = {64: (Tiling(128, 3), Tiling(128, 3, True)), 128: (Tiling(128, 2), Tiling(64, 4, True)),
          256: (Tiling(64, 2),)}  # fmt: skip
KEYS = {
    64: (KeysTiling(64, 4, 3), KeysTiling(64, 4, 3, late=False), KeysTiling(128, 3, 2, late=False)),
    128: (KeysTiling(64, 4, 2), KeysTiling(64, 4, 2, late=False), KeysTiling(32, 4, 4)),
    256: (KeysTiling(32, 2, 2, late=False, apart=True), KeysTiling(32, 2, 2, apart=True)),
}
QUERIES = {
    64: (QueriesTiling(64, 4, 4, held=True), QueriesTiling(128, 3, 2, held=False)),
    128: (QueriesTiling(64, 4, 2, held=True), QueriesTiling(64, 4, 2, held=False)),
    256: (QueriesTiling(32, 3, 2, held=False), QueriesTiling(64, 2, 1, held=False)),
}
Run = Callable[[], tuple[Tensor | None, ...]]


def runs(form: Any, x: Inputs, head_dim: int) -> Iterator[tuple[str, Any, Run]]:
    """The kernel, a tiling, and what runs it; the tiling in use comes first."""
    o, lse = forward.run(form, x)
    do = torch.randn_like(o)

    def first(used: Any, others: tuple[Any, ...]) -> list[Any]:
        return [used, *(t for t in others if t != used)]

    for tiling in first(forward.tiling_of(form, x), ATTEND[head_dim]):
        yield "attend", tiling, lambda t=tiling: forward.run(form, x, t)
    for tiling in first(backward.keys_tiling_of(form, x), KEYS[head_dim]):
        yield "keys", tiling, lambda t=tiling: backward.run(form, x, o, lse, do, None, (False, True, True), t)[1:]
    for tiling in first(backward.queries_tiling_of(x), QUERIES[head_dim]):
        of_q = (True, False, False)
        yield "queries", tiling, lambda t=tiling, n=of_q: backward.run(form, x, o, lse, do, None, n, None, t)[:1]


def near(found: tuple[Tensor | None, ...], usual: tuple[Tensor | None, ...]) -> bool:
    pairs = [(a.float(), b.float()) for a, b in zip(found, usual, strict=True) if a is not None and b is not None]
    return all(bool((a - b).norm() <= 1e-2 * b.norm()) for a, b in pairs)  # two roundings to bfloat16


def main() -> int:
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["full", "causal", "softcap", "alibi"], choices=NAMES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256], choices=list(ATTEND))
    given = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("benchmarks/tilings.py needs a Hopper GPU; this machine has none", file=sys.stderr)
        return 2
    wrong = 0
    for head_dim in given.head_dims:
        for name in given.cases:
            for batch, length in SHAPES:
                about = case(name, HEADS, length)
                q, k, v = torch.randn(3, batch, HEADS, length, head_dim, device="cuda", dtype=torch.bfloat16)
                x = build_inputs(about.form, q, k, v, None, None, None, None, about.operands)
                usual: dict[str, tuple[Tensor | None, ...]] = {}
                for kernel, tiling, run in runs(about.form, x, head_dim):
                    found = run()
                    right = near(found, usual.setdefault(kernel, found))
                    wrong += not right
                    spent = do_bench(run, warmup=20, rep=60, return_mode="median")
                    shape = f"{name} {batch}x{HEADS}x{length}x{head_dim}"
                    print(f"{shape:28} {kernel:8} {spent:8.3f} ms {'' if right else 'WRONG'} {tiling}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
