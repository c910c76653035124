"""Compiles what fla's recurrences are tuned over, before `benchmarks/recurrences.py` times them.

    python benchmarks/warm.py --cases kda channel --processes 17

fla tunes a kernel at its first call, over up to 48 configurations, which Triton compiles one after another: minutes for
a case and its gradients. Here many processes walk through the same calls, launch nothing, and compile a share of the
configurations each. All lie in Triton's cache then, and tuning is timing alone. fla knows its choices by sizes, not by
whether there is a gate: for choices of its own, time one case in a process, with FLA_CACHE_RESULTS=0 around it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from contextlib import suppress
from typing import Any

import torch
from recurrences import CASES, SHAPES, fla, inputs, turned
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction


def compile_only(share: int, of: int) -> None:
    """From here on this process launches nothing, and of what is tuned over it compiles its share."""
    numbers, launch = itertools.count(), JITFunction.run

    def compiled(self: Autotuner, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            if next(numbers) % of == share:
                with suppress(CompileTimeAssertionFailure, PTXASError):  # tuning goes on without these, too
                    self.fn.run(*args, grid=grid, warmup=True, **kwargs, **config.all_kwargs())

    Autotuner.run = compiled
    JITFunction.run = lambda self, *args, warmup, **kwargs: launch(self, *args, warmup=True, **kwargs)


def work(share: int, of: int, names: list[str], shape: str) -> None:
    compile_only(share, of)
    for name in names:
        leaves = {n: turned(t).requires_grad_() for n, t in inputs(CASES[name], *SHAPES[shape]).items()}
        o = fla(CASES[name])(leaves)
        try:
            torch.autograd.grad(o, list(leaves.values()), torch.empty_like(o))
        except RuntimeError as e:  # gradients that fla refuses on a version of Triton, which a row of theirs will say
            print(f"{name}, backward: {e}".splitlines()[0][:200], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--shape", default="1x1k", choices=SHAPES, help="a length that 16 divides compiles as any such")
    parser.add_argument("--processes", type=int, default=17, help="each has a CUDA context, of about half a GiB")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/warm.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    spawn = multiprocessing.get_context("spawn")
    shares = [(n, given.processes, given.cases, given.shape) for n in range(given.processes)]
    processes = [spawn.Process(target=work, args=share) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return int(any(process.exitcode for process in processes))


if __name__ == "__main__":
    sys.exit(main())
