"""docs/benchmarks.md, from the rows that the benchmarks wrote and nothing else: the newest of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ENGINES = {
    "ours": "manyheads", "cudnn": "cuDNN", "flex": "FlexAttention", "flash2": "FA2", "flash3": "FA3", "flash4": "FA4",
    "flexprefill": "FlexPrefill", "nsa": "fla's NSA", "fsa": "FSA", "fsa_nsa": "FSA's NSA", "moba": "MoBA",
}  # fmt: skip
HEAD = """\
<!-- Written by docs/generate.py from benchmarks/results: run the benchmark, do not edit. -->

# Benchmarks

    make bench
    python benchmarks/selections.py --results benchmarks/results/selections.jsonl
    python benchmarks/builders.py --results benchmarks/results/selections.jsonl
    python benchmarks/whole.py --results benchmarks/results/selections.jsonl
    python benchmarks/recurrences.py --results benchmarks/results/recurrences.jsonl

time our kernels beside those that are installed, in one process, and append rows to a file. `python docs/generate.py`
writes this page from all files in `benchmarks/results`, the newest row of each kind. A row exists only where outputs
and gradients were near float64. TFLOP/s are useful ones: 4 operations for each number of the head and each pair that
the mask allows, 2.5 times as many backward. Engines ran one after the other on one
chip; how much each varied is in the file. FA3 is timed forward alone.
"""
SELECTIONS = """\
## Selections, beside others

Useful TFLOP/s over given lists of blocks, by `benchmarks/selections.py`; `benchmarks/sparse_peers.py` says who the
others are and how they are called. Blocks of keys, a tenth of those before 128 queries, drawn for each head; "for 1":
for each query by itself; "16 blocks": so many for each query, which the heads of a group share. A name is missing where
it does not take such lists, was not near float64 or was not run. Dense: milliseconds of cuDNN's causal attention over
ours.
"""
WHOLE = """\
## Selections, end to end

Milliseconds of a whole forward call, choosing included, in brackets as a CUDA graph, which leaves the host out, beside
dense causal attention of cuDNN, by `benchmarks/whole.py`: q and k have topics that runs of 512 tokens share. Kept: of
the pairs of a causal mask, those in chosen blocks, with what of these lies in the future.
"""
RECURRENCES = """\
## Recurrences

Milliseconds, in brackets as a CUDA graph, which leaves the host out; 16 heads of 128, bfloat16. GB/s count the fewest
bytes: what goes in is read once, what comes out is written once. cuDNN is causal softmax attention of the same shape.
"""
SHAPE = ("batch", "heads", "kv_heads", "length", "head_dim")
Row = Mapping[str, Any]


def rows(folder: Path = RESULTS) -> list[dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in map(json.loads, lines) if "engine" in row]


def newest(found: Iterable[Row]) -> list[Row]:
    """The last of the rows of each kind."""
    kinds: dict[tuple[Any, ...], Row] = {}
    for row in sorted(found, key=lambda r: r["time"]):
        kinds[tuple(row.get(name) for name in ("case", "shape", *SHAPE, "dtype", "engine", "pass"))] = row
    return list(kinds.values())


def page(found: Iterable[Row]) -> str:
    every = newest(found)
    kept, recurrent = ([r for r in every if ("shape" in r) == own] for own in (False, True))
    timed = [r for r in kept if "tflops" in r and r["engine"] in ENGINES]
    machines = sorted({f"{r['gpu']}, torch {r['torch']}, Triton {r['triton']}, cuDNN {r['cudnn']}" for r in timed})
    parts = [HEAD, *(f"On {machine}.\n" for machine in machines)]
    for back in ("forward", "backward"):
        parts += [
            f"## {back.capitalize()}\n",
            *_table([r for r in timed if r["pass"] == back and not _of_lists(r)]),
            "",
        ]
    parts += [SELECTIONS, *_selections(timed), ""]
    parts += [WHOLE, *_whole([r for r in kept if r["case"].endswith(", whole")]), ""]
    parts += [RECURRENCES, *_recurrences(recurrent), ""]
    parts += ["## Around the kernels\n", *_around(kept), ""]
    return "\n".join(parts)


def _table(timed: list[Row]) -> list[str]:
    engines = [e for e in ENGINES if any(r["engine"] == e for r in timed)]
    head = ["case", "shape", *(ENGINES[e] for e in engines), "of the best", "of FlexAttention"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    key = lambda r: (-r["head_dim"], r["case"], *(r[name] for name in SHAPE))  # noqa: E731  sort, group
    for _, group in groupby(sorted(timed, key=key), key=key):
        same = {r["engine"]: r for r in group}
        if "ours" not in same:
            continue
        ours = same["ours"]["tflops"]
        others = [r["tflops"] for e, r in same.items() if e != "ours"]
        speeds = [f"{same[e]['tflops']:.0f}" if e in same else "" for e in engines]
        best = f"{ours / max(others):.2f}" if others else ""
        flex = f"{ours / same['flex']['tflops']:.2f}" if "flex" in same else ""
        lines.append(f"| {' | '.join([same['ours']['case'], _shape(same['ours']), *speeds, best, flex])} |")
    return lines


def _shape(row: Row) -> str:
    heads = f"{row['heads']}" + ("" if row["heads"] == row["kv_heads"] else f" on {row['kv_heads']}")
    length = f"{row['length'] // 1024}k" if row["length"] % 1024 == 0 else str(row["length"])
    return f"{row['batch']} × {length}, {heads} heads of {row['head_dim']}"


def _of_lists(row: Row) -> bool:
    return "share" in row or "number" in row


def _selections(timed: list[Row]) -> list[str]:
    lines = ["| case | shape | pass | manyheads | of the best | others | dense |", "|---|---|---|---:|---:|---|---:|"]
    place = lambda r: (*(r[name] for name in SHAPE), r["pass"] == "backward")  # noqa: E731  sort, group
    dense = {place(r): r["median_ms"] for r in timed if r["case"] == "causal" and r["engine"] == "cudnn"}
    key = lambda r: (-r["head_dim"], r["case"], *place(r))  # noqa: E731
    for _, group in groupby(sorted(filter(_of_lists, timed), key=key), key=key):
        same = {r["engine"]: r for r in group}
        ours = same.pop("ours", None)
        if ours is None:
            continue
        others = sorted(same.values(), key=lambda r: -r["tflops"])
        best = f"{ours['tflops'] / others[0]['tflops']:.2f}" if others else ""
        told = ", ".join(f"{ENGINES[r['engine']]} {r['tflops']:.0f}" for r in others)
        faster = f"{dense[place(ours)] / ours['median_ms']:.1f}" if place(ours) in dense else ""
        cells = ours["case"], _shape(ours), ours["pass"], f"{ours['tflops']:.0f}", best, told, faster
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _whole(found: list[Row]) -> list[str]:
    lines = [
        "| mechanism | shape | manyheads | of it choosing | dense | times as fast | kept |",
        "|---|---|" + "---:|" * 5,
    ]
    for r in sorted(found, key=lambda r: (r["case"], r["length"])):
        name = ", ".join([r["case"].partition(",")[0], *(f"{k} {v}" for k, v in r["settings"].items())])
        if "failed" in r:
            lines.append(f"| {name} | {_shape(r)} | {r['failed'].partition('.')[0]} | | | | |")
            continue
        spent = [f"{r[key]:.1f}" for key in ("whole_ms", "of_it_choosing_ms", "dense_ms")]
        spent[0] += f" ({r['graph_ms']:.1f})" if "graph_ms" in r else ""
        lines.append(f"| {name} | {_shape(r)} | {' | '.join(spent)} | {r['faster']:.2f} | {r['kept']:.1%} |")
    return lines


def _recurrences(found: list[Row]) -> list[str]:
    names = {"ours": "manyheads", "fla": "fla", "flashqla": "FlashQLA", "cudnn": "cuDNN"}
    timed = [r for r in found if "median_ms" in r]
    engines = [e for e in names if any(r["engine"] == e for r in timed)]
    head = ["case", "shape", "pass", *(names[e] for e in engines), "GB/s", "of fla"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    key = lambda r: (r["case"], _sizes(r), ("forward", "backward", "step").index(r["pass"]))  # noqa: E731  sort, group
    for _, group in groupby(sorted(timed, key=key), key=key):
        same = {r["engine"]: r for r in group}
        if "ours" not in same:
            continue
        ours = same["ours"]
        spent = [_spent(same[e]) if e in same else "" for e in engines]
        ratio = f"{same['fla']['median_ms'] / ours['median_ms']:.2f}" if "fla" in same else ""
        own = [ours["case"], ours["shape"].replace("x", " × "), ours["pass"], *spent, str(ours["gbs"]), ratio]
        lines.append(f"| {' | '.join(own)} |")
    failed = [r for r in found if "failed" in r]
    told = [f"- {names[r['engine']]} on {r['case']}, {r['shape']}: {r['failed']}" for r in failed]
    return [*lines, "", *_crossings(timed), *told]


def _sizes(row: Row) -> tuple[int, int]:
    """Batch and length."""
    batch, length = row["shape"].split("x")
    return int(batch), 1024 * int(length[:-1]) if length.endswith("k") else int(length)


def _crossings(timed: list[Row]) -> list[str]:
    """The least of the lengths from which on a recurrence of one row takes less time than softmax attention."""
    lines = []
    for which in ("forward", "backward"):
        single = [r for r in timed if r["pass"] == which and _sizes(r)[0] == 1]
        ours, theirs = (
            {(r["case"], _sizes(r)[1]): _least(r) for r in single if r["engine"] == engine}
            for engine in ("ours", "cudnn")
        )
        slow, first = set[str](), dict[str, int]()
        for case, length in sorted(ours.keys() & theirs.keys(), reverse=True):
            if ours[case, length] >= theirs[case, length]:
                slow.add(case)
            elif case not in slow:
                first[case] = length
        if first:
            told = ", ".join(f"{case} {length // 1024}k" for case, length in sorted(first.items()))
            lines.append(
                f"- Faster {which} than cuDNN's softmax attention from a length on, of those measured: {told}."
            )
    return lines


def _least(row: Row) -> float:
    """Milliseconds, without the host's where that is known."""
    return row.get("graph_ms") or row["median_ms"]


def _spent(row: Row) -> str:
    graph = f" ({row['graph_ms']:.3f})" if row.get("graph_ms") else ""
    return f"{row['median_ms']:.3f}{graph}"


def _around(kept: list[Row]) -> list[str]:
    lines = []
    for row in kept:
        if "median_us" in row:
            what = row.get("of", "causal")
            ours = "of `attention`, of a kind made before" + ("" if what == "causal" else f", for the {what}")
            whose = "of torch's function" if row["engine"] == "torch" else ours
            lines.append(f"- Host time of a call {whose}: {row['median_us']:.0f} µs.")
        if "new_ms" in row:
            what = f"{row['new_ms']:.2f} ms with new documents, {row['same_ms']:.2f} ms with those of the call before"
            lines.append(f"- Packed documents, {_shape(row)}, a whole forward call: {what}.")
        if "choosing_ms" in row:
            parts = ("choosing", "ordering", "table", "transposing", "flex_block_mask")
            spent = ", ".join(f"{p.replace('_', ' ')} {row[p + '_ms']:.2f} ms" for p in parts if p + "_ms" in row)
            lines.append(f"- {row['case'].partition(':')[0].capitalize()}, {_shape(row)}, before the kernels: {spent}.")
        if "choose_ms" in row:
            parts = ("pool", "choose", "by_torch", "turn", "forward", "backward")
            graphs = {p: f" ({row[f'{p}_graph_ms']:.2f})" for p in parts if f"{p}_graph_ms" in row}
            known = [p for p in parts if p + "_ms" in row]
            spent = ", ".join(f"{p.replace('_', ' ')} {row[p + '_ms']:.2f}{graphs.get(p, '')}" for p in known)
            kept_share = f", {row['kept']:.1%} kept" if "kept" in row else ""
            about = f"{row['case'].capitalize()}, {_shape(row)}{kept_share}"
            lines.append(f"- {about}, milliseconds, in brackets as a CUDA graph: {spent}.")
        if "failed" in row and "settings" not in row:
            lines.append(f"- {ENGINES[row['engine']]} on {row['case']}, {_shape(row)}: {row['failed']}")
    mine = [r for r in kept if r["engine"] == "ours" and "first_call_s" in r]
    if mine:
        slowest = max(mine, key=lambda r: r["first_call_s"])
        most = max(mine, key=lambda r: r.get("beyond_mib", 0))
        lines.append(f"- Slowest first call of ours: {slowest['first_call_s']:.1f} s ({slowest['case']}).")
        where = f"{most['case']} {most.get('pass', '')}, {_shape(most)}"
        lines.append(f"- Most memory beyond inputs and results of ours: {most.get('beyond_mib', 0):.0f} MiB ({where}).")
    return lines
