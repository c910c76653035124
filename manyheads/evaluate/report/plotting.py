"""What the page's charts have in common: their ground, their grid, how they come into the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

View = dict[str, Any]  # what the page's script draws: a figure, its label, its heights


def blank() -> Any:
    from plotly.graph_objects import Figure

    return Figure()


def view(label: str, figure: Any, note: str = "", **more: Any) -> View:
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


def banded(label: str, figure: Any, rows: Sequence[Mapping[str, Any]], bottom: int = 52) -> View:
    """The view of a chart with a band for each row, as high as they need."""
    figure.update_yaxes(automargin=True, type="category", ticks="")
    figure.update_layout(margin={"l": 8, "r": 8, "t": 8, "b": bottom})
    lines = max((row["axis"].count("<br>") + 1 for row in rows), default=1)
    height = bottom + 12 + len(rows) * (16 + 14 * lines)
    return view(label, figure, height=[height, height])  # on a phone and on a desktop


def remark(figure: Any, text: str, size: int = 12, **place: Any) -> None:
    """A faint word above the chart, its end at (x, y)."""
    figure.add_annotation(
        text=text, y=1, yref="paper", xanchor="right", yanchor="bottom", showarrow=False,
        font={"color": "var(--faint)", "size": size}, **place,
    )  # fmt: skip
