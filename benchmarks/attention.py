"""Attention kernels beside their peers, on the GPU at hand, in one process.

    python benchmarks/attention.py --lengths 4096 16384 --results benchmarks/results/attention.jsonl

Each case is checked against float64 before it is timed: the first head's output and gradients at the length that is
timed. A row is one engine on one case, forward or backward: the median of many runs with the 20th and 80th percentile,
and useful TFLOP/s, which count the products of the pairs that the mask allows (4 for each of them and number of the
head forward, 2.5 times that backward). Rows are JSON lines; a table comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core import Scores
from manyheads.core.checks import build_inputs
from manyheads.engines import eager
from manyheads.engines import triton as ours

WINDOW, CAP = 1024, 50.0
BOUND = 1e-2  # relative error of bfloat16 outputs and gradients; 3e-3 is usual
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    mask: Callable | None
    score: Callable | None
    pairs: Callable[[int], int]


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int


def causal_pairs(n: int) -> int:
    return n * (n + 1) // 2


def window_pairs(n: int) -> int:
    return causal_pairs(n) - (causal_pairs(n - WINDOW) if n > WINDOW else 0)


def cases(heads: int) -> dict[str, Case]:
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device="cuda")

    def causal(b, h, i, j):
        return j <= i

    def window(b, h, i, j):
        return (j <= i) & (i - j < WINDOW)

    def softcap(s, b, h, i, j):
        return CAP * torch.tanh(s / CAP)

    def alibi(s, b, h, i, j):
        return s + slopes[h] * (j - i)

    return {
        "full": Case(None, None, lambda n: n * n),
        "causal": Case(causal, None, causal_pairs),
        "window": Case(window, None, window_pairs),
        "softcap": Case(causal, softcap, causal_pairs),
        "alibi": Case(causal, alibi, causal_pairs),
        "window_softcap": Case(window, softcap, window_pairs),
    }


# ---- engines: each returns what runs a case, or None if it cannot ----

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_ours(case: Case, shape: Shape) -> Run:
    form = Scores(mask=case.mask, score=case.score)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = build_inputs(form, q, k, v, None, None, None, None, {})
        why = ours.why_not(form, x)
        if why is not None:
            raise RuntimeError(why)
        return ours.run(form, x)[0]

    return run


def run_flex(case: Case, shape: Shape) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # beyond eight masks in a process it falls back to something else
    n = shape.length
    blocks = None if case.mask is None else create_block_mask(case.mask, None, None, n, n, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = shape.heads != shape.kv_heads
    return lambda q, k, v: compiled(q, k, v, score_mod=case.score, block_mask=blocks, enable_gqa=grouped)


def run_sdpa(backend: str, name: str, case: Case, shape: Shape) -> Run | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in ("full", "causal"):
        return None
    grouped = shape.heads != shape.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=name == "causal", enable_gqa=grouped
            )

    return run


def engines(name: str, case: Case, shape: Shape) -> dict[str, Callable[[], Run | None]]:
    return {
        "triton": partial(run_ours, case, shape),
        "flex": partial(run_flex, case, shape),
        "cudnn": partial(run_sdpa, "CUDNN_ATTENTION", name, case, shape),
        "flash": partial(run_sdpa, "FLASH_ATTENTION", name, case, shape),
    }


# ---- right, then timed ----


def truth(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """o, dq, dk and dv of the first head that is alone with its keys, in float64."""
    form = Scores(mask=case.mask, score=case.score)
    group = q.shape[1] // k.shape[1]
    leaves = [t[:1, :n].detach().double().requires_grad_() for t, n in ((q, group), (k, 1), (v, 1))]
    x = build_inputs(form, *leaves, None, None, None, None, {})
    o, _ = eager.run(form, x)
    return [o.detach(), *torch.autograd.grad(o, leaves, do[:1, :group].double())]


def error(found: Tensor, true: Tensor) -> float:
    part = found[: true.shape[0], : true.shape[1]].double()
    return ((part - true).norm() / true.norm()).item()


def measured(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    from triton.testing import do_bench

    low, median, high = do_bench(call, warmup=25, rep=int(1000 * seconds), quantiles=[0.2, 0.5, 0.8])
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def bench(name: str, shape: Shape, dtype: torch.dtype, wanted: list[str], passes: list[str], seconds: float):
    """Yields the rows of a case."""
    case = cases(shape.heads)[name]
    torch.manual_seed(0)
    size = shape.batch, shape.length, shape.head_dim

    def leaf(heads: int) -> Tensor:
        return torch.randn(size[0], heads, size[1], size[2], device="cuda", dtype=dtype)

    q, k, v = (leaf(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    do = leaf(shape.heads)
    true = truth(case, q, k, v, do)
    products = 4 * case.pairs(shape.length) * shape.head_dim * shape.batch * shape.heads
    for engine, make in engines(name, case, shape).items():
        if engine not in wanted:
            continue
        about = {"case": name, **shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "engine": engine}
        try:
            start = time.perf_counter()
            run = make()
            if run is None:
                continue
            o = run(q, k, v)
            torch.cuda.synchronize()
            about["first_call_s"] = round(time.perf_counter() - start, 3)
            grads = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
            errors = [error(a, b) for a, b in zip((o, *grads), true, strict=True)]
            del grads
            if not max(errors) < BOUND:
                raise RuntimeError(f"wrong: relative errors of o, dq, dk, dv are {errors}")
            for which in passes:
                if which == "forward":
                    with torch.no_grad():
                        times = measured(partial(run, q, k, v), seconds)
                else:
                    times = measured(lambda o=o: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), seconds)
                work = products * (1 if which == "forward" else 2.5)
                speed = work / times["median_ms"] / 1e9
                yield {**about, "pass": which, **times, "tflops": round(speed, 1), "error": max(errors)}
        except Exception as e:  # a peer that cannot is a row, not the end
            yield {**about, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        torch.cuda.empty_cache()


def overhead() -> dict[str, Any]:
    """Microseconds that a call takes on the host, when the kernels themselves take next to nothing."""
    q = torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16)
    run = run_ours(cases(1)["causal"], Shape(1, 1, 1, 128, 64))
    calls = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            run(q, q, q)
        calls.append((time.perf_counter() - start) / 200 * 1e6)
        torch.cuda.synchronize()
    return {"case": "host time of a call", "engine": "triton", "median_us": round(sorted(calls)[3], 1)}


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


def table(rows: list[dict[str, Any]], wanted: list[str]) -> str:
    """Useful TFLOP/s of each engine, and ours over the best of the others."""
    lines = [
        f"{'case':16}{'head_dim':>9}{'length':>8}  {'pass':10}" + "".join(f"{e:>9}" for e in wanted) + "   ours/best"
    ]
    key = lambda r: (r["case"], r["head_dim"], r["length"], r["pass"])  # noqa: E731
    timed = [r for r in rows if "tflops" in r]
    for (name, head_dim, length, which), group in itertools.groupby(sorted(timed, key=key), key=key):
        speeds = {r["engine"]: r["tflops"] for r in group}
        others = [s for e, s in speeds.items() if e != "triton"]
        ratio = speeds["triton"] / max(others) if "triton" in speeds and any(others) else math.nan
        shown = "".join(f"{speeds[e]:9.0f}" if e in speeds else f"{'':>9}" for e in wanted)
        lines.append(f"{name:16}{head_dim:9}{length:8}  {which:10}{shown}{ratio:12.2f}")
    lines += [
        f"failed: {r['engine']} on {r['case']} {r['head_dim']} {r['length']}: {r['failed']}"
        for r in rows
        if "failed" in r
    ]
    lines += [f"{r['case']}: {r['median_us']} us" for r in rows if "median_us" in r]
    return "\n".join(lines)


def main() -> int:
    every = ("full", "causal", "window", "softcap", "alibi", "window_softcap")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=every[:5], choices=every)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="as many as heads unless given")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch: batch = tokens / length, 1 at least")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument("--engines", nargs="+", default=["triton", "flex", "cudnn", "flash"])
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed runs for each row")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/attention.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    about, rows = machine(), []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        line = json.dumps({**row, **about})
        print(line, flush=True)
        if given.results:
            given.results.parent.mkdir(parents=True, exist_ok=True)
            with given.results.open("a") as file:
                file.write(line + "\n")

    for name, head_dim, length in itertools.product(given.cases, given.head_dims, given.lengths):
        batch = max(1, given.tokens // length)
        shape = Shape(batch, given.heads, given.kv_heads or given.heads, length, head_dim)
        for row in bench(name, shape, DTYPES[given.dtype], given.engines, given.passes, given.seconds):
            add(row)
    if "triton" in given.engines:
        add(overhead())
    print("\n" + table(rows, given.engines))
    return int(any(row.get("failed") and row["engine"] == "triton" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
