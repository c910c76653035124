"""The rows of the page's tables: their numbers, their cells, their colours, and which of them are the best."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manyheads.evaluate.report.numbers import (
    at,
    byte_count,
    divide,
    extent,
    figures,
    middle,
    number,
    percent,
    ratio,
    safe,
    spread,
)

Row = dict[str, Any]  # a row as the template and the charts take it; what compare.json holds of it is row["raw"]

# A colour for each row, 3.5 : 1 or more against both the light and the dark page; dense is always grey. After twelve
# they repeat with another marker and another dash, which also tell rows apart for whoever does not see the colours.
COLOURS = (
    "#2274d6", "#d9611a", "#1b9268", "#b8459b", "#857f16", "#8a62d6",
    "#d8414b", "#1590a6", "#a0683c", "#d65a92", "#5a8f2f", "#5b7fa8",
)  # fmt: skip
GREY = "#7f868f"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

LABELS = {
    "freed": "What is dropped is really gone: the cache is smaller by the bytes shown.",
    "masked": "What is not looked at stays in memory all the same: no memory is saved and none is claimed.",
    "dense": "The whole cache is kept and looked at, as plain attention does.",
    "simulated": "The effect on quality is real; the saving is computed: it would need code that this run has not.",
}

COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    # key, head, what it means, which way is better
    ("density", "saw", "Share of the keys a dense model looks at that were looked at", ""),
    ("mass", "mass", "What the dense model's attention weights on these keys sum to", ""),
    ("perplexity", "perplexity", "Of the text after the prompt; lower is better", "low"),
    ("kl", "KL", "Divergence of the next token's distribution from that of dense, in nats; lower is better", "low"),
    ("needle", "needles", "Share of hidden facts that were answered; higher is better", "high"),
    ("prefill", "first token", "Seconds to read the prompt; median, and least to greatest; lower is better", "low"),
    ("decode", "decoding", "Tokens a second after the prompt; median, and least to greatest; higher is better", "high"),
    ("cache", "cache", "Bytes of the cache after the prompt; 1 MB is 1,000,000 bytes; lower is better", "low"),
)


def table(results: Mapping[str, Any]) -> list[Row]:
    """The rows of the summary with colour, marker and cells; dense, which the others are measured against, first."""
    raw = sorted(results.get("rows") or [], key=lambda row: row.get("kind") != "dense")
    rows: list[Row] = []
    painted = 0
    for row in raw:
        dense, name = row.get("kind") == "dense", _name(row)
        title = _title(row, [other for other in raw if _name(other) == name])
        label = row.get("label") or ""
        rows.append(
            {
                "raw": row,
                "name": name,
                "spec": row.get("spec") or name,
                "title": title,
                "axis": _wrapped(title),
                "settings": _written(row.get("settings") or {}),
                "kind": row.get("kind") or "mechanism",
                "label": label,
                "label_means": LABELS.get(label, ""),
                "summary": row.get("summary") or "",
                "use": row.get("use") or [],
                "error": row.get("error"),
                "notes": row.get("notes") or [],
                "colour": GREY if dense else COLOURS[painted % len(COLOURS)],
                "symbol": "circle" if dense else SYMBOLS[painted % len(SYMBOLS)],
                "dash": "solid" if dense else DASHES[painted // len(COLOURS) % len(DASHES)],
            }
        )
        painted += not dense
    dense = next((row for row in rows if row["kind"] == "dense"), None)
    why = "not measured" if results.get("complete", True) else "not measured yet"
    for row in rows:
        row["values"] = _values(row, dense)
        row["cells"] = _cells(row, why)
    for column, (key, _, _, better) in enumerate(COLUMNS):
        if better:
            for row in _best(rows, key, better):
                row["cells"][column]["best"] = True
    return rows


def untrained(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of mechanisms that need training, which are measured for speed and memory alone."""
    return [_untrained(row) for row in results.get("untrained") or []]


# ---- names ----


def _name(row: Mapping[str, Any]) -> str:
    return row.get("name") or row.get("id") or "?"


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _title(row: Mapping[str, Any], namesakes: Sequence[Mapping[str, Any]]) -> str:
    """The name; with the settings that tell it from others of the same name."""
    own = row.get("settings") or {}
    told = {k: v for k, v in own.items() if any((other.get("settings") or {}).get(k) != v for other in namesakes)}
    return f"{_name(row)} {_written(told)}".strip()


def _wrapped(title: str, width: int = 20) -> str:
    """A title for an axis: lines of about `width` letters, the settings on lines of their own."""
    lines: list[str] = []
    for piece in title.split(" ", 1):
        lines.append("")
        for part in re.findall(r"[^ _]+[ _]*", piece):
            if lines[-1] and len(lines[-1]) + len(part.strip()) > width:
                lines.append("")
            lines[-1] += part
    return "<br>".join(safe(line.strip()) for line in lines)


# ---- numbers and cells ----


def _values(row: Row, dense: Row | None) -> dict[str, Any]:
    """The numbers of a row, None where there is none. Ratios are to the dense row of the same run."""
    raw, base = row["raw"], dense["raw"] if dense else {}
    perplexity, cache = number(raw, "quality", "perplexity"), number(raw, "memory", "cache_bytes")
    prefill, decode = _speeds(raw)
    base_prefill, _ = _speeds(base)
    # A policy that only masks computes everything and then some; a mechanism that leaves keys unread is timed as it is.
    claims = not (row["label"] == "masked" and row["kind"] == "policy")
    return {
        "density": number(raw, "density"),
        "mass": number(raw, "mass"),
        "perplexity": perplexity,
        "ratio": number(raw, "quality", "perplexity_ratio")
        or divide(perplexity, number(base, "quality", "perplexity")),
        "kl": number(raw, "quality", "kl"),
        "needle": number(raw, "quality", "needle_accuracy"),
        "prefill": prefill,
        "decode": decode,
        "cache": cache,
        "prefill_up": divide(middle(base_prefill), middle(prefill)) if claims else None,
        "cache_share": divide(cache, number(base, "memory", "cache_bytes")),
        "label": at(raw, "memory", "label") or row["label"],
        "claims": claims,
    }


def _speeds(raw: Mapping[str, Any]) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Of the prompt and of decoding."""
    return spread(raw, "speed", "prefill_s"), spread(raw, "speed", "decode_tokens_per_s")


def _cells(row: Row, why: str) -> list[dict[str, Any]]:
    """A row's cells: a figure, a smaller line below it, and why there is none where there is none."""
    v = row["values"]
    unseen = "a policy looks at all that it kept" if row["kind"] == "policy" else why
    return [
        _cell("density", percent(v["density"]), "", v["density"], unseen),
        _cell("mass", percent(v["mass"]), "", v["mass"], unseen),
        _cell("perplexity", figures(v["perplexity"]), _times(row), v["perplexity"], why),
        _cell("kl", figures(v["kl"], 2), "", v["kl"], why),
        _cell("needle", percent(v["needle"]), _found(row), v["needle"], why),
        _spread_cell("prefill", v["prefill"], " s", why),
        _spread_cell("decode", v["decode"], "/s", why),
        _cell("cache", byte_count(v["cache"]), _saved(row), v["cache"], why),
    ]  # fmt: skip


def _untrained(row: Mapping[str, Any]) -> dict[str, Any]:
    peak, notes, error = row.get("peak_note"), row.get("notes") or [], row.get("error")
    why = error or next(iter(notes), "") or "not measured"
    prefill, decode = _speeds(row)
    cache, label = number(row, "memory", "cache_bytes"), at(row, "memory", "label")
    return {
        "title": row.get("spec") or row.get("name") or "?",
        "summary": row.get("summary") or "",
        "engine": row.get("engine") or "",
        "cells": [
            _spread_cell("layer", spread(row, "layer_ms"), " ms", why),
            _spread_cell("prefill", prefill, " s", why),
            _spread_cell("decode", decode, "/s", why),
            _cell("memory", byte_count(cache), label, None, peak or why),
        ],
        "notes": [note for note in (peak, *notes, error) if note],
    }


def _cell(key: str, text: str | None, below: str | None, sort: float | None, why: str) -> dict[str, Any]:
    return {
        "key": key,
        "text": text or "–",
        "below": below or "",
        "why": "" if text else why,
        "sort": "" if sort is None else repr(sort),
        "best": False,
    }


def _spread_cell(key: str, value: dict[str, float] | None, unit: str, why: str) -> dict[str, Any]:
    """The median with least to greatest below it."""
    median = middle(value)
    return _cell(key, None if median is None else f"{figures(median)}{unit}", extent(value, unit), median, why)


def _times(row: Row) -> str:
    value = row["values"]["ratio"]
    return "" if value is None or row["kind"] == "dense" else f"× {ratio(value)}"


def _found(row: Row) -> str:
    needle = at(row["raw"], "quality", "needle") or []
    return f"{sum(bool(n.get('found')) for n in needle)} of {len(needle)}" if needle else ""


def _saved(row: Row) -> str:
    share, label = row["values"]["cache_share"], row["values"]["label"]
    if share is None or row["kind"] == "dense":
        return ""
    if label == "masked":
        return "nothing saved"
    if label not in ("freed", "simulated") and 0.99 < share < 1.01:
        return "as dense"
    return f"{percent(share)} of dense" + (", computed" if label == "simulated" else "")


# ---- the best ----


def _best(rows: Iterable[Row], key: str, better: str) -> list[Row]:
    """The best rows, and those that the spread of their runs does not tell from the best; none if all are.

    Dense is out of the running for quality, which is measured against it, and a row for what it may not claim.
    """
    able = [row for row in rows if not row["error"] and row["values"][key] is not None]
    if key in ("perplexity", "kl", "needle"):
        able = [row for row in able if row["kind"] != "dense"]
    elif key == "cache":
        able = [row for row in able if row["kind"] == "dense" or row["values"]["label"] == "freed"]
    else:
        able = [row for row in able if row["values"]["claims"]]
    if len(able) < 2:
        return []

    def ends(row: Row) -> tuple[float, float]:
        value = row["values"][key]
        return (value["min"], value["max"]) if isinstance(value, dict) else (value, value)

    if better == "low":
        top = min(able, key=lambda row: middle(row["values"][key]))
        best = [row for row in able if ends(row)[0] <= ends(top)[1]]
    else:
        top = max(able, key=lambda row: middle(row["values"][key]))
        best = [row for row in able if ends(row)[1] >= ends(top)[0]]
    return best if len(best) < len(able) else []
