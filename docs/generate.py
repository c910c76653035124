"""Write docs/mechanisms.md, the index of the mechanisms and cache policies, from what they say of themselves.

python docs/generate.py            writes it
python docs/generate.py --check    exits with 1 if it is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from manyheads.cache import policies
from manyheads.core import Mechanism
from manyheads.mechanisms import get, names

PAGE = Path(__file__).with_name("mechanisms.md")
SOURCE = "../manyheads"

HEAD = """\
<!-- Written by docs/generate.py from the files in manyheads/mechanisms and manyheads/cache/policies: edit those. -->

# Mechanisms

{mechanisms} mechanisms and {policies} cache policies. `manyheads show NAME` prints one with its equation, its laws and
the engines that run it; `manyheads ls --json` has this page as data.

- **form**: what kind of computation it is ([architecture](architecture.md)).
- **settings**: keyword arguments with their defaults, which are the paper's.
- **system**: the published system that it comes from.
- **needs training**: a model must be trained with it. The others stand in for softmax attention in a trained model.
- **sees all**: not causal, every query sees every key. **sees future**: no later key is looked at, but which keys
  are chosen depends on later tokens.
"""


def page() -> str:
    """The whole page."""
    mechanisms = sorted((get(name) for name in names()), key=lambda m: (m.family, m.name))
    recipes = [policies.get(name) for name in policies.names()]
    parts = [HEAD.format(mechanisms=len(mechanisms), policies=len(recipes))]
    for family, members in groupby(mechanisms, key=lambda m: m.family):
        parts.append(_section(import_module(f"manyheads.mechanisms.{family}"), [_entry(m) for m in members]))
    about = "Cache policies: what stays in the cache of keys and values, for a budget in tokens or as a share."
    rows = [
        _line(r.name, f"{SOURCE}/cache/policies/{r.name}.py", r.summary, "", r.settings, r.arxiv, r.system, [])
        for r in recipes
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


def _line(
    name: str, source: str, summary: str, form: str, settings: Mapping[str, Any], arxiv: str, system: str,
    labels: Iterable[str],
) -> str:  # fmt: skip
    what = summary + "".join(f" *{label[:1].upper() + label[1:]}.*" for label in labels)
    cells = [
        f"[`{name}`]({source})",
        what,
        form or "–",
        ", ".join(f"`{key}={value!r}`" for key, value in settings.items()) or "–",
        f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–",
        system or "–",
    ]
    return " | ".join(cell.replace("|", "\\|") for cell in cells)


def main(arguments: list[str]) -> int:
    fresh = page()
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == fresh:
            return 0
        print("docs/mechanisms.md is out of date: make docs", file=sys.stderr)
        return 1
    if arguments:
        print("docs/generate.py takes nothing, or --check", file=sys.stderr)
        return 2
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
