"""The page of a comparison: one HTML file that needs no network, made from what `compare.json` holds."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from manyheads.evaluate.files import write_whole

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
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
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
    complete = bool(results.get("complete", True))
    return {
        "answer": results.get("answer") or _no_answer(rows),
        "created": _date(results.get("created")),
        "model_name": (results.get("model") or {}).get("name") or "",
        "context": _count(results.get("context")),
        "text_name": (results.get("text") or {}).get("name") or "",
        "command": results.get("command") or "manyheads compare",
        "unfinished": None if complete else _unfinished(rows, results),
        "columns": [{"key": key, "head": head, "means": means} for key, head, means, _ in COLUMNS],
        "rows": rows,
        "labels": {name: LABELS[name] for name in LABELS if any(row["label"] == name for row in rows)},
        "charts": _charts(results, done),
        "tiles": [_tile(row) for row in done if row["raw"].get("tiles")],
        "winner": _winner(results, done),
        "others": [row for row in done if row["use"] and row["kind"] != "dense"],
        "untrained": untrained(results),
        "run": _run(results),
        "method": _method(results),
        "notes": [(row["title"], note) for row in rows for note in row["notes"]],
    }


# ---- rows ----


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the summary with colour, marker and cells; dense, which the others are measured against, first."""
    raw = sorted(results.get("rows") or [], key=lambda row: row.get("kind") != "dense")
    names = [row.get("name") or row.get("id") or "?" for row in raw]
    rows, painted = [], 0
    for row, name in zip(raw, names, strict=True):
        dense = row.get("kind") == "dense"
        number = 0 if dense else painted
        painted += not dense
        spec = row.get("spec") or name
        title = _title(row, name, [other for other in raw if (other.get("name") or other.get("id") or "?") == name])
        rows.append(
            {
                "raw": row,
                "name": name,
                "spec": spec,
                "title": title,
                "axis": _wrapped(title),
                "settings": ", ".join(f"{k}={v!r}" for k, v in (row.get("settings") or {}).items()),
                "kind": row.get("kind") or "mechanism",
                "label": row.get("label") or "",
                "label_means": LABELS.get(row.get("label") or "", ""),
                "summary": row.get("summary") or "",
                "engine": row.get("engine") or "",
                "use": row.get("use") or [],
                "error": row.get("error"),
                "notes": row.get("notes") or [],
                "colour": GREY if dense else COLOURS[number % len(COLOURS)],
                "symbol": "circle" if dense else SYMBOLS[number % len(SYMBOLS)],
                "dash": "solid" if dense else DASHES[number // len(COLOURS) % len(DASHES)],
            }
        )
    dense = next((row for row in rows if row["kind"] == "dense"), None)
    for row in rows:
        row["values"] = _values(row, dense)
    _cells(rows, bool(results.get("complete", True)))
    return rows


def _title(row: Mapping[str, Any], name: str, namesakes: Sequence[Mapping[str, Any]]) -> str:
    """The name; with the settings that tell it from others of the same name."""
    own = row.get("settings") or {}
    told = {k: v for k, v in own.items() if any((other.get("settings") or {}).get(k) != v for other in namesakes)}
    return " ".join([name, ", ".join(f"{k}={v!r}" for k, v in told.items())]).strip()


def _wrapped(title: str, width: int = 20) -> str:
    """A title for an axis: lines of about `width` letters, the settings on lines of their own."""
    lines: list[str] = []
    for piece in title.split(" ", 1):
        lines.append("")
        for part in re.findall(r"[^ _]+[ _]*", piece):
            if lines[-1] and len(lines[-1]) + len(part.strip()) > width:
                lines.append("")
            lines[-1] += part
    return "<br>".join(_safe(line.strip()) for line in lines)


def _values(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers of a row, None where there is none. Ratios are to the dense row of the same run."""
    raw, base = row["raw"], dense["raw"] if dense else {}
    perplexity = _number(_at(raw, "quality", "perplexity"))
    prefill, decode = _at(raw, "speed", "prefill_s"), _at(raw, "speed", "decode_tokens_per_s")
    # A policy that only masks computes everything and then some; a mechanism that leaves keys unread is timed as it is.
    claims = not (row["label"] == "masked" and row["kind"] == "policy")
    return {
        "density": _number(raw.get("density")),
        "perplexity": perplexity,
        "ratio": _number(_at(raw, "quality", "perplexity_ratio"))
        or _divide(perplexity, _number(_at(base, "quality", "perplexity"))),
        "kl": _number(_at(raw, "quality", "kl")),
        "needle": _number(_at(raw, "quality", "needle_accuracy")),
        "prefill": _spread(prefill),
        "decode": _spread(decode),
        "cache": _number(_at(raw, "memory", "cache_bytes")),
        "prefill_up": _divide(_median(_at(base, "speed", "prefill_s")), _median(prefill)) if claims else None,
        "decode_up": _divide(_median(decode), _median(_at(base, "speed", "decode_tokens_per_s"))) if claims else None,
        "cache_share": _divide(_number(_at(raw, "memory", "cache_bytes")), _number(_at(base, "memory", "cache_bytes"))),
        "label": _at(raw, "memory", "label") or row["label"],
        "claims": claims,
    }


COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    # key, head, what it means, which way is better
    ("density", "saw", "Share of the keys a dense model looks at that were looked at", ""),
    ("perplexity", "perplexity", "Of the text after the prompt; lower is better", "low"),
    ("kl", "KL", "Divergence of the next token's distribution from that of dense, in nats; lower is better", "low"),
    ("needle", "needles", "Share of hidden facts that were answered; higher is better", "high"),
    ("prefill", "first token", "Seconds to read the prompt; median, and least to greatest; lower is better", "low"),
    ("decode", "decoding", "Tokens a second after the prompt; median, and least to greatest; higher is better", "high"),
    ("cache", "cache", "Bytes of the cache after the prompt; 1 MB is 1,000,000 bytes; lower is better", "low"),
)  # fmt: skip


KEPT = "a policy looks at all that it kept"


def _cells(rows: list[dict[str, Any]], complete: bool) -> None:
    """Each row's cells: a figure, a smaller line below it, and why there is none where there is none."""
    for row in rows:
        v = row["values"]
        why = "not measured" if complete else "not measured yet"
        row["cells"] = [
            _cell("density", _percent(v["density"]), "", v["density"], KEPT if row["kind"] == "policy" else why),
            _cell("perplexity", _figures(v["perplexity"]), _times(v["ratio"], row), v["perplexity"], why),
            _cell("kl", _figures(v["kl"], 2), "", v["kl"], why),
            _cell("needle", _percent(v["needle"]), _found(row), v["needle"], why),
            _cell("prefill", _seconds(v["prefill"]), _range(v["prefill"], _seconds), _middle(v["prefill"]), why),
            _cell("decode", _rate(v["decode"]), _range(v["decode"], _rate), _middle(v["decode"]), why),
            _cell("cache", _bytes(v["cache"]), _saved(v, row), v["cache"], why),
        ]
    for at, (key, _, _, better) in enumerate(COLUMNS):
        if better:
            for row in _best(rows, key, better):
                row["cells"][at]["best"] = True


def _cell(key: str, text: str | None, below: str | None, sort: float | None, why: str) -> dict[str, Any]:
    return {
        "key": key,
        "text": text or "–",
        "below": below or "",
        "why": "" if text else why,
        "sort": "" if sort is None else repr(sort),
        "best": False,
    }


def _best(rows: Iterable[dict[str, Any]], key: str, better: str) -> list[dict[str, Any]]:
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

    def ends(row: dict[str, Any]) -> tuple[float, float]:
        value = row["values"][key]
        return (value["min"], value["max"]) if isinstance(value, dict) else (value, value)

    if better == "low":
        top = min(able, key=lambda row: _middle(row["values"][key]))
        best = [row for row in able if ends(row)[0] <= ends(top)[1]]
    else:
        top = max(able, key=lambda row: _middle(row["values"][key]))
        best = [row for row in able if ends(row)[1] >= ends(top)[0]]
    return best if len(best) < len(able) else []


def _times(ratio: float | None, row: Mapping[str, Any]) -> str:
    return "" if ratio is None or row["kind"] == "dense" else f"× {_ratio(ratio)}"


def _found(row: Mapping[str, Any]) -> str:
    needle = _at(row["raw"], "quality", "needle") or []
    return f"{sum(bool(n.get('found')) for n in needle)} of {len(needle)}" if needle else ""


def _saved(v: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if v["cache_share"] is None or row["kind"] == "dense":
        return ""
    if v["label"] == "masked":
        return "nothing saved"
    if v["label"] not in ("freed", "simulated"):
        return "as dense" if 0.99 < v["cache_share"] < 1.01 else f"{_percent(v['cache_share'])} of dense"
    return f"{_percent(v['cache_share'])} of dense" + (", computed" if v["label"] == "simulated" else "")


def untrained(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of mechanisms that need training, with their cells."""
    return [_untrained(row) for row in results.get("untrained") or []]


def _untrained(row: Mapping[str, Any]) -> dict[str, Any]:
    """A mechanism that needs training, which is measured for speed and memory alone."""
    layer, speed, memory = _spread(row.get("layer_ms")), row.get("speed") or {}, row.get("memory") or {}
    prefill, decode = _spread(speed.get("prefill_s")), _spread(speed.get("decode_tokens_per_s"))
    why = (row.get("error") or next(iter(row.get("notes") or []), "")) or "not measured"
    milliseconds = _spread_text(layer, lambda value: f"{_figures(value)} ms")
    return {
        "title": row.get("spec") or row.get("name") or "?",
        "summary": row.get("summary") or "",
        "engine": row.get("engine") or "",
        "cells": [
            _cell("layer", milliseconds[0], milliseconds[1], _middle(layer), why),
            _cell("prefill", _seconds(prefill), _range(prefill, _seconds), _middle(prefill), why),
            _cell("decode", _rate(decode), _range(decode, _rate), _middle(decode), why),
            _cell("memory", _bytes(_number(memory.get("cache_bytes"))), memory.get("label"), None,
                  row.get("peak_note") or why),
        ],
        "notes": [note for note in (row.get("peak_note"), *(row.get("notes") or []), row.get("error")) if note],
    }  # fmt: skip


# ---- charts ----


def _charts(results: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The charts that there is data for: each has views, of which one is shown at a time."""
    makers: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "trade": _trade,
        "position": _position,
        "divergence": _divergence,
        "needle": _needle,
        "memory": _memory,
    }
    charts = {}
    for name, make in makers.items():
        if views := [v for v in make(rows, results) if v["figure"]["data"]]:
            charts[name] = {"views": views}
    return charts


def _view(label: str, figure: Any, note: str = "", **more: Any) -> dict[str, Any]:
    """A figure as data for the page's script. `var(--ink)` and the like are filled in there, for light or dark."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "var(--soft)", "size": 12},
        hoverlabel={"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        showlegend=False,
        dragmode=False,  # a finger on a chart scrolls the page
    )
    grid = {"gridcolor": "var(--grid)", "linecolor": "var(--line)", "zeroline": False, "fixedrange": True}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    return {"label": label, "figure": json.loads(figure.to_json()), "note": note, **more}


def _trade(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Speed against quality. Up and to the right is better: the axis of perplexity points down."""
    views = []
    for label, title, key, unit in (
        ("decoding speed", "tokens a second after the prompt", "decode", " tokens/s"),
        ("prompt, against dense", "times as fast as dense to the first token", "prefill_up", " × dense"),
    ):
        points = []
        for row in rows:
            x, y = row["values"][key], row["values"]["ratio"]
            if x is not None and y is not None:
                points.append((row, x if isinstance(x, dict) else {"median": x, "min": x, "max": x}, y))
        figure = _go().Figure()
        if points:
            _trade_figure(figure, points, title, unit)
        absent = [row["title"] for row in rows if row["label"] == "masked" and row["kind"] == "policy"]
        absent = absent if key == "prefill_up" else []
        note = f"Left out, because a policy that only masks saves nothing: {', '.join(absent)}." if absent else ""
        views.append(_view(label, figure, note, names=True, height=[440, 460]))
    return views


def _trade_figure(figure: Any, points: list[tuple[dict, dict, float]], title: str, unit: str) -> None:
    largest = max((row["values"]["cache"] or 0 for row, _, _ in points), default=0)
    ratios = [y for _, _, y in points]
    ceiling = _ceiling(ratios)
    for row, x, y in points:
        cache = row["values"]["cache"]
        size = 10 if not cache or not largest else 8 + 18 * math.sqrt(cache / largest)  # the area grows with the bytes
        hollow, beyond = row["label"] == "masked", y > ceiling
        figure.add_scatter(
            name=row["title"],
            x=[x["median"]],
            y=[min(y, ceiling)],
            meta=f" ↓ × {_ratio(y)}" if beyond else "",  # goes behind the name
            mode="markers",
            cliponaxis=False,
            marker={
                "size": size,
                "symbol": row["symbol"] + ("-open" if hollow else ""),
                "color": row["colour"],
                "opacity": 1 if hollow else 0.9,
                "line": {"width": 2 if hollow else 1, "color": row["colour"] if hollow else "var(--page)"},
            },
            error_x={
                "type": "data", "symmetric": False, "array": [x["max"] - x["median"]],
                "arrayminus": [x["median"] - x["min"]], "color": row["colour"], "thickness": 1, "width": 3,
            },
            customdata=[[_ratio(x["median"]) if unit.endswith("dense") else _figures(x["median"]), _ratio(y),
                         _bytes(cache) or "–", row["label"]]],
            hovertemplate=f"<b>{_safe(row['spec'])}</b><br>%{{customdata[0]}}{unit}<br>perplexity × %{{customdata[1]}}"
            "<br>cache %{customdata[2]} (%{customdata[3]})<extra></extra>",
        )  # fmt: skip
    high, low = min(max(ratios), ceiling), min(ratios)
    pad = 0.1 * (high - low) or 0.05
    left, right = min(x["min"] for _, x, _ in points), max(x["max"] for _, x, _ in points)
    margin = 0.08 * (right - left) or 0.1 * right
    figure.update_xaxes(title=title, range=[max(left - margin, 0), right + margin], nticks=6)
    figure.update_yaxes(title="perplexity ÷ dense", range=[high + pad, low - pad], nticks=6)
    figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")
    figure.add_annotation(
        text="better ↗", xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", showarrow=False,
        font={"color": "var(--faint)", "size": 12},
    )  # fmt: skip
    figure.update_layout(margin={"l": 58, "r": 18, "t": 26, "b": 52}, hovermode="closest")


def _ceiling(ratios: Sequence[float]) -> float:
    """The greatest ratio that a chart shows to scale: one that is far worse than most would press them into a line."""
    ceiling = 1 + max(0.1, 2.5 * (sorted(ratios)[round(0.75 * (len(ratios) - 1))] - 1))
    return ceiling if max(ratios) - 1 > 1.5 * (ceiling - 1) else math.inf


def _position(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Perplexity along the text, against dense at the same place and as it is."""
    spans = {id(row): _spans(_at(row["raw"], "quality", "by_position"), "perplexity") for row in rows}
    dense = next((dict(spans[id(row)]) for row in rows if row["kind"] == "dense"), {})
    relative = [
        (row, [(x, r) for x, y in spans[id(row)] if (r := _divide(y, dense.get(x))) is not None]) for row in rows
    ]
    relative = [(row, points) for row, points in relative if points]
    plain = [(row, spans[id(row)]) for row in rows if spans[id(row)]]
    context, title = results.get("context"), "perplexity ÷ dense"
    views = [_lines("against dense", relative, title, context), _lines("as it is", plain, "perplexity", context)]
    ceiling = _ceiling([max(y for _, y in points) for _, points in relative] or [1])
    if math.isfinite(ceiling):
        views[0]["label"] = "whole range"
        near = _lines("near dense", relative, title, context, ceiling)
        left = [f"{row['title']} (up to × {_ratio(max(y for _, y in points))})"
                for row, points in relative if max(y for _, y in points) > ceiling]  # fmt: skip
        near["note"] = f"Leaves the chart: {', '.join(left)}."
        views.insert(0, near)
    return views


def _divergence(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far the next-token distribution is from dense: over what follows the prompt, and along the text."""
    others = [row for row in rows if row["kind"] != "dense"]
    lines = []
    for row in others:
        by = _at(row["raw"], "quality", "kl_by_position") or []
        if by and not isinstance(by[0], Mapping):  # plain numbers stand for the same pieces as the perplexities
            places = _at(row["raw"], "quality", "by_position") or []
            by = [{**place, "kl": value} for place, value in zip(places, by, strict=False)]
        if points := [(x, max(y, LEAST_KL)) for x, y in _spans(by, "kl")]:
            lines.append((row, points))
    dots = sorted((row for row in others if row["values"]["kl"] is not None), key=lambda row: -row["values"]["kl"])
    return [
        _view("overall", _dots(dots), height=_height(dots)),
        _lines("by position", lines, "nats a token", results.get("context")),
    ]


# Below it lies rounding: two ways to compute the same attention in float32 differ by more.
LEAST_KL = 1e-7


def _dots(rows: list[dict[str, Any]]) -> Any:
    """KL on a logarithmic axis, where a bar's length would mean nothing."""
    figure = _go().Figure()
    if not rows:
        return figure
    values = [max(row["values"]["kl"], LEAST_KL) for row in rows]
    figure.add_scatter(
        x=values,
        y=[row["axis"] for row in rows],
        mode="markers+text",
        text=[f"  {_figures(row['values']['kl'], 2)}" for row in rows],
        textposition="middle right",
        textfont={"color": "var(--ink)"},
        cliponaxis=False,
        marker={"color": [r["colour"] for r in rows], "symbol": [r["symbol"] for r in rows], "size": 11},
        hovertemplate="<b>%{y}</b><br>%{text} nats<extra></extra>",
    )
    low, high = math.log10(min(values)), math.log10(max(values))
    room = 0.5 * max(1.0, high - low)  # for the figures behind the dots
    figure.update_xaxes(type="log", title="nats a token, after the prompt", range=[low - 0.25, high + room],
                        dtick=max(1, round((high - low) / 4)), exponentformat="power")  # fmt: skip
    figure.update_yaxes(automargin=True, type="category", ticks="")
    figure.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": 52})
    return figure


def _lines(
    label: str, lines: list[tuple[dict, list[tuple[float, float]]]], title: str, context: Any, ceiling: float = math.inf
) -> dict[str, Any]:
    """A line for each row. Above the ceiling, if there is one, lines leave the chart."""
    figure = _go().Figure()
    values = [y for _, points in lines for _, y in points if y > 0]
    for row, points in lines:
        figure.add_scatter(
            name=row["title"],
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines+markers",
            line={"color": row["colour"], "width": 2, "dash": row["dash"]},
            marker={"symbol": row["symbol"], "size": 6, "color": row["colour"]},
            hovertemplate=f"<b>{_safe(row['spec'])}</b><br>around token %{{x:,.0f}}: %{{y:.3~f}}<extra></extra>",
        )
    if values:
        figure.update_xaxes(title="position in the text, in tokens", tickformat=",", nticks=6)
        figure.update_yaxes(title=title, nticks=6)
        decades = math.log10(max(values) / min(values))
        if math.isfinite(ceiling):
            pad = 0.06 * (ceiling - min(values))
            figure.update_yaxes(range=[min(values) - pad, ceiling + pad])
        elif decades > 0.9:
            step = "D2" if decades < 2 else round(decades / 4) or 1
            figure.update_yaxes(type="log", exponentformat="power", dtick=step)
        last = max(x for _, points in lines for x, _ in points)
        if isinstance(context, int | float) and 0 < context < last:
            figure.add_vline(x=context, line={"color": "var(--faint)", "width": 1, "dash": "dot"})
            figure.add_annotation(
                text="prompt ends", x=context, y=1, yref="paper", yanchor="bottom", xanchor="right", showarrow=False,
                font={"color": "var(--faint)", "size": 11},
            )  # fmt: skip
    figure.update_layout(margin={"l": 58, "r": 14, "t": 24, "b": 52}, hovermode="closest")
    return _view(label, figure, height=[340, 380], legend=True)


def _needle(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows are mechanisms, columns the depth of the needle; a cell says how many were found there."""
    figure = _go().Figure()
    asked = [row for row in rows if _at(row["raw"], "quality", "needle")]
    given = {needle.get("depth") for row in asked for needle in row["raw"]["quality"]["needle"]}
    depths = sorted(given - {None})
    z, words, hover = [], [], []
    for row in asked:
        shares, marks, tips = [], [], []
        for depth in depths:
            here = [n for n in row["raw"]["quality"]["needle"] if n.get("depth") == depth]
            found = sum(bool(n.get("found")) for n in here)
            shares.append(found / len(here) if here else None)
            marks.append("" if not here else f"{found}/{len(here)}" if len(here) > 1 else "✓" if found else "✗")
            tips.append(f"<b>{_safe(row['spec'])}</b><br>depth {_percent(depth)}: {_told(here)}")
        z.append(shares)
        words.append(marks)
        hover.append(tips)
    if depths:
        figure.add_heatmap(
            z=z, x=[f"{100 * depth:.0f}" for depth in depths], y=[row["axis"] for row in asked],
            text=words, texttemplate="%{text}", customdata=hover, hovertemplate="%{customdata}<extra></extra>",
            textfont={"size": 13}, zmin=0, zmax=1, xgap=2, ygap=2, showscale=False,
            colorscale=[[0, "var(--missed)"], [1, "var(--found)"]],
        )  # fmt: skip
        figure.update_xaxes(title="depth, % of the prompt", type="category", showgrid=False, tickangle=0, ticks="")
        figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True, type="category", ticks="")
    figure.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": 52})
    return [_view("", figure, height=_height(asked))]


def _told(needles: Sequence[Mapping[str, Any]]) -> str:
    """What is known of the needles at one depth, in words."""
    parts = []
    for needle in needles:
        words = "found" if needle.get("found") else "missed"
        for key, name in (("margin", "margin"), ("log_probability", "log probability")):
            if (value := _number(needle.get(key))) is not None:
                words += f", {name} {value:.2f}"
        parts.append(words)
    return "<br>".join(parts) or "not asked"


def _memory(rows: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of bytes with the figure behind them; what is masked is hatched."""
    figure = _go().Figure()
    held = sorted((row for row in rows if row["values"]["cache"] is not None), key=lambda row: -row["values"]["cache"])
    if held:
        for row in held:
            figure.add_bar(
                orientation="h",
                y=[row["axis"]],
                x=[row["values"]["cache"]],
                text=[_held(row)],
                textposition="outside",
                textfont={"color": "var(--ink)"},
                cliponaxis=False,
                constraintext="none",
                marker={"color": row["colour"]},
                hovertemplate="<b>%{y}</b><br>%{text}<extra></extra>",
            )
            if row["values"]["label"] == "masked":
                hatch = {"shape": "/", "fillmode": "overlay", "fgcolor": "var(--page)", "fgopacity": 0.45, "size": 6}
                figure.data[-1].marker.pattern = hatch
        room = 1.9  # behind the longest bar, for its figure
        figure.update_xaxes(visible=False, range=[0, room * (held[0]["values"]["cache"] or 1)])
    figure.update_yaxes(automargin=True, showgrid=False, type="category", ticks="")
    figure.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": 8}, bargap=0.28, barmode="overlay")
    return [_view("", figure, height=_height(held, 20))]


def _held(row: Mapping[str, Any]) -> str:
    """A row's bytes, and their share of dense where its label allows to say so."""
    v, text = row["values"], _bytes(row["values"]["cache"]) or ""
    if row["kind"] == "dense" or v["cache_share"] is None:
        return text
    if v["label"] == "freed":
        return f"{text} · {_percent(v['cache_share'])}"
    return f"{text} · {v['label']}"


def _height(rows: Sequence[Mapping[str, Any]], more: int = 64) -> list[int]:
    """Pixels for a chart with a band for each row, on a phone and on a desktop."""
    lines = max((row["axis"].count("<br>") + 1 for row in rows), default=1)
    height = more + len(rows) * (16 + 14 * lines)
    return [height, height]


def _tile(row: Mapping[str, Any]) -> dict[str, Any]:
    """What one row saw, as a small map: queries downwards, keys to the right, the future blank."""
    tiles = [[_number(value) for value in line] for line in row["raw"]["tiles"]]
    high, wide = len(tiles), max((len(line) for line in tiles), default=0)
    top = max((value for line in tiles for value in line if value is not None), default=0)
    if top > 1:  # 0 empty, 1 partial, 2 full
        tiles = [[None if value is None else value / 2 for value in line] for line in tiles]
    # Blank is a tile whose first key comes after its last query, unless it was looked at; queries are the last ones.
    for i, line in enumerate(tiles):
        tiles[i] = [None if not value and j > i + wide - high else value for j, value in enumerate(line)]
    figure = _go().Figure()
    figure.add_heatmap(
        z=tiles, zmin=0, zmax=1, showscale=False, hoverinfo="skip", hoverongaps=False,
        colorscale=[[0, "var(--empty)"], [1, row["colour"]]],
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, wide - 0.5])
    figure.update_yaxes(visible=False, range=[high - 0.5, -0.5])
    figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0})
    density = _percent(row["values"]["density"])
    return {
        "title": row["title"],
        "settings": row["settings"],
        "caption": f"saw {density}" if density else "share not measured",
        "view": _view("", figure, still=True),
    }


@cache
def _go() -> Any:
    import plotly.graph_objects as go

    return go


# ---- words ----


def _no_answer(rows: Sequence[Mapping[str, Any]]) -> str:
    if any(row["kind"] != "dense" and not row["error"] for row in rows):
        return "What each attention costs and what it loses"
    return "Nothing has been measured yet but dense attention" if rows else "Nothing has been measured yet"


def _unfinished(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    count, planned = len(rows) + len(results.get("untrained") or []), len(results.get("asked") or [])
    if planned:
        return f"This run has not finished: {count} of {planned} rows are here."
    return f"This run has not finished: {count} row{' is' if count == 1 else 's are'} here."


def _winner(results: Mapping[str, Any], done: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that the answer names; where none is told, the least loss among those that save memory or time."""
    if "winner" in results:
        named = results["winner"]
        return next((row for row in done if named and named in (row["spec"], row["raw"].get("id"))), None)
    able = [row for row in done if row["kind"] != "dense" and row["use"] and row["values"]["ratio"] is not None]
    able = [row for row in able if row["label"] == "freed" or (row["values"]["prefill_up"] or 0) > 1.05]
    return min(able, key=lambda row: row["values"]["ratio"], default=None)


def _run(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run on what, in pairs of words."""
    machine, model, text = (results.get(key) or {} for key in ("machine", "model", "text"))
    versions = [f"{name} {machine[name]}" for name in ("torch", "transformers", "python") if machine.get(name)]
    shape = [
        f"{_count(model[key])} {words}"
        for key, words in (("parameters", "parameters"), ("layers", "layers"), ("heads", "heads"),
                           ("kv_heads", "KV heads"), ("head_dim", "dimensions a head"))
        if model.get(key) is not None
    ]  # fmt: skip
    pairs = [
        ("command", results.get("command")),
        ("model", _join([model.get("name"), *shape, model.get("dtype")])),
        ("text", _join([text.get("name"), text.get("tokens") is not None and f"{_count(text['tokens'])} tokens",
                        text.get("sha256") and f"SHA-256 {text['sha256']}"])),
        ("context", results.get("context") is not None and f"{_count(results['context'])} tokens"),
        ("machine", _join([machine.get("cpu"), machine.get("threads") and f"{machine['threads']} threads",
                           machine.get("device") and f"device {machine['device']}"])),
        ("versions", _join([f"manyheads {results.get('manyheads')}" if results.get("manyheads") else "", *versions])),
        ("seed", "" if results.get("seed") is None else str(results["seed"])),
        ("repeats", "" if results.get("repeats") is None else str(results["repeats"])),
        ("made", _date(results.get("created"))),
    ]  # fmt: skip
    return [(word, str(value)) for word, value in pairs if value]


def _method(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    repeats = results.get("repeats")
    times = f"the median of {repeats} runs" if isinstance(repeats, int) and repeats > 1 else "one run"
    told = [
        ("Saw", "the share of query and key pairs that were computed, of those that plain causal attention computes."),
        ("Perplexity", "exp of the mean loss on the text that follows the prompt, where a cache policy has already "
         "dropped what it drops; × is the ratio to dense on the same tokens. It is the same at each run."),
        ("KL", "how far the next-token distribution is from that of the dense model on the same tokens, in nats: "
         "0 means that the two agree. It sees changes that perplexity averages away."),
        ("Needles", "facts hidden in the prompt at several depths, asked for at its end: found if greedy decoding "
         "gives the answer. The questions come after the prompt was read and the cache was cut."),
        ("First token", f"seconds to read the prompt: {times}, with the least and the greatest below."),
        ("Decoding", f"tokens a second after the prompt, one by one: {times}, with the least and the greatest below."),
        ("Cache", "the bytes that the cache holds after the prompt, counted from its tensors. The label says whether "
         "what was dropped is really gone."),
        ("Bold", "the best in its column, and those that the spread of the runs does not tell from it. Dense "
         "competes in speed and memory alone."),
    ]  # fmt: skip
    return told + [("Also", str(note)) for note in results.get("notes") or []]


# ---- numbers ----


def _number(value: Any) -> float | None:
    """A finite number, or None: what is not a number is shown as missing, never as 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _spread(value: Any) -> dict[str, float] | None:
    """median, min and max; a plain number stands for all three."""
    if (single := _number(value)) is not None:
        return {"median": single, "min": single, "max": single}
    if (median := _number(_at(value, "median"))) is None:
        return None
    low, high = _number(_at(value, "min")), _number(_at(value, "max"))
    return {"median": median, "min": median if low is None else low, "max": median if high is None else high}


def _median(value: Any) -> float | None:
    return _middle(_spread(value))


def _middle(value: Any) -> Any:
    return value["median"] if isinstance(value, dict) else value


def _spans(pieces: Any, key: str) -> list[tuple[float, float]]:
    """(middle of the piece, value) where there is a value."""
    found = []
    for piece in pieces or []:
        start, end, value = (_number(piece.get(name)) for name in ("start", "end", key))
        if start is not None and end is not None and value is not None:
            found.append(((start + end) / 2, value))
    return found


def _figures(value: float | None, digits: int = 3) -> str | None:
    """A number with that many significant figures, never in powers of ten unless it is tiny or huge."""
    if value is None:
        return None
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1.2 else f"{value:.2f}" if value < 20 else f"{value:,.0f}"


def _percent(value: float | None) -> str | None:
    if value is None:
        return None
    share = 100 * value
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.1f} %"


def _seconds(value: Any) -> str | None:
    value = _middle(value)
    return None if value is None else f"{_figures(value)} s"


def _rate(value: Any) -> str | None:
    value = _middle(value)
    return None if value is None else f"{_figures(value)}/s"


def _range(value: dict[str, float] | None, write: Callable[[Any], str | None]) -> str:
    """Least to greatest, with the unit once."""
    if value is None or value["min"] == value["max"]:
        return ""
    low, high = write(value["min"]) or "", write(value["max"]) or ""
    unit = high.lstrip("0123456789.,e-")
    return f"{low.removesuffix(unit)} – {high}"


def _spread_text(value: dict[str, float] | None, write: Callable[[float], str]) -> tuple[str | None, str]:
    if value is None:
        return None, ""
    return write(value["median"]), _range(value, lambda x: write(_middle(x)))


def _bytes(value: float | None) -> str | None:
    if value is None:
        return None
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_figures(value / size)} {unit}"
    return f"{value:.0f} B"


def _count(value: Any) -> str:
    number = _number(value)
    if number is None:
        return "" if value is None else str(value)
    return f"{number / 1e6:,.0f} million" if number >= 1e7 else f"{number:,.0f}"


def _date(value: Any) -> str:
    try:
        return datetime.fromisoformat(str(value)).strftime("%d %B %Y, %H:%M").lstrip("0")
    except ValueError:
        return "" if value is None else str(value)


def _join(parts: Iterable[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def _safe(text: str) -> str:
    """Text for plotly, which reads a few tags in what it draws."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
