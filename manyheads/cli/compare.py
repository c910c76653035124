"""`manyheads compare`: the run as it goes on, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads.cli.printing import bold, make_console, make_table


def compare(
    text: Annotated[
        list[str] | None,
        typer.Argument(help='Text files, "-" for standard input; without any, the documentation in every Python.'),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A transformers id or folder [SmolLM2-135M-Instruct].")] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(help="Names, with settings if you like: 'moba(block_size=64,top_k=4),snapkv(budget=512)' [all]."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the prompt [2048 on a CPU, 8192 on a GPU].")] = None,
    out: Annotated[Path, typer.Option(help="The folder for compare.json and compare.html.")] = Path(
        "manyheads-compare"
    ),
    repeats: Annotated[int, typer.Option(help="Timed runs of each speed.")] = 3,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda if there is one].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [float32 on a CPU, else the model's own].")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [torch's choice].")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run measured.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page when it is done.")] = False,
) -> None:
    """Run a model with many attentions and cache policies on a text: what each one gains and what it loses."""
    import torch

    from manyheads.evaluate import compare as job
    from manyheads.evaluate import report

    report.require()
    if threads is not None:
        torch.set_num_threads(threads)
    page = out / "compare.html"
    latest: dict[str, Any] = {}
    try:
        with _watching() as watch:

            def keep(progress: job.Progress) -> None:
                latest.update(progress.results)
                watch(progress)

            results = job.run(
                text, model=model, mechanisms=mechanisms, context=context, out=out, repeats=repeats, seed=seed,
                device=device, dtype=dtype, fresh=fresh, watch=keep,
            )  # fmt: skip
    except KeyboardInterrupt:
        if latest.get("rows"):  # what is there may be looked at
            typer.echo(f"so far: {report.write(latest, page)}", err=True)
        raise
    report.write(results, page)
    console = make_console()
    console.print(_results_table(results, console.width))
    if results.get("untrained"):
        console.print()
        console.print(_untrained_table(results))
    console.print()
    console.print(bold(results.get("answer") or ""))
    typer.echo(f"\n{page}\n{out / 'compare.json'}")
    if open_page:
        typer.launch(page.resolve().as_uri())


@contextmanager
def _watching() -> Iterator[Callable[[Any], None]]:
    """Show the table as it fills in, above a bar with the time left; without a terminal, a line for each row."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        yield _lines()
        return
    from rich.console import Group as Stack
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        "left",
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task("reading the text and the model", total=None)

    with Live(bar, console=console, refresh_per_second=8, transient=True) as live:

        def watch(progress: Any) -> None:
            if bar.tasks[0].total is None:  # what an earlier run did says nothing about the time left
                bar.reset(task, total=progress.total, completed=progress.done)
            words = f"{progress.row}: {progress.step}" if progress.step else progress.row or "done"
            bar.update(task, completed=progress.done, description=words)
            live.update(Stack(_results_table(progress.results, console.width), bar))

        yield watch


def _lines() -> Callable[[Any], None]:
    """A line for each row that is finished, as for a log."""
    told: set[str] = set()

    def watch(progress: Any) -> None:
        for row in [*progress.results.get("rows", []), *progress.results.get("untrained", [])]:
            if row["spec"] not in told:
                told.add(row["spec"])
                ratio = ((row.get("quality") or {}).get("perplexity_ratio")) or None
                what = row.get("error") or (f"perplexity × {ratio:.3f}" if ratio else "measured")
                typer.echo(f"[{progress.done}/{progress.total}] {row['spec']}: {what}", err=True)

    return watch


def _results_table(results: dict[str, Any], width: int) -> Any:
    """The summary table of the page, in the terminal: what must give way to the width is the first column."""
    from rich.console import Group as Stack
    from rich.table import Table

    from manyheads.evaluate import report

    wide = width >= 100
    keys = [key for key, *_ in report.COLUMNS if wide or key not in ("density", "mass")]
    heads = {key: head for key, head, *_ in report.COLUMNS}
    table = Table(box=None, header_style="dim", padding=(0, 2 if wide else 1, 0, 0), pad_edge=False)
    table.add_column("attention", overflow="fold", min_width=14)
    table.add_column("memory", no_wrap=True)
    for key in keys:
        table.add_column(heads[key], justify="right", no_wrap=True)
    failed = []
    for row in report.table(results):
        if row["error"]:
            failed.append(f"{row['spec']}: {row['error']}")
            continue
        cells = []
        for cell in row["cells"]:
            if cell["key"] not in keys:
                continue
            text = cell["text"]
            if cell["key"] == "perplexity" and cell["below"]:
                text = f"{text} {cell['below']}" if wide else cell["below"]
            cells.append(bold(text) if cell["best"] else text)
        table.add_row(row["spec"], row["label"], *cells)
    return Stack(table, *failed)


def _untrained_table(results: dict[str, Any]) -> Any:
    from manyheads.evaluate import report

    table = make_table("needs training", "one layer", "first token", "decoding", "cache or state")
    for row in report.untrained(results):
        table.add_row(row["title"], *(cell["text"] for cell in row["cells"]))
    return table
