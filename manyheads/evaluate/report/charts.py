"""The page's charts, as data for plotly in the page's script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manyheads.evaluate.report.numbers import (
    at,
    byte_count,
    divide,
    figures,
    number,
    percent,
    ratio,
    safe,
    spans,
    spread,
)
from manyheads.evaluate.report.plotting import View, banded, blank, remark, view
from manyheads.evaluate.report.rows import GREY, Row

Line = tuple[Row, list[tuple[float, float]]]  # a row with its points

# Below it lies rounding: two ways to compute the same attention in float32 differ by more.
LEAST_KL = 1e-7


def draw(results: Mapping[str, Any], rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The charts that there is data for: each has views, of which one is shown at a time."""
    makers: dict[str, Callable[[list[Row], Any], list[View]]] = {
        "trade": _trade,
        "position": _position,
        "divergence": _divergence,
        "needle": _needle,
        "memory": _memory,
    }
    charts = {}
    for name, make in makers.items():
        if views := [v for v in make(rows, results.get("context")) if v["figure"]["data"]]:
            charts[name] = {"views": views}
    return charts


def tile(row: Row) -> dict[str, Any]:
    """What one row saw, as a small map: queries downwards, keys to the right, the future blank."""
    tiles = [[number(value) for value in line] for line in row["raw"]["tiles"]]
    high, wide = len(tiles), max((len(line) for line in tiles), default=0)
    top = max((value for line in tiles for value in line if value is not None), default=0)
    if top > 1:  # 0 empty, 1 partial, 2 full
        tiles = [[None if value is None else value / 2 for value in line] for line in tiles]
    # Blank is a tile whose first key comes after its last query, unless it was looked at; queries are the last ones.
    for i, line in enumerate(tiles):
        tiles[i] = [None if not value and j > i + wide - high else value for j, value in enumerate(line)]
    figure = blank()
    figure.add_heatmap(
        z=tiles, zmin=0, zmax=1, showscale=False, hoverinfo="skip", hoverongaps=False,
        colorscale=[[0, "var(--empty)"], [1, row["colour"]]],
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, wide - 0.5])
    figure.update_yaxes(visible=False, range=[high - 0.5, -0.5])
    figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0})
    density, mass = percent(row["values"]["density"]), percent(row["values"]["mass"])
    return {
        "title": row["title"],
        "caption": f"saw {density}{f', mass {mass}' if mass else ''}" if density else "share not measured",
        "view": view("", figure, still=True),
    }


# ---- speed against quality ----


def _trade(rows: list[Row], context: Any) -> list[View]:
    """Speed against quality. Up and to the right is better: the axis of perplexity points down."""
    views = []
    for label, title, key, unit in (
        ("decoding speed", "tokens a second after the prompt", "decode", " tokens/s"),
        ("prompt, against dense", "times as fast as dense to the first token", "prefill_up", " × dense"),
    ):
        points = []
        for row in rows:
            x, y = spread(row["values"][key]), row["values"]["ratio"]
            if x is not None and y is not None:
                points.append((row, x, y))
        figure = blank()
        if points:
            _points(figure, points, title, unit)
        absent = [row["title"] for row in rows if not row["values"]["claims"]] if key == "prefill_up" else []
        note = f"Left out, because a policy that only masks saves nothing: {', '.join(absent)}." if absent else ""
        views.append(view(label, figure, note, names=True, height=[440, 460]))
    return views


def _points(figure: Any, points: list[tuple[Row, dict[str, float], float]], title: str, unit: str) -> None:
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
            meta=f" ↓ × {ratio(y)}" if beyond else "",  # goes behind the name
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
            customdata=[[ratio(x["median"]) if unit.endswith("dense") else figures(x["median"]), ratio(y),
                         byte_count(cache) or "–", row["label"]]],
            hovertemplate=f"<b>{safe(row['spec'])}</b><br>%{{customdata[0]}}{unit}<br>perplexity × %{{customdata[1]}}"
            "<br>cache %{customdata[2]} (%{customdata[3]})<extra></extra>",
        )  # fmt: skip
    high, low = min(max(ratios), ceiling), min(ratios)
    pad = 0.1 * (high - low) or 0.05
    left, right = min(x["min"] for _, x, _ in points), max(x["max"] for _, x, _ in points)
    margin = 0.08 * (right - left) or 0.1 * right
    figure.update_xaxes(title=title, range=[max(left - margin, 0), right + margin], nticks=6)
    figure.update_yaxes(title="perplexity ÷ dense", range=[high + pad, low - pad], nticks=6)
    figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")
    remark(figure, "better ↗", x=1, xref="paper")
    figure.update_layout(margin={"l": 58, "r": 18, "t": 26, "b": 52}, hovermode="closest")


def _ceiling(ratios: Sequence[float]) -> float:
    """The greatest ratio that a chart shows to scale: one that is far worse than most would press them into a line."""
    ceiling = 1 + max(0.1, 2.5 * (sorted(ratios)[round(0.75 * (len(ratios) - 1))] - 1))
    return ceiling if max(ratios) - 1 > 1.5 * (ceiling - 1) else math.inf


# ---- along the text ----


def _position(rows: list[Row], context: Any) -> list[View]:
    """Perplexity along the text, against dense at the same place and as it is."""
    plain = [(row, points) for row in rows if (points := spans(at(row["raw"], "quality", "by_position"), "perplexity"))]
    dense = next((dict(points) for row, points in plain if row["kind"] == "dense"), {})
    relative = []
    for row, points in plain:
        if shares := [(x, share) for x, y in points if (share := divide(y, dense.get(x))) is not None]:
            relative.append((row, shares))
    title = "perplexity ÷ dense"
    views = [_lines("against dense", relative, title, context), _lines("as it is", plain, "perplexity", context)]
    worst = [(row, max(y for _, y in points)) for row, points in relative]
    ceiling = _ceiling([y for _, y in worst] or [1])
    if math.isfinite(ceiling):
        views[0]["label"] = "whole range"
        near = _lines("near dense", relative, title, context, ceiling)
        left = [f"{row['title']} (up to × {ratio(y)})" for row, y in worst if y > ceiling]
        near["note"] = f"Leaves the chart: {', '.join(left)}."
        views.insert(0, near)
    return views


def _divergence(rows: list[Row], context: Any) -> list[View]:
    """How far the next-token distribution is from dense: over what follows the prompt, and along the text."""
    others = [row for row in rows if row["kind"] != "dense"]
    lines = []
    for row in others:
        by = at(row["raw"], "quality", "kl_by_position") or []
        if by and not isinstance(by[0], Mapping):  # plain numbers stand for the same pieces as the perplexities
            places = at(row["raw"], "quality", "by_position") or []
            by = [{**place, "kl": value} for place, value in zip(places, by, strict=False)]
        if points := [(x, max(y, LEAST_KL)) for x, y in spans(by, "kl")]:
            lines.append((row, points))
    return [_overall(others), _lines("by position", lines, "nats a token", context)]


def _overall(rows: list[Row]) -> View:
    """KL on a logarithmic axis, where a bar's length would mean nothing."""
    rows = sorted((row for row in rows if row["values"]["kl"] is not None), key=lambda row: -row["values"]["kl"])
    figure = blank()
    if rows:
        values = [max(row["values"]["kl"], LEAST_KL) for row in rows]
        figure.add_scatter(
            x=values,
            y=[row["axis"] for row in rows],
            mode="markers+text",
            text=[f"  {figures(row['values']['kl'], 2)}" for row in rows],
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
    return banded("overall", figure, rows)


def _lines(label: str, lines: list[Line], title: str, context: Any, ceiling: float = math.inf) -> View:
    """A line for each row. Above the ceiling, if there is one, lines leave the chart."""
    figure = blank()
    values = [y for _, points in lines for _, y in points if y > 0]
    for row, points in lines:
        figure.add_scatter(
            name=row["title"],
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines+markers",
            line={"color": row["colour"], "width": 2, "dash": row["dash"]},
            marker={"symbol": row["symbol"], "size": 6, "color": row["colour"]},
            hovertemplate=f"<b>{safe(row['spec'])}</b><br>around token %{{x:,.0f}}: %{{y:.3~f}}<extra></extra>",
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
            remark(figure, "prompt ends", 11, x=context)
    figure.update_layout(margin={"l": 58, "r": 14, "t": 24, "b": 52}, hovermode="closest")
    return view(label, figure, height=[340, 380], legend=True)


# ---- a band for each row ----


def _needle(rows: list[Row], context: Any) -> list[View]:
    """Rows are mechanisms, columns the depth of the needle; a cell says how many were found there."""
    figure = blank()
    asked = [row for row in rows if at(row["raw"], "quality", "needle")]
    depths = sorted({needle.get("depth") for row in asked for needle in row["raw"]["quality"]["needle"]} - {None})
    if depths:
        cells = [[_hidden(row, depth) for depth in depths] for row in asked]
        z, words, hover = ([[cell[part] for cell in line] for line in cells] for part in range(3))
        figure.add_heatmap(
            z=z, x=[f"{100 * depth:.0f}" for depth in depths], y=[row["axis"] for row in asked],
            text=words, texttemplate="%{text}", customdata=hover, hovertemplate="%{customdata}<extra></extra>",
            textfont={"size": 13}, zmin=0, zmax=1, xgap=2, ygap=2, showscale=False,
            colorscale=[[0, "var(--missed)"], [1, "var(--found)"]],
        )  # fmt: skip
        figure.update_xaxes(title="depth, % of the prompt", type="category", showgrid=False, tickangle=0, ticks="")
        figure.update_yaxes(autorange="reversed", showgrid=False)
    return [banded("", figure, asked)]


def _hidden(row: Row, depth: float) -> tuple[float | None, str, str]:
    """Of a row's needles at one depth: the share that was found, a mark for it, and what is known of them in words."""
    here = [needle for needle in row["raw"]["quality"]["needle"] if needle.get("depth") == depth]
    found = sum(bool(needle.get("found")) for needle in here)
    mark = "" if not here else f"{found}/{len(here)}" if len(here) > 1 else "✓" if found else "✗"
    told = "<br>".join(_told(needle) for needle in here) or "not asked"
    return found / len(here) if here else None, mark, f"<b>{safe(row['spec'])}</b><br>depth {percent(depth)}: {told}"


def _told(needle: Mapping[str, Any]) -> str:
    words = ["found" if needle.get("found") else "missed"]
    for key, name in (("margin", "margin"), ("log_probability", "log probability")):
        if (value := number(needle, key)) is not None:
            words.append(f"{name} {value:.2f}")
    return ", ".join(words)


def _memory(rows: list[Row], context: Any) -> list[View]:
    """Bars of bytes with the figure behind them; what is masked is hatched."""
    figure = blank()
    held = sorted((row for row in rows if row["values"]["cache"] is not None), key=lambda row: -row["values"]["cache"])
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
    if held:
        room = 1.9  # behind the longest bar, for its figure
        figure.update_xaxes(visible=False, range=[0, room * (held[0]["values"]["cache"] or 1)])
    figure.update_yaxes(showgrid=False)
    figure.update_layout(bargap=0.28, barmode="overlay")
    return [banded("", figure, held, bottom=8)]


def _held(row: Row) -> str:
    """A row's bytes, and their share of dense where its label allows to say so."""
    share, label, text = row["values"]["cache_share"], row["values"]["label"], byte_count(row["values"]["cache"]) or ""
    if row["kind"] == "dense" or share is None:
        return text
    return f"{text} · {percent(share) if label == 'freed' else label}"
