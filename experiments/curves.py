"""Pictures of what a number did in training, a line for each variant, from the rows that have a curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from statistics import mean
from typing import Any

from experiments.run import experiments

Row = Mapping[str, Any]
Line = list[tuple[float, float]]  # steps and the mean number of all seeds
WIDTH, LEFT, RIGHT, TOP, BOTTOM, LABEL = 960, 60, 680, 30, 560, 16
SKIPPED = 0.05  # of the steps, where a number falls so fast that all else would look alike


def lines(found: Iterable[Row], name: str) -> dict[str, Line]:
    """The curves of an experiment's variants, the lowest at their ends first; a later row takes the place of an
    earlier one of the same seed."""
    rows = {(r["variant"], r["seed"]): r["curve"] for r in found if r["experiment"] == name and r.get("curve")}
    made = {}
    for variant, group in groupby(sorted(rows), key=lambda key: key[0]):
        of_seeds = [rows[key] for key in group]
        made[variant] = [(points[0][0], mean(y for _, y in points)) for points in zip(*of_seeds, strict=True)]
    return dict(sorted(made.items(), key=lambda item: item[1][-1][1]))


def pictures(found: Sequence[Row]) -> dict[str, str]:
    """The SVG of each experiment that has curves, by the experiment's name."""
    full = [r for r in found if r["experiment"] in experiments()]
    full = [r for r in full if r.get("steps") == experiments()[r["experiment"]].steps]
    of = {name: lines(full, name) for name in experiments()}
    return {name: picture(one, experiments()[name].metric) for name, one in of.items() if one}


def picture(of: Mapping[str, Line], what: str) -> str:
    """`what` against steps, both from where it does not fall steeply any more."""
    last = max(x for line in of.values() for x, _ in line)
    shown = {name: [(x, y) for x, y in line if x >= SKIPPED * last] for name, line in of.items()}
    heights = [math.log(y) for line in shown.values() for _, y in line]
    low, span = min(heights), max(heights) - min(heights) or 1.0
    height = max(BOTTOM + 50, TOP + LABEL * (len(of) + 1))
    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">']
    drawn.append(f'<rect width="{WIDTH}" height="{height}" fill="white"/>')
    for n, (name, line) in enumerate(shown.items()):
        path = " ".join(
            f"{LEFT + x / last * (RIGHT - LEFT):.1f},{BOTTOM - (math.log(y) - low) / span * (BOTTOM - TOP):.1f}"
            for x, y in line
        )
        style = (
            f'stroke="hsl({360 * n / len(of):.0f} 70% 42%)" stroke-width="1.5" stroke-dasharray="{("", "7 3")[n % 2]}"'
        )
        y = TOP + LABEL * n
        drawn.append(f'<polyline points="{path}" fill="none" {style}><title>{escape(name)}</title></polyline>')
        drawn.append(f'<path d="M{RIGHT + 15} {y - 4}h30" {style}/>')
        drawn.append(f'<text x="{RIGHT + 50}" y="{y}" font-size="11">{escape(name)} {line[-1][1]:.3f}</text>')
    drawn.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>')
    for n in range(6):
        up, at = BOTTOM - n / 5 * (BOTTOM - TOP), LEFT + n / 5 * (RIGHT - LEFT)
        value = math.exp(low + n / 5 * span)
        drawn.append(f'<text x="{LEFT - 6}" y="{up + 4:.0f}" font-size="12" text-anchor="end">{value:.2f}</text>')
        drawn.append(
            f'<text x="{at:.0f}" y="{BOTTOM + 18}" font-size="12" text-anchor="middle">{n / 5 * last:g}</text>'
        )
    drawn.append(f'<text x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 38}" font-size="13">steps</text>')
    drawn.append(f'<text x="14" y="{TOP - 12}" font-size="13">{escape(what)} in training (logarithmic)</text>')
    return "\n".join([*drawn, "</svg>", ""])
