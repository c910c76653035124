"""Time selections end to end, choosing included, beside dense causal attention of cuDNN, on the GPU at hand.

    python benchmarks/whole.py                                      published settings, from 8k to 1M tokens
    python benchmarks/whole.py --mechanisms moba --lengths 131072   one of them at one length

Forward, bfloat16, 16 heads on 4, head_dim 128. q and k are of topics, as choices hang on them: runs of 512 tokens have
a topic each, keys show their own and queries ask for it and for that of an earlier run. A row has milliseconds of both,
of short calls as a CUDA graph too, the share of the pairs that was looked at, and what dense attention takes for one of
ours; rows go to a file if one is given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attention
import torch
from torch import Tensor

from manyheads import attention as attend
from manyheads.core.checks import build_inputs
from manyheads.core.forms import Selection
from manyheads.core.tiling import choose
from manyheads.mechanisms import get

K = 1024
LENGTHS = (8 * K, 32 * K, 128 * K, 512 * K, 1024 * K)
HEADS, KV_HEADS, HEAD_DIM, RUN = 16, 4, 128, 512
SHORT, ENOUGH = 100, 1000  # milliseconds: below which launches count, and for which one call says it
SETTINGS: dict[str, dict[str, Any]] = {
    "moba": {"block_size": 4096, "top_k": 12}, "flexprefill": {"gamma": 0.95, "tau": 0.1}, "infllm_v2": {},
    "dhsa": {"grain": 16},  # of which there are lists; the paper's is 1
    "sale": {}, "hip_attention": {"key_block": 16, "query_stride": 2},  # likewise; the paper's key_block is 2
}  # fmt: skip


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    draw = torch.Generator("cuda").manual_seed(0)
    runs = -(-length // RUN)
    topics = torch.randn(KV_HEADS, runs, HEAD_DIM, device="cuda", generator=draw)
    earlier = (torch.rand(KV_HEADS, runs, device="cuda", generator=draw) * torch.arange(runs, device="cuda")).long()
    wanted = topics + topics.gather(1, earlier[:, :, None].expand_as(topics))

    def spoken(of: Tensor, heads: int) -> Tensor:
        noise = torch.randn(1, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=draw)
        for h in range(heads):
            noise[0, h] += of[h * KV_HEADS // heads].repeat_interleave(RUN, 0)[:length].bfloat16()
        return noise

    return spoken(wanted, HEADS), spoken(topics, KV_HEADS), spoken(0 * topics, KV_HEADS)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def spent(call: Callable[[], Any]) -> float:
    """Milliseconds, the median of three after one that is not counted; of one where that takes longer than ENOUGH."""
    call()
    times: list[float] = []
    while len(times) < 3 and sum(times) < ENOUGH:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def share(form: Selection, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of the pairs of a causal mask, those in chosen blocks; their parts in the future count as well."""
    blocks = choose(form, build_inputs(form, q, k, v, None, None, None, None, {}))
    pairs = blocks.counts.sum(dtype=torch.float64).item() * form.query_block * form.key_block
    return pairs / (HEADS * q.shape[2] * (q.shape[2] + 1) / 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/whole.py needs a CUDA device; this machine has none", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    add, failed = attention.recorder(rows, given.results), False
    for length in given.lengths:
        q, k, v = inputs(length)
        with torch.no_grad():
            usual = spent(lambda q=q, k=k, v=v: dense(q, k, v))
            for name in given.mechanisms:
                form = get(name)(**SETTINGS[name])
                shape = {"batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "length": length, "head_dim": HEAD_DIM}
                row = {"case": f"{name}, whole", **shape, "engine": "ours", "settings": SETTINGS[name]}
                try:
                    call = partial(attend, q, k, v, form)
                    whole = spent(call)
                    graph = attention.graphed(call, 0.05) if whole < SHORT else None
                    chosen = spent(lambda q=q, k=k, v=v, form=form: choose(form, build_inputs(
                        form, q, k, v, None, None, None, None, {}
                    )))  # fmt: skip
                    kept = share(form, q, k, v)
                    row |= {"whole_ms": round(whole, 3), "dense_ms": round(usual, 3), "faster": round(usual / whole, 2)}
                    row |= {} if graph is None else {"graph_ms": round(graph, 3)}
                    row |= {"of_it_choosing_ms": round(chosen, 3), "kept": round(kept, 4)}
                except Exception as e:  # the row says it
                    row, failed = {**row, "failed": f"{type(e).__name__}: {e}".splitlines()[0][:200]}, True
                    torch.cuda.empty_cache()
                add(row)
        del q, k, v
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
