"""What choosing blocks costs beside the attention that it leaves, on the GPU at hand.

    python benchmarks/builders.py                                     both builders, 32k, 128k and 256k
    python benchmarks/builders.py --lengths 32768 --blocks 128 --share 0.05

128 queries choose by the products of mean queries and mean keys: a number of blocks, a share of all there are (top-k),
or the fewest that hold a share of the softmax (top-p); and always their own. A row is one builder, with milliseconds of
each step and of attention over the lists that it made: pool (q and k are read once), choose, both by torch operations,
table, turn (the transposed table), forward (table included) and backward (turn included). Where kernels are small the
host's launches are most of that: pool, choose, table and turn are timed as CUDA graphs as well, and pool, choose and
turn as one graph (together), which shares count.
Lists are checked first: those of top-k equal those of torch operations where sums are exact, those of top-p are right
for masses in float64.

--builders windows stripes map: what infllm_v2 and flexprefill choose by, with their published sizes, and the cells of a
whole map that hold a share of it; these are checked first, and timed by torch operations as well up to 32k.
flexprefill infllm_v2 dhsa sale hip_attention: their whole choices. Rows have the milliseconds of choosing, as a CUDA
graph too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import attention
import torch
from cases import Shape
from selections import QUERIES, K, ours, pairs, selection
from torch import Tensor

from manyheads.core import builders, picking
from manyheads.core.checks import build_inputs
from manyheads.core.choosing import Past, best_past, block_means, fewest_past, products, window_means
from manyheads.core.forms import Blocks, Selection
from manyheads.mechanisms import get

# ---- builders: of mean queries and mean keys ----


def top_k(q: Tensor, k: Tensor, past: Past, share: float) -> Blocks:
    return best_past(q, k, math.ceil(share * k.shape[2]), past)


def top_p(q: Tensor, k: Tensor, past: Past, share: float) -> Blocks:
    return fewest_past(q, k, share, past, scale=q.shape[-1] ** -0.5)


def top_k_by_torch(q: Tensor, k: Tensor, past: Past, share: float) -> Blocks:
    return Blocks(*picking.best_past(q, k, math.ceil(share * k.shape[2]), *astuple(past)))


def top_p_by_torch(q: Tensor, k: Tensor, past: Past, share: float) -> Blocks:
    return Blocks(*picking.fewest_past(q, k, q.shape[-1] ** -0.5, share, 0, *astuple(past)))


BUILDERS: dict[str, tuple[Callable[..., Blocks], Callable[..., Blocks]]] = {
    "top-k": (top_k, top_k_by_torch), "top-p": (top_p, top_p_by_torch),
}  # fmt: skip


def amiss(kept: Tensor, p: Tensor, taken: Tensor, share: float, least: int = 0) -> Tensor:
    """bool [...]: rows of the map `kept` that are not what fewest_past says, for masses p float64, 0 where nothing is
    seen. The kernel's float32 masses and sums are off by a few 1e-6: what differs by less than 1e-5 counts as equal."""
    out = p.masked_fill(kept, 0.0).amax(-1, keepdim=True)
    heavy = kept & (p > 0) & (p >= out * (1 - 1e-5))
    enough = ((p * heavy).sum(-1) >= share - 1e-5) & (heavy.sum(-1) >= (p > 0).sum(-1).clamp(max=least))
    lightest = p.masked_fill(~kept | taken, torch.inf).amin(-1, keepdim=True)
    heavier = p > lightest * (1 + 1e-5)
    needed = ((p * heavier).sum(-1) < share + 1e-5) | (heavier.sum(-1) < least)
    return ~(enough & needed) | (taken & ~kept).any(-1) | (kept & (p == 0)).any(-1)


def masses(q: Tensor, k: Tensor, scale: float, past: Past) -> tuple[Tensor, Tensor]:
    """p for `amiss`, and what is taken in any case."""
    s = picking.products(q.double(), k.double()) * scale
    seen, taken = picking.past(*s.shape[-2:], *astuple(past), device=q.device)
    return s.masked_fill(~seen, -torch.inf).softmax(-1), taken


def check(name: str, q: Tensor, k: Tensor, past: Past, share: float) -> None:
    """For q and k of these shapes. Raises RuntimeError if lists are wrong."""
    build, by_torch = BUILDERS[name]
    if name == "top-k":  # whole numbers: sums of products are exact in any order, and many are equal
        q, k = (torch.randint(-2, 3, t.shape, device=t.device).to(t.dtype) for t in (q, k))
    means = block_means(q, past.query_block), block_means(k, past.key_block)
    found, n, group = build(*means, past, share), means[1].shape[2], q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):  # one head at a time, as maps of all of them are large
        own = means[0][:, h : h + 1], means[1][:, h // group : h // group + 1]
        kept = Blocks(found.indices[:, h : h + 1], found.counts[:, h : h + 1]).to_map(n)
        if name == "top-k":
            wrong = (kept != by_torch(*own, past, share).to_map(n)).any(-1)
        else:
            wrong = amiss(kept, *masses(*own, q.shape[-1] ** -0.5, past), share)
        if wrong.any():
            raise RuntimeError(f"{name} is wrong about {int(wrong.sum())} rows of head {h}")


# ---- choices: of q and k ----

SIZES = {"kernel": 32, "stride": 16}  # of infllm_v2's windows
BLOCK, TOP, FIRST, LOCAL, LAST = 64, 96, 1, 31, 200


def outweighed(kept: Tensor, likes: Tensor, seen: Tensor, taken: Tensor, number: Tensor) -> Tensor:
    """bool [...]: rows of the map `kept` that are not the `number` blocks of those `seen` with the greatest likes
    float64, what is `taken` first. What differs by less than 1e-4 counts as equal: scores of up to 20 in float32 are
    off by 1e-5."""
    wrong = (kept.sum(-1) != torch.minimum(seen.sum(-1), number)) | (kept & ~seen).any(-1) | (taken & ~kept).any(-1)
    lightest = likes.masked_fill(~kept | taken, torch.inf).amin(-1)
    return wrong | (lightest < (1 - 1e-4) * likes.masked_fill(kept | ~seen, 0.0).amax(-1))


def windows(q: Tensor, k: Tensor, by: Any = builders) -> tuple[Tensor, Tensor]:
    """Of heads that share a key head."""
    together, rule = q.shape[1] // k.shape[1], (1, BLOCK, k.shape[2] - q.shape[2], FIRST, LOCAL)
    scale, means = q.shape[-1] ** -0.5, window_means(k, **SIZES)
    return by.best_windows(q, means, scale, TOP, 0, together, *SIZES.values(), *rule)


def check_windows(q: Tensor, k: Tensor) -> None:
    lists, n, group = windows(q, k), k.shape[2], q.shape[1] // k.shape[1]
    last = q[:, :group, -LAST:], k[:, :1]
    kept = Blocks(*(t[:, :1, -LAST:] for t in lists)).to_map(-(-n // BLOCK))
    likes = picking.window_weights(
        last[0].double(), window_means(last[1].double(), **SIZES), q.shape[-1] ** -0.5, n - LAST, kept.shape[-1], group,
        *SIZES.values(), BLOCK,
    )  # fmt: skip
    seen, taken = picking.past(LAST, kept.shape[-1], 1, BLOCK, n - LAST, FIRST, LOCAL, device=q.device)
    if (wrong := outweighed(kept, likes, seen, taken, torch.tensor(TOP, device=q.device))).any():
        raise RuntimeError(f"windows is wrong about {int(wrong.sum())} of {LAST} rows")


def stripes(q: Tensor, k: Tensor, by: Any = builders) -> Tensor:
    return by.stripes(q[:, :, -QUERIES:], k, q.shape[-1] ** -0.5, QUERIES)


def check_stripes(q: Tensor, k: Tensor) -> None:
    group = q.shape[1] // k.shape[1]
    torch.testing.assert_close(  # weights of a float32 score of 10 are off by 1e-6, relatively
        stripes(q, k)[:, :, :group].double(),
        stripes(q[:, :group].double(), k[:, :1].double(), picking),
        rtol=1e-5,
        atol=1e-8,
    )


def cells(q: Tensor, k: Tensor, by: Any = builders) -> Tensor:
    """Of all means of 128 queries and keys of a head."""
    mass = products(*(block_means(t, QUERIES) for t in (q, k))).mul(q.shape[-1] ** -0.5).flatten(-2).softmax(-1)
    return by.heaviest(mass, torch.full((1,), 0.9, device=q.device), 0, False)


def check_cells(q: Tensor, k: Tensor) -> None:
    mass = products(*(block_means(t[:, :1].double(), QUERIES) for t in (q, k))) * q.shape[-1] ** -0.5
    kept, p = cells(q, k)[:, 0], mass.flatten(-2).softmax(-1)[:, 0]
    if amiss(kept, p, torch.zeros_like(kept), 0.9).any():
        raise RuntimeError("the cells of a map are wrong")


CHOICES: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "windows": (windows, check_windows), "stripes": (stripes, check_stripes), "map": (cells, check_cells),
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "flexprefill": {}, "infllm_v2": {}, "dhsa": {"grain": 16}, "sale": {}, "hip_attention": {"query_stride": 2},
}  # fmt: skip


def choice(shape: Shape, name: str, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k = (
        torch.randn(1, heads, shape.length, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    if name in WHOLE:
        form = get(name)(**WHOLE[name])
        assert isinstance(form, Selection)
        calls = {"choose": partial(form.select, q, k, scale=shape.head_dim**-0.5, offset=0)}
    else:
        choose, check = CHOICES[name]
        check(q, k)
        calls = {"choose": partial(choose, q, k), "by_torch": partial(choose, q, k, picking)}
        if shape.length > 32 * K:
            del calls["by_torch"]
    ms = {f"{step}_ms": round(attention.measured(call, seconds)["median_ms"], 4) for step, call in calls.items()}
    graph = attention.graphed(calls["choose"], seconds)
    return ms | ({} if graph is None else {"choose_graph_ms": round(graph, 4)})


# ---- rows ----

GRAPHED = ("pool", "choose", "table", "turn", "together")


def bench(shape: Shape, block: int, name: str, share: float, seconds: float) -> dict[str, Any]:
    from manyheads.engines.triton.hopper import backward, forward, selected

    torch.manual_seed(0)

    def leaf(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, shape.head_dim, device="cuda", dtype=torch.bfloat16)

    leaves = [leaf(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    (q, k, v), do = (t.detach() for t in leaves), leaf(shape.heads)
    build, by_torch = BUILDERS[name]
    past = Past(query_block=QUERIES, key_block=block, offset=0)
    check(name, q, k, past, share)
    means = block_means(q, QUERIES), block_means(k, block)
    blocks = build(*means, past, share)
    form = selection(blocks, block)
    run, x = ours(form, blocks, block), build_inputs(form, q, k, v, None, None, None, None, {})
    chosen = selected.chosen_of(form, x, blocks)
    tiling, table = backward.keys_tiling_of(form.scores, x, chosen), partial(chosen.table_of, form.scores.program, x)
    o = run(*leaves)
    calls: dict[str, Callable[[], Any]] = {
        "pool": lambda: (block_means(q, QUERIES), block_means(k, block)),
        "choose": partial(build, *means, past, share),
        "by_torch": lambda: by_torch(picking.block_means(q, QUERIES, 0), picking.block_means(k, block, 0), past, share),
        "table": partial(table, (QUERIES, forward.tiling_of(form.scores, x, chosen).keys), {}),
        "turn": partial(table, (tiling.queries, 64 if tiling.halves else 128), {}, True),
        "forward": torch.no_grad()(partial(run, q, k, v)),
        "backward": partial(torch.autograd.grad, o, leaves, do, retain_graph=True),
    }

    def together() -> Any:
        made = build(block_means(q, QUERIES), block_means(k, block), past, share)
        own = selected.chosen_of(form, x, made)
        return own.table_of(form.scores.program, x, (tiling.queries, 64 if tiling.halves else 128), {}, True)

    calls["together"] = together
    ms = {f"{step}_ms": round(attention.measured(call, seconds)["median_ms"], 4) for step, call in calls.items()}
    for step in GRAPHED:
        spent = attention.graphed(calls[step], seconds)
        if spent is None:
            raise RuntimeError(f"{step} cannot be a CUDA graph")
        ms[f"{step}_graph_ms"] = round(spent, 4)
    turn, before = ms["turn_graph_ms"], ms["together_graph_ms"]
    return {
        "kept": round(pairs(blocks, block) / (shape.batch * shape.heads * shape.length * (shape.length + 1) / 2), 4),
        **ms,
        "of_forward": round(before / ms["forward_ms"], 4),
        "of_both": round(before / (ms["forward_ms"] + ms["backward_ms"] - turn), 4),
    }


def line(row: dict[str, Any]) -> str:
    about = f"{row['case']}, {row['length']} x {row['head_dim']}: "
    if "failed" in row:
        return about + row["failed"]
    steps = {name.removesuffix("_ms").replace("_", " "): ms for name, ms in row.items() if name.endswith("_ms")}
    spent = ", ".join(f"{name} {ms}" for name, ms in steps.items())
    if "kept" not in row:
        return f"{about}ms: {spent}"
    shares = f"pool, choose and turn {row['of_forward']:.1%} of forward, {row['of_both']:.1%} of both passes"
    return f"{about}{row['kept']:.1%} kept, ms: {spent}; {shares}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32 * K, 128 * K, 256 * K])
    parser.add_argument("--blocks", nargs="+", type=int, default=[128, 64], choices=(64, 128))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--builders", nargs="+", default=list(BUILDERS), choices=[*BUILDERS, *CHOICES, *WHOLE])
    parser.add_argument("--share", type=float, default=0.1, help="of key blocks, or of the softmax")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed runs for each step")
    parser.add_argument("--limit", type=int, default=120, help="seconds for a row, compiling included")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/builders.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    rows, start = [], time.perf_counter()
    add = attention.recorder(rows, given.results)
    cases = [(n, d, b, m) for n in given.lengths for d in given.head_dims for b in given.blocks for m in given.builders]
    cases = [case for case in cases if case[3] in BUILDERS or case[2] == given.blocks[0]]
    for length, head_dim, block, name in cases:
        pooled = name in BUILDERS
        shape = Shape(1, 32 if pooled else 16, 8 if pooled else 4, length, head_dim)
        row = {"case": f"choosing: {name}", **shape._asdict(), "dtype": "bfloat16"}
        row |= {"case": f"blocks of {block}: {name}", "share": given.share} if pooled else {}
        try:
            with attention.limited(given.limit):
                found = (
                    bench(shape, block, name, given.share, given.seconds)
                    if pooled
                    else choice(shape, name, given.seconds)
                )
                row |= {"engine": "ours", **found}
        except Exception as e:
            row |= {"engine": "ours", "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        add(row)
        print(f"[{time.perf_counter() - start:.0f} s] {line(row)}", flush=True)
        torch.cuda.empty_cache()
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
