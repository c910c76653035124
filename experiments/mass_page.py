"""docs/sparse.md, from the rows of experiments/mass.py and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.kept import why_not
from experiments.mass import KNOBS, MODEL, REPEATS, able, as_text, settings
from experiments.mass_lines import BOUNDS, SHARES, Line, at, lines, losses, perplexities, ranked
from experiments.planted import PATTERNS
from manyheads.mechanisms import get, names

HEAD = """\
<!-- Written by docs/generate.py from experiments/results/mass.jsonl: run the experiment, do not edit. -->

# Sparse attention: what is kept

    python -m experiments.mass

puts every mechanism that keeps some of the pairs of causal softmax attention, and needs no training, on the queries,
keys and values of a trained model, with settings from few pairs to many. `python docs/generate.py` writes this page.

- **density**: pairs of query and key that are computed, of the causal ones.
- **mass**: what dense attention's weights on these pairs sum to, in the mean over queries, heads and layers. Worst: in
  the mean of the lowest tenth of all heads.
- **error**: the distance of o from dense attention's, relative to its length.
- **oracle**: the same number of pairs for each query, those with the greatest weights. No choice holds more.
- **random**: the same number of pairs in blocks of 32, each query's own block and any others before it.

- **perplexity**: of the model, on the text, with the mechanism in all of its layers.

Mass says how much of dense attention a choice finds, perplexity what the model loses by what it does not find.
`manyheads compare` measures both for any model and text, with the time and the memory that a whole model takes.
"""
NOTHING = "There are no results yet.\n"


def page(found: list[dict[str, Any]], picture: str = "sparse.svg") -> str:
    """The page; `picture` is the file that it shows."""
    if not found:
        return "\n".join([HEAD, NOTHING])
    own = [row for row in found if row["data"] == MODEL]
    one = own[0]
    layers = ", ".join(map(str, one["layers"]))
    where = f"layers {layers} of SmolLM2-135M-Instruct, which reads {one['tokens']:,} tokens of Python's documentation"
    threads = f"{one['threads']} thread{'s' * (one['threads'] > 1)}"
    return "\n".join(
        [
            HEAD,
            f"Measured on {where}. Times are of the first of these layers, the fastest of {REPEATS} calls:",
            f"{one['device']}, {threads}, torch {one['torch']}.",
            "",
            "## At equal density",
            "",
            *_equal(lines(own)),
            "",
            f"![Mass against density]({picture})",
            "",
            "## Perplexity at equal density",
            "",
            *_read(found),
            "",
            "## Planted patterns",
            "",
            *_patterns(found),
            "",
            "## All settings",
            "",
            *_all(own, perplexities(found)),
            "",
            "## Left out",
            "",
            *_left_out(one["tokens"], {row["mechanism"] for row in own}),
            "",
        ]
    )


def _table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    cut = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, cut, *body)]


def _marked(name: str) -> str:
    return f"`{name}`{' †' * bool(get(name).sees_future)}"


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _equal(of: Mapping[str, Line]) -> list[str]:
    order = ranked(of)
    told = []
    for words in ("a tenth", "a quarter"):
        best = {name: mass for name in order if (mass := at(of[name], SHARES[words])) is not None}
        first = sorted(best, key=lambda name: -best[name])[:3]
        told.append(f"with {words} of the pairs {', '.join(f'`{name}` ({best[name]:.3f})' for name in first)}")
    body = [[_marked(name), *(_shown(at(of[name], share)) for share in SHARES.values())] for name in order]
    body += [[f"*{name}*", *(_shown(at(of[name], share)) for share in SHARES.values())] for name in BOUNDS]
    text = f"Most mass is kept, {'; '.join(told)}."
    about = (
        "Between two settings it is interpolated; the setting with most pairs stands for more; –: no setting is so low."
    )
    future = "†: no later key is looked at, but which keys are chosen depends on later tokens."
    return [text, about, future, "", *_table(["mass with", *SHARES], body)]


def _read(found: list[dict[str, Any]]) -> list[str]:
    of = losses(found)
    dense = next((line[-1][1] for name, line in of.items() if name == "causal"), None)
    sparse = {name: line for name, line in of.items() if line[0][0] < 1}
    if not sparse:
        return [NOTHING]
    order = sorted(sparse, key=lambda name: at(of[name], SHARES["a quarter"]) or float("inf"))
    body = [[_marked(name), *(_shown(at(of[name], share), 2) for share in SHARES.values())] for name in order]
    return [f"Dense attention: {_shown(dense, 2)}.", "", *_table(["perplexity with", *SHARES], body)]


def _patterns(found: list[dict[str, Any]]) -> list[str]:
    of = {name: lines(row for row in found if row["data"] == name) for name in PATTERNS}
    of = {name: its for name, its in of.items() if its["oracle"]}
    if not of:
        return [NOTHING]
    order = ranked(lines(row for row in found if row["data"] == MODEL))

    def cells(name: str) -> list[str]:
        return [
            f"{_shown(at(its[name], 1 / 10))} / {_shown(at(its[name], 1 / 4))}" if name in its else "–"
            for its in of.values()
        ]

    told = " ".join(f"*{name}*: {' '.join((PATTERNS[name].__doc__ or '').split())}" for name in of)
    text = "Mass kept with a tenth and with a quarter of the pairs where the map is known, in four heads each."
    body = [[_marked(name), *cells(name)] for name in order] + [[f"*{n}*", *cells(n)] for n in BOUNDS]
    return [f"{text} {told}", "", *_table(["", *of], body)]


def _all(own: list[dict[str, Any]], read: Mapping[tuple[str, str], float]) -> list[str]:
    head = [
        "mechanism", "density", "mass", "worst", "oracle", "random", "error", "oracle's error", "perplexity",
        "ms choosing", "ms attending",
    ]  # fmt: skip
    body = []
    for row in sorted(own, key=lambda r: (r["mechanism"], r["density"])):
        base, tokens = row["settings"], row["tokens"]
        knobs = KNOBS[row["mechanism"]](tokens) if row["mechanism"] in KNOBS else {}
        turned = ", ".join(f"{key}={base[key]!r}" for key, values in knobs.items() if len(values) > 1)
        numbers = [row[key] for key in ("density", "mass", "worst", "oracle_mass", "random_blocks_mass")]
        errors = [f"{row[key]:.3f}" for key in ("error", "oracle_error")]
        times = [f"{row[key]:.1f}" if key in row else "–" for key in ("choose_ms", "attend_ms")]
        lost = _shown(read.get((row["mechanism"], as_text(base))), 2)
        body.append([f"`{row['mechanism']}({turned})`", *map(_shown, numbers), *errors, lost, *times])
    held = {row["mechanism"]: row["settings"] for row in own}
    fixed = []
    for name, given in held.items():
        knobs = KNOBS[name](own[0]["tokens"]) if name in KNOBS else {}
        same = {key: value for key, value in given.items() if len(knobs.get(key, ())) < 2}
        if same:
            fixed.append(f"`{name}`: {', '.join(f'{key}={value!r}' for key, value in same.items())}")
    return [*_table(head, body), "", f"Settings that were the same in all rows: {'; '.join(fixed)}."]


def _left_out(tokens: int, measured: set[str]) -> list[str]:
    """The family's other mechanisms with the reason, and those that no row is about yet."""
    made = {name: get(name)(**settings(name, tokens)[0]) for name in names() if get(name).family == "sparse"}
    whys = {name: why_not(get(name), form) for name, form in made.items()}
    told = [f"- `{name}`: {why}." for name, why in whys.items() if why]
    missing = [f"- `{name}`: not measured yet." for name in able(tokens) if name not in measured]
    return [
        *told,
        *missing,
        "- Layers of the family, which have projections of their own: a model is trained with them.",
    ]
