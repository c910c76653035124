"""Write docs/mechanisms.md, the index of mechanisms, layers, cache policies and studies, from what they say of
themselves; docs/experiments.md and docs/sparse.md with their pictures, from experiments/results; docs/benchmarks.md,
from benchmarks/results.

python docs/generate.py            writes them
python docs/generate.py --check    exits with 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from manyheads import layers, studies
from manyheads.cache import policies
from manyheads.core import Mechanism
from manyheads.core.layer import Layer
from manyheads.mechanisms import get, names

PAGE = Path(__file__).with_name("mechanisms.md")
BENCHMARKS = PAGE.with_name("benchmarks.md")
EXPERIMENTS, PICTURE = PAGE.with_name("experiments.md"), PAGE.with_name("experiments.svg")
SPARSE, LINES = PAGE.with_name("sparse.md"), PAGE.with_name("sparse.svg")
SOURCE = "../manyheads"

HEAD = """\
<!-- Written by docs/generate.py from manyheads/mechanisms, layers, cache/policies and studies: edit those. -->

# Mechanisms

{mechanisms} mechanisms, {layers} layers and {policies} cache policies. `manyheads show NAME` prints one with its
equation, its laws and the engines that run it; `manyheads ls --json` has this page as data.

- **form**: what kind of computation it is ([architecture](architecture.md)).
- **settings**: keyword arguments with their defaults, which are the paper's; sizes have none.
- **system**: the published system that it comes from.
- **needs training**: a model must be trained with it. The others stand in for softmax attention in a trained model.
- **sees all**: not causal, every query sees every key. **sees future**: no later key is looked at, but which keys
  are chosen depends on later tokens.
"""


def page() -> str:
    """The whole page."""
    mechanisms = sorted((get(name) for name in names()), key=lambda m: (m.family, m.name))
    recipes = [policies.get(name) for name in policies.names()]
    modules = sorted((layers.get(name) for name in layers.names()), key=lambda m: (m.family, m.name))
    parts = [HEAD.format(mechanisms=len(mechanisms), layers=len(modules), policies=len(recipes))]
    for family, members in groupby(mechanisms, key=lambda m: m.family):
        parts.append(_section(import_module(f"manyheads.mechanisms.{family}"), [_entry(m) for m in members]))
    for family, members in groupby(modules, key=lambda m: m.family):
        parts.append(_section(import_module(f"manyheads.layers.{family}"), [_layer_entry(m) for m in members]))
    about = "Cache policies: what stays in the cache of keys and values, for a budget in tokens or as a share."
    rows = [
        _line(r.name, f"{SOURCE}/cache/policies/{r.name}.py", r.summary, "", r.settings, r.arxiv, r.system, [])
        for r in recipes
    ]
    parts.append(_table(about, rows))
    about = "Studies: published claims that can be calculated or measured, by `python -m manyheads.studies.NAME`."
    found = [studies.get(name) for name in studies.names()]
    rows = [
        _line(s.name, f"{SOURCE}/studies/{s.name}.py", s.summary, "", s.settings, s.arxiv, s.system, []) for s in found
    ]
    parts.append(_table(about, rows))
    return "\n".join(parts)


def _section(package: Any, entries: Iterable[str]) -> str:
    return _table((package.__doc__ or "").strip(), entries)


def _table(about: str, entries: Iterable[str]) -> str:
    """A heading and a table; the first words of `about`, up to the colon, are the heading."""
    title, _, rest = about.partition(":")
    head = ["name | what it is | form | settings | paper | system", "--- | --- | --- | --- | --- | ---"]
    lines = [f"| {line} |" for line in [*head, *entries]]
    return "\n".join([f"## {title}", "", rest.strip()[:1].upper() + rest.strip()[1:], "", *lines, ""])


def _entry(mechanism: Mechanism) -> str:
    labels = [] if mechanism.causal else ["sees all"]
    if mechanism.sees_future:
        labels.append(f"sees future: {mechanism.sees_future}")
    if mechanism.trained:
        labels.append("needs training")
    form = type(mechanism(**mechanism.examples[0])).__name__
    source = f"{SOURCE}/mechanisms/{mechanism.family}/{mechanism.name}.py"
    return _line(
        mechanism.name, source, mechanism.summary, form, mechanism.settings, mechanism.arxiv, mechanism.system, labels
    )


def _layer_entry(layer: Layer) -> str:
    labels = [] if layer.causal else ["sees all"]
    if layer.sees_future:
        labels.append(f"sees future: {layer.sees_future}")
    source = f"{SOURCE}/layers/{layer.family}/{layer.name}.py"
    settings = {**dict.fromkeys(layer.required), **layer.settings}
    return _line(layer.name, source, layer.summary, "", settings, layer.arxiv, layer.system, labels, layer.required)


def _line(
    name: str, source: str, summary: str, form: str, settings: Mapping[str, Any], arxiv: str, system: str,
    labels: Iterable[str], sizes: Iterable[str] = (),
) -> str:  # fmt: skip
    what = summary + "".join(f" *{label[:1].upper() + label[1:]}.*" for label in labels)
    cells = [
        f"[`{name}`]({source})",
        what,
        form or "–",
        ", ".join(f"`{key}`" if key in sizes else f"`{key}={value!r}`" for key, value in settings.items()) or "–",
        f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–",
        system or "–",
    ]
    return " | ".join(cell.replace("|", "\\|") for cell in cells)


def files() -> dict[Path, str]:
    """What each derived file should hold."""
    sys.path.insert(0, str(Path(__file__).parent.parent))  # experiments are no part of the installed package
    experiments, benchmarks = import_module("experiments.page"), import_module("benchmarks.page")
    sparse, lines = import_module("experiments.mass_page"), import_module("experiments.mass_lines")
    curves = import_module("experiments.curves")
    rows, masses = experiments.rows(), lines.rows()
    return {
        PAGE: page(), EXPERIMENTS: experiments.page(rows, PICTURE.name), PICTURE: experiments.picture(rows),
        BENCHMARKS: benchmarks.page(benchmarks.rows()),
        **{PAGE.with_name(f"curves_{name}.svg"): text for name, text in curves.pictures(rows).items()},
        SPARSE: sparse.page(masses, LINES.name), LINES: lines.picture(masses),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    fresh = files()
    if arguments == ["--check"]:
        old = [path for path, text in fresh.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in old:
            print(f"docs/{path.name} is out of date: make docs", file=sys.stderr)
        return 1 if old else 0
    if arguments:
        print("docs/generate.py takes nothing, or --check", file=sys.stderr)
        return 2
    for path, text in fresh.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
