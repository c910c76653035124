"""docs/experiments.md and its picture, from the files of results and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.core import Experiment, Missing, paired, shown, values
from experiments.run import RESULTS, experiments, read
from experiments.tiny_lm import LEFT_OUT

COMMAND = "python -m experiments.run --device cuda --workers 14"
HEAD = """\
<!-- Written by docs/generate.py from experiments/results: run experiments, do not edit. -->

# Experiments

What published attention systems claim to be good for, tried in small. From the top of the repository,

    {command}

trains, and `python docs/generate.py` writes this page from the results. These are toys: minutes of training, models of
half a million numbers at most. A claim that does not hold here may hold at the size it was made for, and one that holds
here may not.
"""
NOTHING = "There are no results in `experiments/results` yet.\n"
Results = dict[str, dict[int, dict[str, Any]]]


def rows(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of all files, in the files' alphabetical order."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]


def page(found: Iterable[Mapping[str, Any]], picture: str = "experiments.svg") -> str:
    """The page; `picture` is the file that it shows."""
    known = experiments()
    full = [r for r in found if r["experiment"] in known and r.get("steps") == known[r["experiment"]].steps]
    parts = [HEAD.format(command=COMMAND)]
    if not full:
        return "\n".join([*parts, NOTHING])
    devices = sorted({f"{r['device']} (torch {r['torch']})" for r in full})
    parts += [
        f"Run on: {'; '.join(devices)}. Small tasks run on a CPU core each. ± is the deviation over the seeds.",
        "Seconds a step are of jobs that shared the machine with the others.",
        "",
    ]
    by_name = {name: results(full, name) for name in known}
    parts += ["## Claims", "", *claims(known.values(), by_name), ""]
    for name, experiment in known.items():
        parts += [f"## {name}", "", experiment.about, ""]
        if name == "tiny_lm":
            parts += [f"![Loss and seconds a step]({picture})", ""] if by_name[name] else []
            parts += [f"Left out: {'; '.join(f'`{k}` {why}' for k, why in LEFT_OUT.items())}.", ""]
        if any(row.get("curve") for of_seeds in by_name[name].values() for row in of_seeds.values()):
            parts += [f"![{experiment.metric} in training](curves_{name}.svg)", ""]
        parts += table(experiment, by_name[name])
        parts += errors(r for r in full if r["experiment"] == name and "error" in r)
    return "\n".join(parts)


def results(found: Iterable[Mapping[str, Any]], name: str) -> Results:
    """Numbers by variant and seed; a later row takes the place of an earlier one."""
    of: Results = {}
    for row in found:
        if row["experiment"] == name and "error" not in row:
            of.setdefault(row["variant"], {})[row["seed"]] = dict(row)
    return of


class Asked(dict):
    """Results that remember which variants were asked for."""

    def __init__(self, of: Results):
        super().__init__(of)
        self.variants: set[str] = set()

    def __getitem__(self, variant: str) -> Any:
        self.variants.add(variant)
        return super().__getitem__(variant)

    def get(self, variant: str, default: Any = None) -> Any:
        return self[variant] if variant in self else default  # noqa: SIM401  dict's own would not remember


def claims(known: Iterable[Experiment], by_name: Mapping[str, Results]) -> list[str]:
    lines = ["about | claim | here | numbers | in", "--- | --- | --- | --- | ---"]
    for experiment in known:
        for claim in experiment.claims:
            asked = Asked(by_name[experiment.name])
            try:
                holds, told = claim.verdict(asked)
                seeds = min(len(asked[variant]) for variant in asked.variants)
                verdict = ("**holds**" if holds else "does not hold") + (", in one seed" if seeds == 1 else "")
            except Missing as gap:
                verdict, told = "not decided", str(gap)
            lines.append(
                f"`{claim.about}` | {claim.words} | {verdict} | {told} | [{experiment.name}](#{experiment.name})"
            )
    return [f"| {line} |" for line in lines]


def table(experiment: Experiment, of: Results) -> list[str]:
    """The variants from the best to the worst, beside the baseline with the same seeds."""
    if not of:
        return ["No results yet.", ""]
    metric, sign = experiment.metric, 1 if experiment.better == "low" else -1
    order = sorted(of, key=lambda v: sign * mean(values(of, v, metric)))
    lines = [f"variant | {metric} | − {experiment.baseline} | parameters | ms a step | seeds"]
    lines.append(" | ".join(["---"] * 6))
    for variant in order:
        apart = paired(of, variant, experiment.baseline, metric)
        weights, seconds = (mean(values(of, variant, m)) for m in ("parameters", "seconds_per_step"))
        difference = "–" if variant == experiment.baseline or not apart else shown(apart)
        cells = [variant, shown(values(of, variant, metric)), difference, f"{weights:,.0f}", f"{1000 * seconds:.2g}"]
        lines.append(" | ".join([*cells, str(len(of[variant]))]))
    absent = [v for v in experiment.variants if v not in of]
    note = [f"No result: {', '.join(absent)}.", ""] if absent else []
    return [*(f"| {line} |" for line in lines), "", *note]


def errors(failed: Iterable[Mapping[str, Any]]) -> list[str]:
    told = sorted({f"- {r['variant']}, failed: {' '.join(r['error'].split())[:200]}" for r in failed})
    return [*told, ""] if told else []


def picture(found: Iterable[Mapping[str, Any]]) -> str:
    """Loss against seconds a step of the tiny language models, as SVG; an empty picture without results."""
    one = experiments()["tiny_lm"]
    of = results((r for r in found if r.get("steps") == one.steps), one.name)
    points = [(1000 * mean(values(of, v, "seconds_per_step")), mean(values(of, v, "loss")), v) for v in of]
    width, height, left, bottom, top = 960, 620, 60, 570, 20
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    lines.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    if points:
        xs, ys = [math.log(x) for x, _, _ in points], [y for _, y, _ in points]
        x_span, y_span = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
        texts: list[tuple[float, float]] = []
        for x, y, name in sorted(points, key=lambda p: p[1]):
            at = left + 20 + (math.log(x) - min(xs)) / x_span * (width - 300)
            up = bottom - 20 - (y - min(ys)) / y_span * (bottom - top - 40)
            low = up
            while any(abs(low - other) < 11 and abs(at - beside) < 230 for beside, other in texts):
                low -= 1  # labels that would lie on each other move up
            texts.append((at, low))
            colour = "#c0392b" if name == one.baseline else "#2c6fad"
            lines.append(f'<path d="M{at:.1f} {up:.1f}L{at + 7:.1f} {low:.1f}" stroke="#bbb"/>')
            lines.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4" fill="{colour}"><title>{y:.4f}</title></circle>')
            lines.append(
                f'<text x="{at + 8:.1f}" y="{low + 3:.1f}" font-size="10" fill="{colour}">{escape(name)}</text>'
            )
        lines.append(f'<path d="M{left} {top}V{bottom}H{width - 20}" fill="none" stroke="black"/>')
        for share in (0.0, 0.5, 1.0):
            up, at = bottom - 20 - share * (bottom - top - 40), left + 20 + share * (width - 300)
            loss, ms = min(ys) + share * y_span, math.exp(min(xs) + share * x_span)
            lines.append(f'<text x="{left - 6}" y="{up + 4:.0f}" font-size="12" text-anchor="end">{loss:.3f}</text>')
            lines.append(f'<text x="{at:.0f}" y="{bottom + 18}" font-size="12" text-anchor="middle">{ms:.1f}</text>')
        middle = (left + width) // 2
        lines.append(f'<text x="{middle}" y="{bottom + 38}" font-size="13">ms a step (logarithmic)</text>')
        lines.append(f'<text x="14" y="{top - 6}" font-size="13">validation loss, nats a byte</text>')
    return "\n".join([*lines, "</svg>", ""])
