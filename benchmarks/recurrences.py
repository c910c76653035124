"""Recurrences beside their peers, on the GPU at hand, in one process.

    python benchmarks/recurrences.py                                        all shapes and cases
    python benchmarks/recurrences.py --shapes 1x16k --cases step --peers ours
    python benchmarks/warm.py                                               before that, compiles what fla tunes over

Every engine is checked first against float64, on the first head: o and all gradients. A row is one engine on one case,
forward or backward: the median of many runs with the 20th and 80th percentile, the same as a CUDA graph where it can be
one (the forward pass; without what a launch costs), the seconds of the first call, the memory beyond what is returned,
and GB/s, which count the fewest bytes: what goes in is read once, what comes out is written once. fla and FlashQLA are
timed in their own layout, [batch, length, heads, head_dim]. cuDNN computes causal softmax of the same shape, as a
measure. An engine that takes too long, tuning for instance, is a row that says so. The pass "step" is one more token
for a batch of rows with states: GB/s are there of the states, read and written. Rows are appended to a file of JSON
lines; a table comes last.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attention
import torch
from torch import Tensor

import manyheads
from manyheads.core.checks import build_inputs
from manyheads.core.forms import Operand, Recurrence
from manyheads.engines import eager

K = 1024
BOUND = 2e-2  # relative error of bfloat16 outputs and gradients; 3e-3 is usual, a correction's are a few times that
HEADS, HEAD_DIM = 16, 128
LENGTHS = {f"1x{n}k": (1, n * K) for n in (1, 4, 16, 64, 256, 1024)}
SHAPES = {**LENGTHS, "4x16k": (4, 16 * K)}
QUADRATIC = 256 * K  # tokens beyond which softmax attention is not waited for
BATCHES = (1, 64)  # of which one more token is computed
PASSES = (*attention.PASSES, "step")
STEP, CHANNEL = Operand("batch heads len"), Operand("batch heads len head_dim")

Leaves = dict[str, Tensor]  # q, k, v and operands by name
Run = Callable[[Leaves], Tensor]  # -> o; leaves and o laid out as the engine has them


class Case(NamedTuple):
    """A form, and the function of fla's that computes the same: module and name."""

    form: Recurrence
    peer: tuple[str, str]


def fading(h: Tensor, heads: int) -> Tensor:
    return -torch.exp2(-8.0 * (h + 1) / heads)


CASES = {
    "none": Case(Recurrence(), ("simple_gla", "chunk_simple_gla")),
    "head": Case(Recurrence(decay=fading), ("simple_gla", "chunk_simple_gla")),
    "step": Case(Recurrence(operands={"g": STEP}), ("simple_gla", "chunk_simple_gla")),
    "channel": Case(Recurrence(operands={"g": CHANNEL}), ("gla", "chunk_gla")),
    "delta": Case(Recurrence(write="delta", operands={"beta": STEP}), ("delta_rule", "chunk_delta_rule")),
    "gated delta": Case(
        Recurrence(write="delta", operands={"g": STEP, "beta": STEP}), ("gated_delta_rule", "chunk_gated_delta_rule")
    ),
    "kda": Case(Recurrence(write="delta", operands={"g": CHANNEL, "beta": STEP}), ("kda", "chunk_kda")),
}


# ---- inputs and truth ----


def inputs(case: Case, batch: int, length: int) -> Leaves:
    """Keys of length 1, gates as of models: decays of exp(-0.1 u), some of exp(-3), strengths from 0.5 to 0.75."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=draw)

    q, k, v = (normal(batch, HEADS, length, HEAD_DIM) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    made = {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
    for name, operand in case.form.operands.items():
        sizes = {"batch": batch, "heads": HEADS, "len": length, "head_dim": HEAD_DIM}
        drawn = torch.rand(operand.shape(sizes), device="cuda", generator=draw)
        if name == "g":
            drawn *= -0.1
            drawn[:, :, 5::37] = -3.0
        made[name] = drawn if name == "g" else drawn.sigmoid()
    return {name: t.requires_grad_() for name, t in made.items()}


def truth(case: Case, leaves: Leaves, do: Tensor, passes: list[str]) -> list[Tensor]:
    """o of the first head of the first row, in float64, and its gradients if backward passes are wanted. Decays by head
    are those of all heads."""
    first = {name: t.detach()[:1, :1].double().requires_grad_("backward" in passes) for name, t in leaves.items()}
    form = case.form
    if form.decay is not None:
        form = Recurrence(decay=lambda h, heads: fading(h, HEADS))
    o, _ = eager.run(form, _inputs(form, first))
    grads = torch.autograd.grad(o, list(first.values()), do[:1, :1].double()) if "backward" in passes else ()
    return [o.detach(), *grads]


def _inputs(form: Recurrence, leaves: Leaves) -> Any:
    operands = {name: leaves[name] for name in form.operands}
    return build_inputs(form, leaves["q"], leaves["k"], leaves["v"], None, None, None, None, operands)


def fewest_bytes(leaves: Leaves, which: str) -> int:
    """Forward: what goes in and o. Backward: what went in, dO, and a gradient for each of the first."""
    inside = sum(t.numel() * t.element_size() for t in leaves.values())
    o = leaves["v"].numel() * leaves["v"].element_size()
    return inside + o if which == "forward" else 2 * inside + o


# ---- who is timed ----


def ours(case: Case) -> Run:
    return lambda leaves: manyheads.attention(mechanism=case.form, engine="triton", **leaves)


def fla(case: Case) -> Run:
    """Raises ImportError without it."""
    from importlib import import_module

    module, name = case.peer
    function = getattr(import_module(f"fla.ops.{module}"), name)
    given: dict[str, Tensor] = {}
    if case.form.decay is not None:
        given["g_gamma"] = fading(torch.arange(HEADS, device="cuda"), HEADS)
    return lambda leaves: function(**leaves, **given)[0]


def flashqla(case: Case) -> Run | None:
    """Raises ImportError without it. It has the gated delta rule alone."""
    if case is not CASES["gated delta"]:
        return None
    from flash_qla import chunk_gated_delta_rule  # type: ignore[import-not-found]

    return lambda leaves: chunk_gated_delta_rule(**leaves)[0]


def cudnn(case: Case) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(leaves: Leaves) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                leaves["q"], leaves["k"], leaves["v"], is_causal=True
            )

    return run


PEERS: dict[str, Callable[[Case], Run | None]] = {"ours": ours, "fla": fla, "flashqla": flashqla, "cudnn": cudnn}
TURNED = ("fla", "flashqla")  # who has tokens before heads


def turned(t: Tensor) -> Tensor:
    """Tokens before heads."""
    return t.detach().transpose(1, 2).contiguous()


# ---- rows ----


def bench(
    name: str, shape: str, passes: list[str], wanted: list[str], seconds: float, limit: int
) -> Iterator[dict[str, Any]]:
    case, (batch, length) = CASES[name], SHAPES[shape]
    leaves = inputs(case, batch, length)
    do = torch.randn_like(leaves["v"])
    true = truth(case, leaves, do, passes)
    for peer in wanted:
        row = {"case": name, "shape": shape, "heads": HEADS, "head_dim": HEAD_DIM, "engine": peer}
        try:
            with attention.limited(limit):
                yield from timed(row, case, leaves, do, true, passes, seconds)
        except Exception as e:  # a peer that cannot is a row, not the end
            yield {**row, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        torch.cuda.empty_cache()


def timed(
    row: dict[str, Any], case: Case, leaves: Leaves, do: Tensor, true: list[Tensor], passes: list[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows of one engine, which is checked first."""
    peer = row["engine"]
    if peer in TURNED:
        leaves = {name: turned(t).requires_grad_() for name, t in leaves.items()}
        do = turned(do)
    if peer == "cudnn":
        if SHAPES[row["shape"]][1] > QUADRATIC:
            return
        leaves = {name: leaves[name] for name in "qkv"}
    run, start = PEERS[peer](case), time.perf_counter()
    if run is None:
        return
    o = run(leaves)
    torch.cuda.synchronize()
    row = {**row, "first_call_s": round(time.perf_counter() - start, 3)}
    if peer != "cudnn":  # attention.py checks it
        row["errors"] = [checked(o, true[0], peer)]
    for which in passes:
        if which == "forward":
            call = torch.no_grad()(partial(run, leaves))
        else:
            call = partial(torch.autograd.grad, o, list(leaves.values()), do, retain_graph=True)
            start = time.perf_counter()
            grads = call()
            torch.cuda.synchronize()
            row = {**row, "first_call_s": round(time.perf_counter() - start, 3)}
            if peer != "cudnn":
                row["errors"] = [checked(g, t, peer) for g, t in zip(grads, true[1:], strict=True)]
            del grads
        memory, times = attention.beyond(call), attention.measured(call, seconds)
        count = fewest_bytes(leaves, which)
        graph = {"graph_ms": attention.graphed(call, seconds)} if which == "forward" else {}
        yield {
            **row, "pass": which, "beyond_mib": memory, **times, **graph, "gbs": round(count / times["median_ms"] / 1e6)
        }  # fmt: skip


def stepped(name: str, batch: int, wanted: list[str], seconds: float, limit: int) -> Iterator[dict[str, Any]]:
    """Rows of one token for a batch."""
    case, leaves = CASES[name], inputs(CASES[name], batch, 1)
    leaves = {n: t.detach() for n, t in leaves.items()}
    state = torch.randn(batch, HEADS, HEAD_DIM, HEAD_DIM, device="cuda")
    first = {n: t.double() for n, t in leaves.items()}
    true, _ = eager.run(case.form, _inputs(case.form, first).with_(state=state.double()))
    for peer in (p for p in wanted if p in STEPS):
        row = {"case": name, "shape": f"{batch}x1", "heads": HEADS, "head_dim": HEAD_DIM, "engine": peer}
        try:
            with attention.limited(limit):
                given = leaves if peer == "ours" else {n: turned(t) for n, t in leaves.items()}
                call = partial(STEPS[peer](case), given, state)
                start = time.perf_counter()
                o = call()
                torch.cuda.synchronize()
                row |= {"first_call_s": round(time.perf_counter() - start, 3), "errors": [checked(o, true, peer)]}
                times, graph = attention.measured(call, seconds), attention.graphed(call, seconds)
                speed = 2 * state.numel() * state.element_size() / (graph or times["median_ms"]) / 1e6
                yield {**row, "pass": "step", **times, "graph_ms": graph, "gbs": round(speed)}
        except Exception as e:
            yield {**row, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}


def our_step(case: Case) -> Callable[[Leaves, Tensor], Tensor]:
    return lambda leaves, state: manyheads.attention(mechanism=case.form, engine="triton", state=state, **leaves)


def fla_step(case: Case) -> Callable[[Leaves, Tensor], Tensor]:
    from importlib import import_module

    module = case.peer[0]
    function = getattr(import_module(f"fla.ops.{module}"), f"fused_recurrent_{module}")
    names = {"g": "gk"} if module == "gla" else {}
    fixed: dict[str, Any] = {"output_final_state": True}
    if case.form.decay is not None:
        fixed["g_gamma"] = fading(torch.arange(HEADS, device="cuda"), HEADS)

    def run(leaves: Leaves, state: Tensor) -> Tensor:
        given = {names.get(name, name): t for name, t in leaves.items()}
        return function(**given, initial_state=state, **fixed)[0]

    return torch.no_grad()(run)


STEPS: dict[str, Callable[[Case], Callable[[Leaves, Tensor], Tensor]]] = {"ours": our_step, "fla": fla_step}


def checked(found: Tensor, true: Tensor, peer: str) -> float:
    """The relative error on the first head. Raises RuntimeError if it is beyond BOUND."""
    found = (found.transpose(1, 2) if peer in TURNED else found)[:1, :1].double()
    true = true[:1, :1]
    error = ((found - true).norm() / true.norm()).item()
    if not error < BOUND:
        raise RuntimeError(f"wrong: a relative error of {error:.2g}")
    return round(error, 5)


def table(rows: list[dict[str, Any]], wanted: list[str]) -> str:
    """Milliseconds (as a graph) of each engine, GB/s of ours, and the best of the others that compute the same over
    ours."""
    lines = [f"{'case':12}{'shape':>7}  {'pass':9}" + "".join(f"{e:>18}" for e in wanted) + f"{'GB/s':>7}{'ratio':>7}"]
    key = lambda r: (r["case"], r["shape"], PASSES.index(r["pass"]))  # noqa: E731  sort, group
    timed = [r for r in rows if "median_ms" in r]
    for (name, shape, which), group in itertools.groupby(sorted(timed, key=key), key=key):
        found = {r["engine"]: r for r in group}
        shown = ""
        for engine in wanted:
            r = found.get(engine, {})
            graph = f" ({r['graph_ms']:.3f})" if r.get("graph_ms") else ""
            shown += f"{r['median_ms']:.3f}{graph}".rjust(18) if r else " " * 18
        same = [found[e]["median_ms"] for e in TURNED if e in found]
        mine = found.get("ours")
        speed = f"{mine['gbs']:7d}" if mine else " " * 7
        ratio = f"{min(same) / mine['median_ms']:7.2f}" if mine and same else ""
        lines.append(f"{name:12}{shape:>7}  {PASSES[which]:9}{shown}{speed}{ratio}")
    lines += [f"failed: {r['engine']} on {r['case']} {r['shape']}: {r['failed']}" for r in rows if "failed" in r]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed runs for each row")
    parser.add_argument("--limit", type=int, default=60, help="seconds for an engine on one case, compiling included")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/recurrences.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    rows, start = [], time.perf_counter()
    add = attention.recorder(rows, given.results)
    options = given.peers, given.seconds, given.limit
    whole = [p for p in given.passes if p != "step"]
    shapes = given.shapes if whole else []
    todo = [(name, shape, bench(name, shape, whole, *options)) for shape in shapes for name in given.cases]
    if "step" in given.passes:
        todo += [(name, f"{n}x1", stepped(name, n, *options)) for n in BATCHES for name in given.cases]
    for number, (name, shape, found) in enumerate(todo):
        print(f"[{number}/{len(todo)}, {time.perf_counter() - start:.0f} s] {name} {shape}", flush=True)
        for row in found:
            add(row)
    print("\n" + table(rows, given.peers))
    return int(any(row.get("failed") and row["engine"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
