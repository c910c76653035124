"""The command line: `manyheads compare`, `ls`, `show`, `doctor`."""

from __future__ import annotations

import dis
import errno
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from manyheads.cli import compare, doctor, ls
from manyheads.cli.printing import sentence

# What is imported by a command is imported in it, so that `manyheads ls` waits for torch and for nothing else.


class Group(TyperGroup):
    """Commands whose expected errors are one sentence and an exit code, and whose bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _leave("stopped; run the same command to go on", 130)
        except Exception as error:
            if ctx.params.get("debug") or not expected(error):
                raise
            _leave(sentence(error), 2)


def expected(error: Exception) -> bool:
    """Whether an error is about what was given, or about the machine, rather than a bug of ours.

    The first kind is thrown by a `raise` statement of this package. When our own code is wrong, errors of the same
    types and with sentences as good come out of torch, or of Python on a line of ours, as `int(None)` does; those keep
    their traceback. So the innermost frame must be one of ours and must have stopped at a `raise`; its bytecode says
    so wherever the statement stands and whether or not the source is there.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EPIPE)  # `manyheads ls | head` is typer's own affair
    innermost = error.__traceback__
    if innermost is None or not isinstance(error, ValueError | TypeError | KeyError | NotImplementedError):
        return False
    while innermost.tb_next:
        innermost = innermost.tb_next
    ours = innermost.tb_frame.f_globals.get("__name__", "").split(".")[0] == "manyheads"
    code = innermost.tb_frame.f_code.co_code
    return ours and code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _leave(words: str, code: int) -> NoReturn:
    typer.echo(f"manyheads: {words}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


for command in (ls.ls, ls.show, doctor.doctor, compare.compare):
    app.command()(command)
