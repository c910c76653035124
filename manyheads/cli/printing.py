"""How the commands print: tables, JSON, errors."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def make_console() -> Any:
    from rich.console import Console

    # A pipe has no width: rows stay whole there, for grep.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)


def make_table(*heads: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=header, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for n, head in enumerate(heads):
        table.add_column(head, style="bold" if n == 0 else "", no_wrap=n == 0, overflow="fold")
    return table


def bold(text: str) -> Any:
    from rich.text import Text

    return Text(text, style="bold")


def print_json(value: Any) -> None:
    # inf is a setting of some mechanisms, and JSON has no number for it.
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def sentence(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return error.strerror + where
    return " ".join(str(error).split()) or type(error).__name__
