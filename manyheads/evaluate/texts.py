"""The text to measure on: the user's own, or real English that every Python carries."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class TextError(ValueError):
    """A text that cannot be had: what was given and what to do."""


@dataclass(frozen=True)
class Text:
    """A text, a name for it, and the SHA-256 of its UTF-8, so that a result says what it was measured on."""

    name: str
    content: str
    sha256: str


def read(paths: Sequence[str | Path] | str | Path | None = None) -> Text:
    """Read one text from UTF-8 files, joined in the order given; "-" is standard input.

    None gives the documentation topics of the running Python: 460,000 characters of English prose with some code.
    Its words differ a little between Python versions, which is why a result should quote `sha256`.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        return _text(f"Python {platform.python_version()} documentation topics", _topics())
    if [str(path) for path in paths].count("-") > 1:
        raise TextError('"-" is given more than once, but standard input can be read only once: give it once.')
    parts = [_one(path) for path in paths]
    return _text(" + ".join(name for name, _ in parts), "\n\n".join(content for _, content in parts))


def _text(name: str, content: str) -> Text:
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


def _topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some Linux distributions split the standard library
        raise TextError("This Python comes without its documentation topics: name a text file.") from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _one(path: str | Path) -> tuple[str, str]:
    """The name and content of one file."""
    if str(path) == "-":
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name, data = Path(path).name, _bytes(Path(path))
    shown = name if str(path) == "-" else repr(str(path))
    if b"\0" in data:
        raise TextError(
            f"{shown} is not plain text (it holds NUL bytes): give UTF-8 text, not PDF, UTF-16 or the like."
        )
    try:
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{shown} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): convert it first, "
            "for example with iconv -f latin1 -t utf-8."
        ) from error
    if not content.strip():
        raise TextError(f"{shown} is empty: give a text of some thousand words.")
    return name, content


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise TextError(f"{str(path)!r} is a folder: name the text files in it.")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TextError(
            f"There is no file {str(path)!r}: check the name, or give none for the built-in text."
        ) from error
    except OSError as error:
        raise TextError(f"{str(path)!r} cannot be read ({error.strerror}): name a file that you may read.") from error
