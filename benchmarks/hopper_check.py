"""The Hopper kernel on a GPU: is it right, and how fast is it beside cuDNN and FlexAttention?

    python -u benchmarks/hopper_check.py            all of it, in under four minutes
    python -u benchmarks/hopper_check.py checks     the checks alone (or: times, tilings)

Cases run one after the other in a process of their own. A case that crashes or hangs takes that process with it; the
others go on in a new one. The tables come last.
"""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASE_LIMIT = 75.0  # seconds
TOTAL_LIMIT = 225.0
WINDOW, CAP = 1024, 50.0

Case = tuple[str, str, Callable[[], dict]]  # section, name, what to do


def cases(place: str) -> list[Case]:
    """Their tensors lie on `place`; only what runs them needs a GPU."""
    import torch
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    from manyheads.core.forms import Scores
    from manyheads.core.inputs import Inputs, default_positions
    from manyheads.engines import eager
    from manyheads.engines.triton import hopper

    device = torch.device(place)
    slopes = torch.logspace(-0.5, -8, 16, base=2, device=device)
    documents = torch.arange(20000, device=device) // 150
    limits = torch.arange(1, 17, device=device) * 40

    def causal(b, h, i, j):
        return j <= i

    def softcap(s, b, h, i, j):
        return CAP * torch.tanh(s / CAP)

    def alibi(s, b, h, i, j):
        return s - slopes[h] * (i - j)

    def windowed(width):
        return lambda b, h, i, j: (j <= i) & (i - j < width)

    def empty(b, h, i, j):  # queries 100 to 300 see nothing, those from 350 on see nothing in their first tiles
        return (j <= i) & ((i < 100) | (i > 300)) & ((i < 350) | (j > 140))

    forms = {
        "full": Scores(),
        "causal": Scores(mask=causal),
        "window 100": Scores(mask=windowed(100)),
        f"window {WINDOW}": Scores(mask=windowed(WINDOW)),
        "sinks and window": Scores(mask=lambda b, h, i, j: (j <= i) & ((i - j < 100) | (j < 4))),
        "soft-cap causal": Scores(mask=causal, score=softcap),
        "ALiBi causal": Scores(mask=causal, score=alibi),
        "ALiBi full": Scores(score=lambda s, b, h, i, j: s - slopes[h] * abs(i - j)),
        "documents": Scores(mask=lambda b, h, i, j: (documents[i] == documents[j]) & (j <= i)),
        "windows of heads": Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < limits[h])),
        "empty rows": Scores(mask=empty),
        "nothing": Scores(mask=lambda b, h, i, j: j > i + 100000),
        f"soft-cap window {WINDOW}": Scores(mask=windowed(WINDOW), score=softcap),
        f"ALiBi window {WINDOW}": Scores(mask=windowed(WINDOW), score=alibi),
    }

    def inputs(batch, heads, kv_heads, q_len, kv_len, dim, dtype=torch.bfloat16):
        torch.manual_seed(0)
        q = torch.randn(batch, heads, q_len, dim, device=device, dtype=dtype)
        k, v = (torch.randn(batch, kv_heads, kv_len, dim, device=device, dtype=dtype) for _ in range(2))
        return Inputs(q, k, v, dim**-0.5, *default_positions(q_len, kv_len))

    def compare(found, o, lse):
        o_found, lse_found = found
        seen = lse > -math.inf
        zero = bool((o_found[~seen] == 0).all()) and bool((lse_found[~seen] == -math.inf).all())
        error = float((o_found.double() - o.double()).norm() / o.double().norm().clamp(min=1e-30))
        apart = float((lse_found[seen].double() - lse[seen].double()).abs().max()) if bool(seen.any()) else 0.0
        finite = bool(torch.isfinite(o_found).all()) and not bool(torch.isnan(lse_found).any())
        right = zero and finite and error < 5e-3 and apart < 2e-3
        return {"right": right, "o": error, "lse": apart, "zero": zero, "finite": finite}

    def small(name, sizes, dtype=torch.bfloat16, kind=None, change=None, scale=None):
        def check():
            x = inputs(*sizes, dtype)
            x = x if change is None else change(x)
            x = x if scale is None else x.with_(scale=scale)
            reason = hopper.why_not(forms[name], x)
            assert reason is None, reason
            o, lse = eager.run(forms[name], x.with_(q=x.q.double(), k=x.k.double(), v=x.v.double()))
            hopper._TABLES.clear()
            usual = hopper.table
            try:
                hopper.table = usual if kind is None else getattr(hopper, kind)
                found = hopper.run(forms[name], x)
                again = hopper.run(forms[name], x)
            finally:
                hopper.table = usual
                hopper._TABLES.clear()
            same = torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
            return compare(found, o, lse) | {"same": same}

        sizes_text = "x".join(map(str, sizes))
        words = [name, sizes_text, str(dtype).removeprefix("torch."), kind, "strided" if change else None]
        return "checks", " ".join(w for w in [*words, None if scale is None else f"scale {scale}"] if w), check

    def strided(x):
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v))
        return x.with_(q=q, k=k, v=v)

    def large(name, sizes):
        """Against torch's own kernels; the lse of the last queries of a head against float64."""

        def check():
            x, is_causal = inputs(*sizes), name == "causal"
            o, lse = hopper.run(forms[name], x)
            other = torch.nn.functional.scaled_dot_product_attention(
                x.q, x.k, x.v, is_causal=is_causal, scale=x.scale, enable_gqa=sizes[1] != sizes[2]
            )
            s = (x.q[-1, 0, -64:].double() @ x.k[-1, 0].double().mT) * x.scale
            if is_causal:
                at = torch.arange(sizes[3], device=device)
                s = s.masked_fill(at[None] > at[-64:, None], -math.inf)
            error = float((o.double() - other.double()).norm() / other.double().norm())
            apart = float((lse[-1, 0, -64:].double() - s.logsumexp(-1)).abs().max())
            finite = bool(torch.isfinite(o).all()) and bool(torch.isfinite(lse).all())
            return {"right": finite and error < 5e-3 and apart < 2e-3, "o": error, "lse": apart, "finite": finite}

        return "checks", f"{name} {'x'.join(map(str, sizes))} beside torch's", check

    # ---- times ----

    import triton

    def median(call, rep=60):
        return triton.testing.do_bench(call, warmup=15, rep=rep, return_mode="median")

    def work(name, sizes):
        batch, heads, _, q_len, kv_len, dim = sizes
        pairs = q_len * kv_len
        if "window" in name:
            pairs = q_len * WINDOW - WINDOW * WINDOW / 2
        elif "causal" in name:
            pairs /= 2
        return 4 * batch * heads * dim * pairs

    def ours(name, sizes, tiling=None, kind=None):
        x = inputs(*sizes)
        usual = hopper.table
        try:
            hopper.table = usual if kind is None else getattr(hopper, kind)
            hopper._TABLES.clear()
            return median(lambda: hopper.run(forms[name], x, tiling))
        finally:
            hopper.table = usual
            hopper._TABLES.clear()

    def cudnn(name, sizes):
        x = inputs(*sizes)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return median(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=name == "causal", scale=x.scale
                )
            )

    flex = torch.compile(flex_attention.flex_attention, dynamic=False)

    def flexible(name, sizes):
        form, x = forms[name], inputs(*sizes)
        mask = None
        if form.mask is not None:
            mask = flex_attention.create_block_mask(form.mask, None, None, sizes[3], sizes[4], device=device)
        with torch.no_grad():
            return median(lambda: flex(x.q, x.k, x.v, score_mod=form.score, block_mask=mask, scale=x.scale))

    def timed(name, sizes, peers=("cudnn", "flex"), kind=None):
        def measure():
            unit = work(name, sizes) / 1e9
            row: dict = {"ours": unit / ours(name, sizes, kind=kind)}
            for peer, call in (("cudnn", cudnn), ("flex", flexible)):
                if peer in peers:
                    try:
                        row[peer] = unit / call(name, sizes)
                    except Exception as error:
                        row[peer] = f"{type(error).__name__}: {str(error)[:80]}"
            return row

        return "times", f"{name}{' ' + kind if kind else ''} {'x'.join(map(str, sizes))}", measure

    def overhead():
        x = inputs(1, 4, 4, 128, 128, 64)
        row = {}
        for name in ("full", "causal", "ALiBi causal"):
            form = forms[name]
            for _ in range(50):
                hopper.run(form, x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(300):
                hopper.run(form, x)
            row[f"{name}, us a call"] = (time.perf_counter() - start) / 300 * 1e6
            torch.cuda.synchronize()
        return row

    def spilled():
        """Of the kernels compiled in this process."""
        jitted = [hopper.hopper_kernel.attend, *hopper._ENTRIES.values()]
        kernels = [k for j in jitted for cache in j.device_caches.values() for k in cache[0].values()]
        return {
            "kernels": float(len(kernels)),
            "that spill": ", ".join(f"{k.n_spills} of {k.metadata.shared} B" for k in kernels if k.n_spills) or "none",
            "registers": ", ".join(sorted({str(k.n_regs) for k in kernels})),
        }

    def swept(name, sizes, tilings):
        def measure():
            row = {}
            for keys, stages in tilings:
                try:
                    row[f"{keys}x{stages}"] = work(name, sizes) / 1e9 / ours(name, sizes, hopper.Tiling(keys, stages))
                except Exception as error:
                    row[f"{keys}x{stages}"] = f"{type(error).__name__}: {str(error)[:80]}"
            return row

        return "tilings", f"{name} {'x'.join(map(str, sizes))}", measure

    half = torch.float16
    long, short = (1, 16, 16, 16384, 16384), (4, 16, 16, 4096, 4096)
    both = ("cudnn", "flex")
    return [
        small("full", (2, 4, 2, 384, 512, 128)),
        small("full", (2, 4, 2, 400, 400, 128)),
        small("causal", (2, 4, 2, 400, 400, 128)),
        small("causal", (2, 4, 2, 400, 400, 128), kind="lists"),
        small("causal", (1, 2, 1, 130, 700, 128)),
        small("causal", (1, 8, 1, 1, 1000, 128)),
        small("causal", (1, 2, 2, 200, 77, 128)),
        small("causal", (2, 4, 2, 400, 400, 128), change=strided),
        small("causal", (1, 2, 2, 400, 400, 128), scale=-0.1),
        small("causal", (1, 2, 2, 400, 400, 128), scale=0.0),
        small("window 100", (1, 4, 4, 1000, 1000, 128)),
        small("window 100", (1, 4, 4, 1000, 1000, 128), kind="ranges"),
        small("sinks and window", (1, 4, 4, 1000, 1000, 128)),
        small("sinks and window", (1, 4, 4, 1000, 1000, 128), kind="ranges"),
        small("soft-cap causal", (1, 4, 2, 1000, 1000, 128)),
        small("ALiBi causal", (2, 16, 4, 500, 500, 128)),
        small("ALiBi full", (1, 16, 4, 200, 500, 128)),
        small("documents", (1, 4, 2, 1000, 1000, 128)),
        small("windows of heads", (2, 16, 4, 600, 600, 128)),
        small("empty rows", (1, 2, 2, 500, 500, 128)),
        small("empty rows", (1, 2, 2, 500, 500, 128), kind="lists"),
        small("nothing", (1, 2, 2, 300, 300, 128)),
        small("causal", (2, 4, 2, 500, 500, 128), half),
        small("full", (2, 4, 4, 300, 300, 64)),
        small("causal", (2, 4, 1, 900, 900, 64)),
        small("soft-cap causal", (1, 4, 4, 400, 900, 64)),
        small("causal", (1, 2, 2, 300, 300, 64), half),
        small("full", (1, 2, 2, 300, 300, 256)),
        small("causal", (1, 4, 2, 700, 700, 256)),
        large("full", (2, 8, 2, 5001, 5001, 128)),
        large("causal", (*long, 128)),
        large("causal", (3, 16, 4, 4095, 4095, 64)),
        timed("full", (*short, 128), ("cudnn",)),
        timed("full", (*long, 128), ("cudnn",)),
        timed("causal", (*short, 128), both),
        timed("causal", (*long, 128), both),
        timed("causal", (*long, 128), (), "lists"),
        timed(f"window {WINDOW}", (*long, 128), ("flex",)),
        timed("soft-cap causal", (*long, 128), ("flex",)),
        timed("ALiBi causal", (*long, 128), ("flex",)),
        timed("full", (*long, 64), ("cudnn",)),
        timed("causal", (*short, 64), ("cudnn",)),
        timed("causal", (*long, 64), both),
        timed("causal", (1, 32, 8, 16384, 16384, 128), ()),
        timed("causal", (*long, 256), ("cudnn",)),
        ("times", "overhead", overhead),
        ("times", "spills", spilled),
        swept("full", (*long, 64), [(128, 2), (128, 3), (128, 4), (64, 4), (64, 6)]),
        swept("causal", (*long, 64), [(128, 2), (128, 3), (64, 6)]),
        swept(f"window {WINDOW}", (*long, 128), [(64, 3), (64, 4)]),
        swept("causal", (*long, 128), [(64, 3), (64, 4)]),
        timed(f"soft-cap window {WINDOW}", (*long, 128), ("flex",)),
        timed(f"ALiBi window {WINDOW}", (*long, 128), ("flex",)),
    ]


# ---- the process of the cases, and the one that watches it ----


def child(sections: list[str], start: int) -> None:
    import torch
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    for k, (section, _, case) in enumerate(cases("cuda")):
        if k < start or section not in sections:
            continue
        print(f"@start {k}", flush=True)
        try:
            result = case()
            torch.cuda.synchronize()
            print("@result " + json.dumps([k, result]), flush=True)
        except BaseException as error:
            print("@result " + json.dumps([k, {"error": f"{type(error).__name__}: {str(error)[:600]}"}]), flush=True)
            try:
                torch.cuda.synchronize()
            except Exception:
                sys.exit(3)  # nothing works any more in this process
    print("@end", flush=True)


def watch(sections: list[str]) -> None:
    import torch
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    listed = cases("cpu")
    results: dict[int, dict] = {}
    began, start = time.time(), 0
    while start < len(listed) and time.time() - began < TOTAL_LIMIT:
        command = [sys.executable, "-u", __file__, "--child", ",".join(sections), str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream=process.stdout, lines=lines):
            for line in stream:
                lines.put(line.rstrip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        at, tail, ended = start - 1, [], False
        limit = time.time() + CASE_LIMIT
        while True:
            left = min(limit, began + TOTAL_LIMIT) - time.time()
            try:
                line = lines.get(timeout=max(left, 0.01))
            except queue.Empty:
                late = "hangs" if time.time() >= limit else "no time left"
                results.setdefault(max(at, start), {"error": late})
                process.kill()
                break
            if line is None:
                if not ended and at not in results:
                    results[max(at, start)] = {"error": "the process died: " + " | ".join(tail[-4:])[-500:]}
                break
            if line.startswith("@start "):
                at, limit = int(line.split()[1]), time.time() + CASE_LIMIT
            elif line.startswith("@result "):
                k, result = json.loads(line[8:])
                results[k] = result
                print(f"[{time.time() - began:5.1f} s] {line_of(listed[k], result)}", flush=True)
            elif line == "@end":
                ended = True
            else:
                tail.append(line)
                print(f"    {line}"[:300], flush=True)
        process.wait()
        if ended or at < start:  # done, or it does not even begin
            break
        start = max(at, start) + 1
    report(listed, results, sections)


def line_of(case: Case, result: dict) -> str:
    section, name, _ = case
    if "error" in result:
        return f"{name}: FAILED {result['error']}"
    if section == "checks":
        good = result["right"] and result.get("same", True)
        rest = "".join(f", {k} {result[k]}" for k in ("zero", "finite", "same") if not result.get(k, True))
        return f"{'right' if good else 'WRONG'}  {name}: o {result['o']:.1e}, lse {result['lse']:.1e}{rest}"
    numbers = ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
    return f"{name}: {numbers}"


def report(listed: list[Case], results: dict[int, dict], sections: list[str]) -> None:
    for title, section in (("Checks", "checks"), ("TFLOP/s, useful", "times"), ("Tilings, TFLOP/s", "tilings")):
        if section not in sections:
            continue
        print(f"\n{title}")
        for k, case in enumerate(listed):
            if case[0] != section:
                continue
            if k not in results:
                print(f"  {case[1]}: not run")
                continue
            result, line = results[k], line_of(case, results[k])
            for peer in ("cudnn", "flex"):
                if isinstance(result.get(peer), float) and isinstance(result.get("ours"), float):
                    line += f"; {result['ours'] / result[peer]:.2f} x {peer}"
            print(f"  {line}")
    wrong = [
        listed[k][1]
        for k, r in results.items()
        if listed[k][0] == "checks" and ("error" in r or not r["right"] or not r.get("same", True))
    ]
    if "checks" in sections:
        count = sum(listed[k][0] == "checks" for k in results)
        print(f"\n{count - len(wrong)} of {sum(c[0] == 'checks' for c in listed)} checks right", flush=True)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[2].split(","), int(sys.argv[3]))
    else:
        watch(sys.argv[1:] or ["checks", "times", "tilings"])
