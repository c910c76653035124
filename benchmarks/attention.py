"""Attention kernels beside their peers, on the GPU at hand, in one process.

    python benchmarks/attention.py                                 the sets dense, narrow, functions and small
    python benchmarks/attention.py --sets packed --peers ours      128k tokens of packed documents

Every engine is checked against float64 before it is timed: o and the gradients of the first head of keys (o and dq of
the last queries, where the length is beyond LONG). A row is one engine on one case, forward or backward: the median of
many runs with the 20th and 80th percentile, useful TFLOP/s, which count the products of the pairs that the mask allows
(4 for each of them and number of the head forward, 2.5 times that backward), the seconds of the first call, and the
memory beyond q, k, v, o and lse. An engine that takes too long, compiling for instance, is a row that says so. Rows are
appended to a file of JSON lines; a table comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import NAMES, SETS, Case, Shape, case, work
from peers import PEERS, Run
from torch import Tensor

from manyheads import attention
from manyheads.core.checks import build_inputs
from manyheads.core.forms import Operand, Recurrence
from manyheads.engines import eager

BOUND = 1e-2  # relative error of bfloat16 outputs and gradients; 3e-3 is usual
LONG, LAST = 32 * 1024, 256
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward")


def truth(about: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """o, dq, dk and dv of the first head of keys in float64; o and dq of the last queries if there are too many."""
    group = q.shape[1] // k.shape[1]
    rows = slice(-LAST, None) if q.shape[2] > LONG else slice(None)
    leaves = [t.detach().double().requires_grad_() for t in (q[:1, :group, rows], k[:1, :1], v[:1, :1])]
    operands = {name: t[:group] for name, t in about.operands.items()}
    x = build_inputs(about.form, leaves[0], leaves[1], leaves[2], None, None, None, None, operands, about.dropout, 0)
    o, _ = eager.run(about.form, x)
    grads = torch.autograd.grad(o, leaves, do[:1, :group, rows].double())
    return [o.detach(), grads[0]] if q.shape[2] > LONG else [o.detach(), *grads]


def error(found: Tensor, true: Tensor) -> float:
    part = found[:1, : true.shape[1], -true.shape[2] :].double()
    return ((part - true).norm() / true.norm()).item()


def measured(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    from triton.testing import do_bench

    times: Any = do_bench(call, warmup=25, rep=int(1000 * seconds), quantiles=[0.2, 0.5, 0.8])
    return dict(zip(("low_ms", "median_ms", "high_ms"), times, strict=True))


def graphed(call: Callable[[], Any], seconds: float) -> float | None:
    """Milliseconds as a CUDA graph; None for what cannot be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return measured(graph.replay, seconds)["median_ms"]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside, after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bench(
    name: str, shape: Shape, dtype: torch.dtype, wanted: list[str], passes: list[str], seconds: float, limit: int
) -> Iterator[dict[str, Any]]:
    """The rows of a case. limit: seconds for one engine."""
    torch.manual_seed(0)
    about = case(name, shape.heads, shape.length)

    def leaf(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, shape.head_dim, device="cuda", dtype=dtype)

    q, k, v = (leaf(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    do = leaf(shape.heads)
    true = truth(about, q, k, v, do)
    products = 4 * about.pairs(shape.length) * shape.head_dim * shape.batch * shape.heads
    for peer in wanted:
        row = {"case": name, **shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "engine": peer}
        try:
            with limited(limit):
                yield from timed(row, about, shape, true, products, (q, k, v, do), passes, seconds)
        except Exception as e:  # a peer that cannot is a row, not the end
            yield {**row, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        torch.cuda.empty_cache()


def timed(
    row: dict[str, Any], about: Case, shape: Shape, true: list[Tensor], products: float, tensors: tuple[Tensor, ...],
    passes: list[str], seconds: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one engine, which is checked first."""
    (*qkv, do), start = tensors, time.perf_counter()
    run = PEERS[row["engine"]](row["case"], about, shape)
    if run is None:
        return
    o = run(*qkv)
    torch.cuda.synchronize()
    row = {**row, "first_call_s": round(time.perf_counter() - start, 3)}
    found = [o]
    if o.requires_grad and "backward" in passes:
        found += torch.autograd.grad(o, qkv, do, retain_graph=True)
    errors = [error(a, b) for a, b in zip(found, true, strict=False)]
    if not max(errors) < BOUND:
        raise RuntimeError(f"wrong: relative errors of o, dq, dk, dv are {errors}")
    for which in (p for p in passes if p == "forward" or o.requires_grad):
        if which == "forward":
            call = torch.no_grad()(partial(run, *qkv))
        else:
            call = partial(torch.autograd.grad, o, qkv, do, retain_graph=True)
        memory, times = beyond(call), measured(call, seconds)
        speed = products * (1 if which == "forward" else 2.5) / times["median_ms"] / 1e9
        yield {**row, "pass": which, "beyond_mib": memory, **times, "tflops": round(speed, 1), "error": max(errors)}
    if row["engine"] == "ours" and row["case"] == "documents":
        yield {**row, "case": "documents, new each time", **anew(about, run, *qkv)}


def beyond(call: Callable[[], Any]) -> float:
    """MiB that a call takes at its height beyond what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del kept
    return round((peak - max(before, after)) / 2**20, 1)


def anew(about: Case, run: Run, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of a whole call, when what the mask captured is new each time and when it is not."""

    def spent(change: bool) -> float:
        times = []
        with torch.no_grad():
            for _ in range(7):
                if change:
                    for t in about.form.program.tensors:
                        t.add_(0)
                torch.cuda.synchronize()
                start = time.perf_counter()
                run(q, k, v)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[3]

    return {"same_ms": spent(False), "new_ms": spent(True)}


def overhead() -> Iterator[dict[str, Any]]:
    """Microseconds that a call takes on the host, when the kernel itself takes next to nothing, and that torch's own
    function takes beside it."""
    q, g = torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(1, 1, 128, device="cuda")
    form, step = case("causal", 1, 128).form, Operand("batch heads len")
    rule = Recurrence(write="delta", operands={"g": step, "beta": step})
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("causal", "ours"): lambda: attention(q, q, q, form, engine="triton"),
        ("causal", "torch"): lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
        ("gated delta rule", "ours"): lambda: attention(q, q, q, rule, engine="triton", g=g, beta=g),
    }
    for (name, engine), call in calls.items():
        spent = []
        for _ in range(9):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            spent.append((time.perf_counter() - start) / 200 * 1e6)
            torch.cuda.synchronize()
        low, _, median, *_ = statistics.quantiles(spent[2:], n=6)
        row = {"case": "host time of a call", "of": name, "engine": engine}
        yield {**row, "low_us": round(low, 1), "median_us": round(median, 1)}


# ---- rows and table ----


def machine() -> dict[str, Any]:
    import triton

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "commit": commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def recorder(rows: list[dict[str, Any]], path: Path | None) -> Callable[[dict[str, Any]], None]:
    """What takes a row: it goes to `rows`, to the terminal and, with what is to be known of the machine, to a file."""
    about = machine()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        line = json.dumps({**row, **about})
        print(line, flush=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")

    return add


def table(rows: list[dict[str, Any]], wanted: list[str]) -> str:
    """Useful TFLOP/s of each engine, and ours over the best of the others."""
    lines = [f"{'case':15}{'shape':>20}  {'pass':9}" + "".join(f"{e:>8}" for e in wanted) + f"{'ours/best':>10}"]
    key = lambda r: (r["case"], *(r[field] for field in Shape._fields), r["pass"] == "backward")  # noqa: E731  sort, group
    timed = [r for r in rows if "tflops" in r]
    for (name, b, h, kv, n, d, back), group in itertools.groupby(sorted(timed, key=key), key=key):
        speeds = {r["engine"]: r["tflops"] for r in group}
        others = [s for e, s in speeds.items() if e != "ours"]
        ratio = speeds["ours"] / max(others) if "ours" in speeds and any(others) else math.nan
        shape = f"{b}x{h}{'' if h == kv else f'/{kv}'}x{n}x{d}"
        shown = "".join(f"{speeds[e]:8.0f}" if e in speeds else f"{'':>8}" for e in wanted)
        lines.append(f"{name:15}{shape:>20}  {PASSES[back]:9}{shown}{ratio:10.2f}")
    lines += [f"failed: {r['engine']} on {r['case']} {r['length']} {r['head_dim']}: {r['failed']}"
              for r in rows if "failed" in r]  # fmt: skip
    lines += [f"{r['case']}, {r['engine']}: {r['median_us']} us" for r in rows if "median_us" in r]
    lines += [f"{r['case']}: {r['new_ms']:.2f} ms, else {r['same_ms']:.2f} ms" for r in rows if "new_ms" in r]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["dense", "narrow", "functions", "small"], choices=SETS)
    parser.add_argument("--cases", nargs="+", default=NAMES, choices=NAMES, help="no others of the sets")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed runs for each row")
    parser.add_argument("--limit", type=int, default=60, help="seconds for one engine on one case")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/attention.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    rows, start = [], time.perf_counter()
    add = recorder(rows, given.results)
    todo = [(name, shape) for name, shape in work(given.sets) if name in given.cases]
    for number, (name, shape) in enumerate(todo):
        print(f"[{number}/{len(todo)}, {time.perf_counter() - start:.0f} s] {name} {shape}", flush=True)
        for row in bench(name, shape, DTYPES[given.dtype], given.peers, given.passes, given.seconds, given.limit):
            add(row)
    if "ours" in given.peers:
        for row in overhead():
            add(row)
    print("\n" + table(rows, given.peers))
    return int(any(row.get("failed") and row["engine"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
