"""Attention over lists of key blocks beside its peers, on the GPU at hand, in one process.

    python benchmarks/selections.py                                     all lengths, blocks and widths
    python benchmarks/selections.py --lengths 32768 --blocks 128 --peers ours flex
    python benchmarks/selections.py --query-blocks 1 16 64 --blocks 512 64 --peers ours unions
    python benchmarks/selections.py --query-blocks 1 --blocks 64 --kept 16 --heads 64 4 --peers ours nsa fsa fsa_nsa

Each 128 queries look at a share of the key blocks before them, drawn at random, and causally at their own ones.
--query-blocks: so many queries instead. --kept 1 or more: so many blocks in all, their own and the first one with them,
which the heads of a group share, as in Native Sparse Attention. Where ours are run in rounds, "unions" are tiles of 128
queries in their natural order that visit what any of them chose. The others are in sparse_peers.py.
Every engine is checked first against float64: o, dq, dk and dv of the last queries of the first heads. A row is one
engine, forward or backward, as benchmarks/attention.py has them; useful TFLOP/s count the pairs that are chosen and
allowed. Building tables of lists is in our times and not in FlexAttention's, whose BlockMask is made before. The row
"parts" has the milliseconds of what comes before the kernels, alone: choosing by pooled scores, our tables, the
transposed ones, or the order of rounds, and FlexAttention's BlockMask. cuDNN computes all causal pairs, and its TFLOP/s
count them. Some peers copy q, k and v into their order of dimensions within a call.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import attention
import torch
from cases import Shape
from peers import Run
from sparse_peers import PEERS as OTHERS
from sparse_peers import QUERIES, block_mask, causal
from torch import Tensor

from manyheads.core.builders import transposed
from manyheads.core.checks import build_inputs
from manyheads.core.choosing import block_means, products
from manyheads.core.forms import Blocks, Scores, Selection
from manyheads.engines import eager
from manyheads.engines import triton as kernels

LAST, K = 256, 1024
SCORES = Scores(mask=causal)


# ---- which blocks ----


def liked(likes: Tensor, block: int, kept: float, queries: int = QUERIES) -> Blocks:
    """The own key blocks of a block of queries and the best of those before: a share, or so many with the own ones, the
    first of all among them. likes: float [batch, heads, query blocks, key blocks]."""
    rows, columns = likes.shape[-2:]
    own, before = max(1, queries // block), torch.arange(rows, device=likes.device) * queries // block
    past = torch.arange(columns, device=likes.device) < before[:, None]
    if kept < 1:
        number, most = (kept * before).ceil(), math.ceil(kept * columns)
    else:
        most = int(kept) - own
        number, likes = before.clamp(max=most), likes.index_fill(-1, before[:1], torch.inf)
    top = likes.masked_fill(~past, -torch.inf).topk(most, dim=-1).indices
    rank = torch.arange(top.shape[-1] + own, device=likes.device)
    self_too = (before[:, None] + torch.arange(own, device=likes.device)).expand(*likes.shape[:-1], own)
    there = (rank < own) | (rank - own < number[:, None])
    return Blocks.from_indices(torch.cat([self_too, top], -1), there.expand(*likes.shape[:-1], -1))


def pooled(q: Tensor, k: Tensor, block: int, kept: float, queries: int = QUERIES) -> Blocks:
    """By the products of mean queries and mean keys."""
    return liked(products(block_means(q, queries), block_means(k, block)), block, kept, queries)


def selection(blocks: Blocks, block: int, queries: int = QUERIES, together: bool = False) -> Selection:
    """For these blocks; of the last queries and first heads it chooses the same. together: as Selection has it."""

    def select(q: Tensor, k: Tensor, *, scale: float, offset: int) -> Blocks:
        part = slice(None), slice(q.shape[1]), slice(offset // queries, None)
        return Blocks(blocks.indices[part], blocks.counts[part])

    return Selection(select=select, scores=SCORES, query_block=queries, key_block=block, together=together)


def pairs(blocks: Blocks, block: int, queries: int = QUERIES) -> float:
    """Of queries and keys, over all heads, that are chosen and allowed."""
    own, lists = max(1, queries // block), blocks.counts.numel()
    i = torch.arange(blocks.counts.shape[-1] * queries, device=blocks.counts.device)
    seen = i % (own * block) + 1  # of a query's own blocks, which all have
    inside = float(seen.sum()) * lists / blocks.counts.shape[-1]
    return (float(blocks.counts.sum()) - lists * own) * queries * block + inside


# ---- who computes ----


def ours(form: Selection, blocks: Blocks, block: int) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = build_inputs(form, q, k, v, None, None, None, None, {})
        why = kernels.why_not(form, x)
        if why is not None:
            raise RuntimeError(why)
        return kernels.run(form, x)[0]

    return run


def unions(form: Selection, blocks: Blocks, block: int) -> Run:
    from manyheads.engines.triton import hopper, launch

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = build_inputs(form, q, k, v, None, None, None, None, {})
        return launch.attend(form.scores, x, hopper.selected.chosen_of(form, x, blocks))[0]

    return run


PEERS: dict[str, Callable[[Selection, Blocks, int], Run]] = {"ours": ours, "unions": unions, **OTHERS}


# ---- rows ----


def truth(form: Selection, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """o, dq, dk and dv in float64 of the last queries of the first heads, whose dk and dv come from no other query."""
    group = q.shape[1] // k.shape[1]
    leaves = [t.detach().double().requires_grad_() for t in (q[:, :group, -LAST:], k[:, :1], v[:, :1])]
    x = build_inputs(form, leaves[0], leaves[1], leaves[2], None, None, None, None, {})
    o, _ = eager.run(form, x)
    return [o.detach(), *torch.autograd.grad(o, leaves, do[:, :group, -LAST:].double())]


def bench(
    shape: Shape, queries: int, block: int, kept: float, wanted: list[str], passes: list[str], seconds: float,
    limit: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    torch.manual_seed(0)
    group = 1 if kept < 1 else shape.heads // shape.kv_heads
    likes = torch.rand(shape.batch, shape.heads // group, shape.length // queries, shape.length // block, device="cuda")
    blocks = liked(likes, block, kept, queries)
    blocks = Blocks(*(t.repeat_interleave(group, 1) for t in (blocks.indices, blocks.counts)))
    del likes

    def leaf(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, shape.head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = (leaf(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    do, form = leaf(shape.heads), selection(blocks, block, queries, together=kept >= 1)
    last = torch.zeros_like(do)  # the part of do that `truth` knows
    last[:, : shape.heads // shape.kv_heads, -LAST:] = do[:, : shape.heads // shape.kv_heads, -LAST:]
    true, count = truth(form, q, k, v, last), 4 * pairs(blocks, block, queries) * shape.head_dim
    case = f"blocks of {block}" + (f" for {queries}" if queries != QUERIES else "")
    case = case if kept < 1 else f"{int(kept)} {case}"
    about = {"case": case, **shape._asdict(), "dtype": "bfloat16", "share" if kept < 1 else "number": kept}
    for peer in (p for p in PEERS if p in wanted):
        row = {**about, "engine": peer}
        try:
            with attention.limited(limit):
                yield from timed(
                    row, PEERS[peer], form, (blocks, block), true, count, (q, k, v, do), last, passes, seconds
                )
        except Exception as e:  # a peer that cannot is a row, not the end
            yield {**row, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        torch.cuda.empty_cache()
    yield from parts(about, form, blocks, block, kept, (q, k, v), wanted, seconds, limit)


def timed(
    row: dict[str, Any], peer: Callable[..., Run], form: Selection, given: tuple[Blocks, int], true: list[Tensor],
    count: float, tensors: tuple[Tensor, ...], last: Tensor, passes: list[str], seconds: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one engine, which is checked first."""
    (*qkv, do), start = tensors, time.perf_counter()
    run = peer(form, *given)
    o = run(*qkv)
    torch.cuda.synchronize()
    row = {**row, "first_call_s": round(time.perf_counter() - start, 3)}
    found = [o]
    if o.requires_grad and "backward" in passes:
        found += torch.autograd.grad(o, qkv, last, retain_graph=True)
    errors = [attention.error(a, b) for a, b in zip(found, true, strict=False)]
    if not max(errors) < attention.BOUND:
        raise RuntimeError(f"wrong: relative errors of o, dq, dk, dv are {errors}")
    for which in (p for p in passes if p == "forward" or o.requires_grad):
        if which == "forward":
            call = torch.no_grad()(partial(run, *qkv))
        else:
            call = partial(torch.autograd.grad, o, qkv, do, retain_graph=True)
        memory, times = attention.beyond(call), attention.measured(call, seconds)
        speed = count * (1 if which == "forward" else 2.5) / times["median_ms"] / 1e9
        yield {**row, "pass": which, "beyond_mib": memory, **times, "tflops": round(speed, 1), "error": max(errors)}


def parts(
    about: dict[str, Any], form: Selection, blocks: Blocks, block: int, kept: float,
    given: tuple[Tensor, Tensor, Tensor], wanted: list[str], seconds: float, limit: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Milliseconds of what comes before the kernels, each alone."""
    from manyheads.engines.triton import hopper
    from manyheads.engines.triton.hopper import backward, forward

    q, k, v = (t.detach() for t in given)
    x = build_inputs(form, q, k, v, None, None, None, None, {})
    choosing = partial(hopper.chosen_of, form, x, blocks)
    chosen = choosing()
    calls: dict[str, Callable[[], Any]] = {}
    if kept < 1:
        calls["choosing_ms"] = partial(pooled, q, k, block, kept, form.query_block)
    if isinstance(chosen, hopper.rounds.Rounds):
        calls["ordering_ms"] = lambda: deque(hopper.rounds.ordered(form.scores, x, chosen), maxlen=0)
    elif isinstance(chosen, hopper.tokens.Tokens):
        own = chosen.blocks
        calls["transposing_ms"] = partial(transposed, own.indices, own.counts, math.ceil(x.kv_len / block))
    else:
        table = partial(chosen.table_of, form.scores.program, x)
        tiling = backward.keys_tiling_of(form.scores, x, chosen)
        turned = (tiling.queries, 64 if tiling.halves else 128)
        calls["table_ms"] = partial(table, (QUERIES, forward.tiling_of(form.scores, x, chosen).keys), {})
        calls["transposing_ms"] = partial(table, turned, {}, True)
        if chosen.bits is not None:
            calls["marking_ms"] = choosing
    if "flex" in wanted:
        calls["flex_block_mask_ms"] = partial(block_mask, blocks, block)
    row = {**about, "case": f"{about['case']}: parts", "engine": "ours"}
    for name, call in calls.items():
        try:
            with attention.limited(limit):
                row[name] = round(attention.measured(call, seconds)["median_ms"], 4)
        except Exception as e:
            yield {**row, "failed": f"{name}: {type(e).__name__}: {e}".splitlines()[0][:300]}
    yield row


def summary(rows: list[dict[str, Any]], wanted: list[str]) -> str:
    lines = [attention.table([r for r in rows if "parts" not in r["case"]], wanted)]
    for r in rows:
        spent = ", ".join(f"{name.removesuffix('_ms')} {ms} ms" for name, ms in r.items() if name in PARTS)
        lines += [f"{r['case']}, {r['length']} x {r['head_dim']}: {spent}"] if spent else []
    return "\n".join(lines)


PARTS = ("choosing_ms", "marking_ms", "ordering_ms", "table_ms", "transposing_ms", "flex_block_mask_ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32 * K, 128 * K])
    parser.add_argument("--blocks", nargs="+", type=int, default=[128, 64], help="keys in a block")
    parser.add_argument("--query-blocks", nargs="+", type=int, default=[QUERIES], help="queries in a block")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 8], metavar=("HEADS", "KV_HEADS"))
    parser.add_argument("--kept", type=float, default=0.1, help="of the key blocks before a query, or so many in all")
    parser.add_argument("--passes", nargs="+", default=list(attention.PASSES), choices=attention.PASSES)
    parser.add_argument("--peers", nargs="+", default=["ours", "flex", "cudnn"], choices=[*PEERS, "cudnn"])
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed runs for each row")
    parser.add_argument("--limit", type=int, default=60, help="seconds for an engine on one case, compiling included")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/selections.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    rows, start = [], time.perf_counter()
    add, (heads, kv_heads) = attention.recorder(rows, given.results), given.heads
    for length in given.lengths:
        for head_dim in given.head_dims:
            shape = Shape(1, heads, kv_heads, length, head_dim)
            for queries, block in product(given.query_blocks, given.blocks):
                print(f"[{time.perf_counter() - start:.0f} s] blocks of {queries} and {block}, {shape}", flush=True)
                how = given.peers, given.passes, given.seconds, given.limit
                for row in bench(shape, queries, block, given.kept, *how):
                    add(row)
            if "cudnn" in given.peers:
                for row in attention.bench(
                    "causal", shape, torch.bfloat16, ["cudnn"], given.passes, given.seconds, given.limit
                ):
                    add(row)
    print("\n" + summary(rows, given.peers))
    return int(any(row.get("failed") and row["engine"] == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
