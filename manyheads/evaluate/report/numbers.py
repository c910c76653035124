"""Numbers of a page: looked up where they may be missing, and written for reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

# ---- looked up ----


def at(tree: Any, *path: str) -> Any:
    """What lies at a path of keys, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(tree: Any, *path: str) -> float | None:
    """The finite number at a path, or None: what is not a number is shown as missing, never as 0."""
    value = at(tree, *path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def spread(tree: Any, *path: str) -> dict[str, float] | None:
    """median, min and max at a path; a plain number stands for all three."""
    value = at(tree, *path)
    if (single := number(value)) is not None:
        return {"median": single, "min": single, "max": single}
    if (median := number(value, "median")) is None:
        return None
    low, high = number(value, "min"), number(value, "max")
    return {"median": median, "min": median if low is None else low, "max": median if high is None else high}


def middle(value: Any) -> Any:
    """The median of a spread; a plain number is its own."""
    return value["median"] if isinstance(value, dict) else value


def spans(pieces: Any, key: str) -> list[tuple[float, float]]:
    """(middle of the piece, value) where there is a value."""
    found = []
    for piece in pieces or []:
        start, end, value = (number(piece, name) for name in ("start", "end", key))
        if start is not None and end is not None and value is not None:
            found.append(((start + end) / 2, value))
    return found


def divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# ---- written ----


def figures(value: float | None, digits: int = 3) -> str | None:
    """A number with that many significant figures, never in powers of ten unless it is tiny or huge."""
    if value is None:
        return None
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def extent(value: Mapping[str, float] | None, unit: str) -> str:
    """Least to greatest of a spread, with the unit once."""
    if value is None or value["min"] == value["max"]:
        return ""
    return f"{figures(value['min'])} – {figures(value['max'])}{unit}"


def ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1.2 else f"{value:.2f}" if value < 20 else f"{value:,.0f}"


def percent(value: float | None) -> str | None:
    if value is None:
        return None
    share = 100 * value
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.1f} %"


def byte_count(value: float | None) -> str | None:
    if value is None:
        return None
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{figures(value / size)} {unit}"
    return f"{value:.0f} B"


def count(value: Any) -> str:
    found = number(value)
    if found is None:
        return "" if value is None else str(value)
    return f"{found / 1e6:,.0f} million" if found >= 1e7 else f"{found:,.0f}"


def date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%d %B %Y, %H:%M").lstrip("0")
    except ValueError:
        return "" if value is None else str(value)


def join(parts: Iterable[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def safe(text: str) -> str:
    """Text for plotly, which reads a few tags in what it draws."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
