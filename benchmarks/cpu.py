"""Time sparse attention on a CPU beside torch's dense causal attention: a tenth of the pairs, forward, float32.

    python benchmarks/cpu.py                    8192 tokens, 8 heads of 64
    python benchmarks/cpu.py --lengths 2048 8192 --threads 1 2 --results benchmarks/results/cpu.jsonl

A line for each case: milliseconds of dense and of ours, the least of some turns, as others may use the machine, and how
many times as fast it is. Each output is compared with dense attention under the same mask first.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads import attention, explain
from manyheads.core import Blocks, Scores, Selection

HEADS, HEAD_DIM, BLOCK, SHARE, TURNS = 8, 64, 128, 0.1, 9


def spent(*calls: Callable[[], Any]) -> list[float]:
    """Milliseconds of each, in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - start))
    return [min(own) for own in times]


def window(length: int) -> tuple[Scores, Tensor]:
    """A window that sees a tenth of a causal mask's pairs, and its mask."""
    size = int(length * (1 - (1 - SHARE) ** 0.5))
    i = torch.arange(length)
    form = Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < size))
    return form, (i <= i[:, None]) & (i[:, None] - i < size)


def blocks(length: int) -> tuple[Selection, Tensor]:
    """For each block of queries its own and a tenth of those before it, drawn anew for each head."""
    n = length // BLOCK
    draw, m = torch.Generator().manual_seed(0), torch.arange(n)
    count = (SHARE * (m + 1)).ceil().long()
    liked = torch.rand(1, HEADS, n, n, generator=draw).masked_fill(m > m[:, None], -1.0) + 2.0 * torch.eye(n)
    keep = liked.argsort(-1, descending=True).argsort(-1) < count[:, None]
    chosen = Blocks.from_map(keep)
    form = Selection(
        select=lambda q, k, *, scale, offset: chosen, scores=Scores(mask=lambda b, h, i, j: j <= i),
        query_block=BLOCK, key_block=BLOCK,
    )  # fmt: skip
    pairs = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    return form, pairs & torch.ones(length, length, dtype=torch.bool).tril()


def row(name: str, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, length, HEAD_DIM)
    form, mask = {"window": window, "blocks of 128": blocks}[name](length)
    found, true = attention(q, k, v, form), scaled_dot_product_attention(q, k, v, attn_mask=mask)
    error = ((found - true).norm() / true.norm()).item()
    if not error < 1e-5:  # float32, sums of a few thousand numbers
        raise RuntimeError(f"{name}: the relative error is {error}")
    dense, ours = spent(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), lambda: attention(q, k, v, form))
    kept = mask.expand(1, HEADS, -1, -1).sum(dtype=torch.float64).item() / (HEADS * length * (length + 1) / 2)
    return {
        "case": f"{name} on a CPU", "length": length, "heads": HEADS, "head_dim": HEAD_DIM,
        "runs": explain(q, k, v, form).engine, "dense_ms": round(dense, 2), "ours_ms": round(ours, 2),
        "faster": round(dense / ours, 2), "kept": round(kept, 4), "threads": torch.get_num_threads(),
        "cpu": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    with torch.no_grad():
        for length, threads, name in product(given.lengths, given.threads, ("window", "blocks of 128")):
            torch.set_num_threads(threads)
            line = json.dumps(row(name, length))
            print(line, flush=True)
            if given.results:
                with given.results.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
