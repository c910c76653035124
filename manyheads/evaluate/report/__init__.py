"""The page of a comparison: one HTML file that needs no network, made from what `compare.json` holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.evaluate.files import write_whole
from manyheads.evaluate.report import charts, words
from manyheads.evaluate.report.numbers import at, count, date
from manyheads.evaluate.report.rows import COLUMNS, LABELS, table, untrained


class ReportError(ValueError):
    """A page that cannot be made: what is missing and how to get it."""


def write(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a comparison's results, whole or not at all, and return its path."""
    path = Path(path)
    write_whole(path, render(results))
    return path


def require() -> None:
    """Raise if what the page is made with is not installed: better before a long run than after it."""
    for package in ("jinja2", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise ReportError(f'The page needs {package}, which is not installed: pip install "manyheads[report]".')


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    require()
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("compare.html.j2")
    return template.render(view(results), plotly_js=get_plotlyjs())


def view(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows, in words and numbers that are ready to be shown."""
    rows = table(results)
    done = [row for row in rows if not row["error"]]
    return {
        "answer": results.get("answer") or words.no_answer(rows),
        "created": date(results.get("created")),
        "model_name": at(results, "model", "name") or "",
        "context": count(results.get("context")),
        "text_name": at(results, "text", "name") or "",
        "command": results.get("command") or "manyheads compare",
        "unfinished": None if results.get("complete", True) else words.unfinished(rows, results),
        "columns": [{"key": key, "head": head, "means": means} for key, head, means, _ in COLUMNS],
        "rows": rows,
        "labels": {name: means for name, means in LABELS.items() if any(row["label"] == name for row in rows)},
        "charts": charts.draw(results, done),
        "tiles": [charts.tile(row) for row in done if row["raw"].get("tiles")],
        "winner": words.winner(results, done),
        "others": [row for row in done if row["use"] and row["kind"] != "dense"],
        "untrained": untrained(results),
        "run": words.run(results),
        "method": words.method(results),
        "notes": [(row["title"], note) for row in rows for note in row["notes"]],
    }
