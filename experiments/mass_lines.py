"""Softmax mass against density, from the rows of experiments/mass.py: lines, between their points, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from experiments.mass import MODEL, TEXT, able, as_text, settings
from experiments.run import RESULTS, read

SHARES = {"a twentieth": 1 / 20, "a tenth": 1 / 10, "a quarter": 1 / 4, "a half": 1 / 2}
Row = Mapping[str, Any]
Line = list[tuple[float, float]]  # density and mass, or density and perplexity, in the order of density
BOUNDS = ("oracle", "random")


def rows() -> list[dict[str, Any]]:
    """The rows for the number of tokens and the device that are last in the file, with settings as they are now."""
    found = read(RESULTS / "mass.jsonl")
    tokens, device = (found[-1]["tokens"], found[-1]["device"]) if found else (0, "")
    now = {name: {as_text(each) for each in settings(name, tokens)} for name in able(tokens)} if found else {}
    of_run = [row for row in found if (row["tokens"], row["device"]) == (tokens, device)]
    return [row for row in of_run if as_text(row["settings"]) in now.get(row["mechanism"], ())]


def lines(found: Iterable[Row]) -> dict[str, Line]:
    """A line for each mechanism, and for the two bounds. The oracle's is the greatest of what was measured up to there:
    it has as many keys as a mechanism for each query, and some give many to queries that need few."""
    made: dict[str, Line] = {}
    bounds: dict[str, Line] = {"oracle": [], "random": []}
    for row in found:
        made.setdefault(row["mechanism"], []).append((row["density"], row["mass"]))
        bounds["oracle"].append((row["oracle_density"], row["oracle_mass"]))
        bounds["random"].append((row["random_blocks_density"], row["random_blocks_mass"]))
    for line in (*made.values(), *bounds.values()):
        line.sort()
    greatest = 0.0
    for n, (density, mass) in enumerate(bounds["oracle"]):
        greatest = max(greatest, mass)
        bounds["oracle"][n] = density, greatest
    return made | bounds


def perplexities(found: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Of the model that reads a text with a mechanism in it, by mechanism and settings."""
    return {_setup(row): row["perplexity"] for row in found if row["data"] == TEXT}


def losses(found: list[dict[str, Any]]) -> dict[str, Line]:
    """A line of perplexities for each mechanism, over the density that it has on the model's own attention."""
    known, made = perplexities(found), dict[str, Line]()
    for row in found:
        if row["data"] == MODEL and _setup(row) in known:
            made.setdefault(row["mechanism"], []).append((row["density"], known[_setup(row)]))
    return {name: sorted(line) for name, line in made.items()}


def _setup(row: Row) -> tuple[str, str]:
    return row["mechanism"], as_text(row["settings"])


def at(line: Line, density: float) -> float | None:
    """The mass at a density, or the perplexity: between two settings as on a straight line over the logarithm; None
    below all settings, and above all of them what the greatest has."""
    if density < line[0][0]:
        return None
    for (low, less), (high, more) in pairwise(line):
        if low <= density < high:
            return less + (more - less) * math.log(density / low) / math.log(high / low)
    return line[-1][1]


def ranked(of: Mapping[str, Line]) -> list[str]:
    """Mechanisms that are sparse, the best at a quarter of the pairs first."""
    sparse = [name for name, line in of.items() if name not in BOUNDS and line[0][0] < 1]
    return sorted(sparse, key=lambda name: -(at(of[name], SHARES["a quarter"]) or 0.0))


def picture(found: list[dict[str, Any]]) -> str:
    """Mass against density of the model's own data, a line for each mechanism, as SVG; empty without results."""
    of = lines(row for row in found if row["data"] == MODEL)
    width, height, left, right, top, bottom = 960, 560, 60, 700, 20, 500
    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    drawn.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    order = ranked(of) if of["oracle"] else []
    if order:
        shown = ["oracle", *order, "random"]
        low_x = math.log(min(line[0][0] for line in of.values()))
        low_y = math.floor(10 * min(of[name][0][1] for name in shown)) / 10
        for n, name in enumerate(shown):
            points = [
                (right - math.log(x) / low_x * (right - left), bottom - (y - low_y) / (1 - low_y) * (bottom - top))
                for x, y in of[name]
            ]
            bound = name in BOUNDS
            colour = "black" if bound else f"hsl({360 * (n - 1) / len(order):.0f} 70% 42%)"
            dash = "2 3" if bound else ("", "7 3")[n % 2]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            style = f'stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
            drawn.append(f'<polyline points="{path}" fill="none" {style}><title>{name}</title></polyline>')
            y = top + 18 + 22 * n
            drawn.append(f'<path d="M{right + 20} {y - 4}h34" {style}/>')
            drawn.append(f'<text x="{right + 62}" y="{y}" font-size="13">{name}</text>')
        drawn.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>')
        for n in range(6):
            share = low_y + (1 - low_y) * n / 5
            up = bottom - n / 5 * (bottom - top)
            drawn.append(f'<text x="{left - 6}" y="{up + 4:.0f}" font-size="12" text-anchor="end">{share:.2f}</text>')
        for share in (0.05, 0.1, 0.25, 0.5, 1.0):
            x = right - math.log(share) / low_x * (right - left)
            drawn.append(f'<path d="M{x:.1f} {bottom}v5" stroke="black"/>')
            drawn.append(f'<text x="{x:.0f}" y="{bottom + 18}" font-size="12" text-anchor="middle">{share:g}</text>')
        middle = (left + right) // 2
        drawn.append(f'<text x="{middle}" y="{bottom + 40}" font-size="13">density (logarithmic)</text>')
        drawn.append(f'<text x="{left + 8}" y="{top - 4}" font-size="13">softmax mass kept</text>')
    return "\n".join([*drawn, "</svg>", ""])
