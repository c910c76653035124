"""A study: a published claim about attention that can be calculated or measured, with the facts about it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from manyheads.core.published import Published

Rows = list[dict[str, Any]]  # the rows of a table, which have the same keys


@dataclass(frozen=True, eq=False, kw_only=True)
class Study(Published):
    """One published study. Call it with settings for the rows of its table."""

    family: str

    def __call__(self, **given: Any) -> Rows:
        """Raises TypeError or ValueError, in one sentence, for what does not fit."""
        self.check(given)
        return self.factory(**given)

    def main(self, arguments: list[str] | None = None) -> None:
        """Print the table; the settings are options of the command line."""
        parser = argparse.ArgumentParser(description=self.summary)
        for name, default in self.settings.items():
            parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} if not given")
        try:
            rows = self(**vars(parser.parse_args(arguments)))
        except ValueError as error:
            parser.error(str(error))
        print(table(rows))


def table(rows: Rows) -> str:
    """The rows as aligned text, numbers with four digits."""
    shown = [list(rows[0]), *([f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in shown)


def study(
    *, arxiv: str, family: str, system: str = "", ranges: Mapping[str, tuple[float, float]] | None = None
) -> Callable[[Callable[..., Rows]], Study]:
    """Publish a function from settings, each with a default, to rows."""

    def declare(factory: Callable[..., Rows]) -> Study:
        return Study(
            name=factory.__name__, factory=factory, arxiv=arxiv, system=system, family=family, ranges=ranges or {}
        )

    return declare
