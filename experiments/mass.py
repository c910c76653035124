"""Measure how much of dense attention's softmax mass every training-free sparse mechanism keeps, what that costs, and
what a model loses by it.

    python -m experiments.mass                                  all of them, from the top of the repository
    python -m experiments.mass moba flexprefill --tokens 1024   some of them
    python -m experiments.mass --device cuda

Each mechanism is run with several settings on a model's own queries, keys and values, in all layers of the model as it
reads a text, and on planted patterns. Rows that are in the file already are skipped, so that a run which was cut off
goes on. `python docs/generate.py` writes docs/sparse.md from them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.jobs import chip
from experiments.kept import (
    Dense,
    attend,
    density,
    error,
    kept,
    oracle,
    random_blocks,
    settled,
    why_not,
    worst,
)  # fmt: skip
from experiments.planted import PATTERNS, planted
from experiments.run import RESULTS, read
from manyheads import apply, attention
from manyheads.core.forms import Form, Selection
from manyheads.core.tiling import choose
from manyheads.evaluate import measure
from manyheads.mechanisms import get, names

Settings = Mapping[str, Any]
MODEL, TEXT = "model", "text"  # the data that are a model's own: its attention, and what it reads
REPEATS = 5  # of each timing, of which the fastest counts: what else a machine does makes calls slower, never faster
SHORTEST = 256  # tokens
PART = 256  # tokens whose distributions are held at once

# What turns a mechanism from few pairs to many, for n tokens: all combinations, on top of its settings for n. Those
# that are not here run with their settings for n alone.
KNOBS: Mapping[str, Callable[[int], Mapping[str, tuple[Any, ...]]]] = {
    "dhsa": lambda n: {
        "keys": tuple(n * x // 64 for x in (2, 3, 4, 9, 16, 28)),
        "local": (n // 32,),
        "query_block": (n // 32,),
        "first": (n // 128,),
    },
    "flexprefill": lambda n: {"gamma": (0.2, 0.5, 0.7, 0.85, 0.92, 0.97), "min_budget": (n // 32,)},
    "hip_attention": lambda n: {"top_k": tuple(n // x for x in (64, 32, 16, 8, 4, 2))},
    "infllm_v2": lambda n: {"top_k": (1, 2, 4, 6, 10, 16), "window": (n // 32,), "dense_len": (n // 32,)},
    "moba": lambda n: {"top_k": (1, 2, 3, 5, 8, 12, 16)},
    "power_attention": lambda n: {"window_blocks": (1, 16, 32, 64, 128), "block_size": (n // 256,)},
    "s2_attention": lambda n: {"stride": (32, 16, 8, 4, 2), "local_blocks": (1,)},
    "sale": lambda n: {"tau": (30.0, 0.2, 0.06, 0.02, 0.006, 0.002, 0.0006), "local": (n // 32,)},
    "sink_fixed_attention": lambda n: {"group_size": tuple(n // x for x in (32, 16, 8, 4, 2))},
    "sliding_window": lambda n: {"window": tuple(n * x // 64 for x in (1, 2, 4, 8, 16, 28))},
    "spargeattn": lambda n: {"tau": (0.1, 0.5, 0.75, 0.85, 0.91, 0.95, 0.98)},
    "tca_attention": lambda n: {"tau": (0.05, 0.2, 0.4, 0.7, 0.85, 0.95), "window": (n // 64,)},
}


def settings(name: str, tokens: int) -> list[dict[str, Any]]:
    """What a mechanism is run with, for so many tokens."""
    at = get(name).at
    base = dict(at(tokens)) if at else {}
    knobs = KNOBS[name](tokens) if name in KNOBS else {}
    return [{**base, **dict(zip(knobs, values, strict=True))} for values in product(*knobs.values())]


def as_text(settings: Settings) -> str:
    """Equal for settings that were read from a file, where tuples are lists."""
    return json.dumps(settings, sort_keys=True)


def able(tokens: int) -> list[str]:
    """The mechanisms that are compared."""
    return [name for name in names() if why_not(get(name), get(name)(**settings(name, tokens)[0])) is None]


def measured(name: str, given: Settings, parts: list[Dense]) -> dict[str, Any]:
    """What a mechanism keeps of several layers of attention, beside what as many pairs can keep."""
    found: dict[str, list[float]] = {}

    def add(kind: str, dense: Dense, pairs: torch.Tensor, form: Form | None = None) -> None:
        masses, o = attend(dense, pairs)
        found.setdefault(f"{kind}density", []).append(density(pairs))
        found.setdefault(f"{kind}mass", []).extend(masses)
        own = o if form is None else attention(dense.q, dense.k, dense.v, form)
        found.setdefault(f"{kind}error", []).append(error(dense, own))

    for dense in parts:
        form = settled(get(name)(**given), dense)
        pairs = kept(form, dense)
        add("", dense, pairs, form)
        for bound in (oracle, random_blocks):
            add(f"{bound.__name__}_", dense, bound(dense, pairs))
    return {"worst": worst(found["mass"]), **{key: statistics.fmean(values) for key, values in found.items()}}


def times(name: str, given: Settings, dense: Dense) -> dict[str, float]:
    """Milliseconds of choosing, and of attending to what was chosen."""
    form = get(name)(**given)
    fixed = settled(form, dense)
    calls: dict[str, Callable[[], Any]] = {"attend_ms": lambda: attention(dense.q, dense.k, dense.v, fixed)}
    if isinstance(form, Selection):
        calls["choose_ms"] = lambda: choose(form, dense.inputs(form))

    def fastest(call: Callable[[], Any]) -> float:
        return min([measure.timed(call, dense.q.device)[1] for _ in range(REPEATS + 1)][1:])

    return {key: 1000 * fastest(call) for key, call in calls.items()}


@cache
def reader(tokens: int, device: str) -> tuple[Any, Tensor]:
    """SmolLM2-135M-Instruct, and the start of Python's documentation, [1, tokens]."""
    from manyheads.evaluate import models, texts

    loaded = models.load(device=device)
    ids = loaded.tokenizer(texts.read().content, add_special_tokens=False, verbose=False).input_ids[:tokens]
    return loaded.model, torch.tensor([ids], device=device)


def of_model(tokens: int, layers: list[int], device: str) -> list[Dense]:
    """Attention of some layers of a model that reads a text."""
    from manyheads.integrations.capture import queries_keys_and_values

    found = queries_keys_and_values(*reader(tokens, device), layers)
    return [Dense(*found[layer]) for layer in layers]


def perplexity(name: str, given: Settings, tokens: int, device: str) -> float:
    """Of the whole text, read with a mechanism in all layers of the model."""
    model, ids = reader(tokens, device)
    with apply(model, name, **given):
        hidden, _ = measure.prefill(model, ids)
    parts = zip(hidden[0, :-1].split(PART), ids[0, 1:, None].split(PART), strict=True)
    losses = [-measure.log_probs(model, part).gather(-1, following) for part, following in parts]
    return math.exp(torch.cat(losses).double().mean())


def rows(left: list[dict[str, Any]], device: str) -> Iterator[dict[str, Any]]:
    """The rows of jobs, which name data, mechanism, settings, tokens and layers. Jobs on one kind of data are a run."""
    data, parts = "", []
    for job in left:
        of, tokens = (job["mechanism"], job["settings"]), job["tokens"]
        if job["data"] != data:
            data = job["data"]
            if data in PATTERNS:
                parts = [planted(data, tokens, device)]
            elif data == MODEL:
                parts = of_model(tokens, job["layers"], device)
        if data == TEXT:
            row = {"perplexity": perplexity(*of, tokens, device)}
        else:
            row = measured(*of, parts) | (times(*of, parts[0]) if data == MODEL else {})
        yield {"experiment": "mass", **job, "torch": torch.__version__, "threads": torch.get_num_threads(), **row}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="mechanisms; all that are training-free if none is given")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11, 18, 26], help="of the model's 30")
    parser.add_argument("--data", nargs="+", default=[MODEL, TEXT, *PATTERNS], choices=[MODEL, TEXT, *PATTERNS])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS / "mass.jsonl")
    given = parser.parse_args(arguments)
    if given.tokens < SHORTEST:
        parser.error(f"--tokens must be {SHORTEST} or more, not {given.tokens}")
    known = able(given.tokens)
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"{unknown[0]!r} is not compared here: there are {', '.join(known)}")
    jobs = [
        {
            "data": data, "mechanism": name, "settings": each, "tokens": given.tokens,
            "layers": given.layers if data == MODEL else [], "device": chip(given.device),
        }
        for data in given.data for name in given.names or known for each in settings(name, given.tokens)
    ]  # fmt: skip
    had = {as_text({key: row[key] for key in jobs[0]}) for row in read(given.results)}
    left = [job for job in jobs if as_text(job) not in had]
    given.results.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with given.results.open("a", encoding="utf-8") as file:
        for count, row in enumerate(rows(left, given.device), 1):
            print(json.dumps(row), file=file, flush=True)
            passed = time.monotonic() - start
            if row["data"] == TEXT:
                about = f"perplexity {row['perplexity']:.3f}"
            else:
                about = f"{row['mass']:.3f} of the mass in {row['density']:.3f}"
            remaining = passed / count * (len(left) - count)
            where = f"{row['data']}, {row['mechanism']}"
            print(f"[{count}/{len(left)}, {passed:.0f} s, {remaining:.0f} s left] {where}: {about}", flush=True)
    print(f"{len(left)} rows measured, {len(jobs) - len(left)} were there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
