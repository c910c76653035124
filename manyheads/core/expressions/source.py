"""Kernel text as something to run: its arguments, its module, and the entry behind which a kernel runs it.

Kernels take the run-time arguments of masks and scores as one tuple, and the functions as constants:

    @triton.jit
    def forward(q, k, v, length, BLOCK: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr): ...

    source = program.source()
    entry = source.entry("package.module:forward", ["q", "k", "v", "length", "BLOCK: tl.constexpr"])
    entry[grid](q, k, v, length, 128, *source.arguments(device))

Triton compiles anew for an integer that is 1 or a multiple of 16, and can be told not to for an argument, but not for
what is inside of a tuple. So the entry takes them one by one.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.core.expressions.bounding import Bounder
from manyheads.core.expressions.emit import NARROW, SMALL, Argument, Writer
from manyheads.core.expressions.graph import kind_of

if TYPE_CHECKING:
    from manyheads.core.expressions import Program

OUTPUTS = ("mask", "score", "dscore", "gradients", "bounds")


@dataclass(frozen=True, eq=False)
class Source:
    """See Program.source. names: the functions in the text. signature: what `arguments` gives, in that order."""

    program: Program
    text: str
    names: tuple[str, ...]
    signature: tuple[Argument, ...]

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits: programs with equal keys share their compiled kernels."""
        return _key(self.text)

    def arguments(
        self, device: torch.device | str | None = None, /, **operands: Tensor
    ) -> tuple[Tensor | int | float, ...]:
        """What to launch with: captured tensors are moved to the device, and kept there."""
        program = self.program
        program.check(operands)
        tables = {
            a.of: program.table(a.of, operands) if isinstance(a.of, str) else program.tables.on(a.of, device)
            for a in self.signature
            if a.kind == "pointer"
        }
        for name, table in tables.items():
            _check_readable(name, table)
        ends = {name: tables[name].detach().aminmax() for name in {a.of for a in self.signature if a.kind == "least"}}
        return tuple(
            getattr(ends[a.of], _ENDS[a.kind]) if a.kind in _ENDS else self._argument(a, tables) for a in self.signature
        )

    def _argument(self, argument: Argument, tables: dict[int | str, Tensor]) -> Tensor | int | float:
        _, kind, of, dim = argument
        if kind == "pointer":
            return tables[of].detach()
        if kind == "size":
            return tables[of].shape[dim]
        if kind == "stride":
            return tables[of].stride(dim)
        value = self.program.constants[int(of)]
        if kind == "inverse":
            return 1 / value if value else math.copysign(math.inf, value)
        return float(value) if kind == "fp32" else int(value)

    def module(self) -> ModuleType:
        """The functions of the text, imported from a file in $MANYHEADS_CACHE or the folder for temporary files."""
        return _load(self.text)

    def entry(
        self, kernel: str, parameters: Sequence[str], functions: Sequence[str] = OUTPUTS[:2], fixed: Sequence[str] = ()
    ) -> Any:
        """The jitted function that `wrap` writes."""
        return _load(self.wrap(kernel, parameters, functions, fixed)).entry

    def wrap(
        self, kernel: str, parameters: Sequence[str], functions: Sequence[str] = OUTPUTS[:2], fixed: Sequence[str] = ()
    ) -> str:
        """The text, and behind it `entry`: a kernel with flat arguments, its own ones and then those of `signature`.

        kernel: "package.module:function", jitted. parameters: its own, as it declares them: "length", "BLOCK:
            tl.constexpr". Besides them it takes A, and in capitals each of `functions`: "mask", "score" and "dscore"
            are the function of that name, or None if the text has none; "gradients" and "places" are tuples of them.
        fixed: parameters whose value must not lead to another compilation.
        """
        module, _, name = kernel.partition(":")
        own = [parameter.partition(":")[0].strip() for parameter in parameters]
        repeated = {"A", *map(str.upper, functions), *(a.name for a in self.signature)} & set(own)
        if repeated:
            raise ValueError(f"{kernel} has parameters of its own called {', '.join(sorted(repeated))}")
        flat = [f"{a.name}: {_ANNOTATIONS[a.kind]!r}" if a.kind in _ANNOTATIONS else a.name for a in self.signature]
        packed = "".join(f"{a.name}, " for a in self.signature)
        passed = [*own, f"A=({packed})", *(f"{f.upper()}={self._functions(f)}" for f in functions)]
        values = [*fixed, *(a.name for a in self.signature if a.kind in _ANNOTATIONS)]
        strides = [a.name for a in self.signature if a.kind == "stride"]
        return f"""{self.text}

from {module} import {name} as kernel


@jit(do_not_specialize={values}, do_not_specialize_on_alignment={strides})
def entry({", ".join([*parameters, *flat])}):
    kernel({", ".join(passed)})
"""

    def _functions(self, what: str) -> str:
        prefix = {"gradients": "grad_", "places": "place_"}.get(what)
        if prefix is None:
            return what if what in self.names else "None"
        return f"({''.join(f'{name}, ' for name in self.names if name.startswith(prefix))})"


_ENDS = {"least": "min", "greatest": "max"}
# Of the numbers whose values lead to no compilation of their own. Strides are specialised where they are 1.
_ANNOTATIONS = {"size": "i32", "i32": "i32", "i64": "i64", "fp32": "fp32", "inverse": "fp32"}


def make_source(
    program: Program, language: str, outputs: tuple[str, ...], length: int, small: frozenset[int]
) -> Source:  # fmt: skip
    """small: the captured tensors of small integers, as in Tables."""
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise ValueError(f"no output is called {', '.join(sorted(unknown))}; there are {', '.join(OUTPUTS)}")
    if any(isinstance(n, Tensor) for n in program.numbers):
        numbers = tuple(n.item() if isinstance(n, Tensor) else n for n in program.numbers)
        program = program.rebind(numbers, program.tensors)
    if {"dscore", "gradients"} & set(outputs):
        program = program.derivative()
    numbers = tuple(int(n).bit_length() for k, n in program.constants.items() if program.graph.nodes[k].kind == "i")
    key = program.key, numbers, program.tables.narrow, language, outputs, length, small
    if key not in _WRITTEN:
        _WRITTEN[key] = _written(program, language, outputs, length, small)
    return Source(program, *_WRITTEN[key])


Written = tuple[str, tuple[str, ...], tuple[Argument, ...]]  # text, names and signature of a Source
_WRITTEN: dict[Any, Written] = {}  # by all that it depends on: a function that is traced anew has the same text


def _written(
    program: Program, language: str, outputs: tuple[str, ...], length: int, small: frozenset[int]
) -> Written:  # fmt: skip
    graph, names = program.graph, []
    writer = (Bounder if "bounds" in outputs else Writer)(program, language, length, small)
    for name, root, parameters in (
        ("mask", graph.mask, "b, h, i, j, A"),
        ("score", graph.score, "s, b, h, i, j, A"),
        ("dscore", graph.dscore, "s, b, h, i, j, A"),
    ):
        if name in outputs and root is not None:
            writer.function(name, parameters, root, tile=name == "score")
            names.append(name)
    for n, gradient in enumerate(graph.gradients if "gradients" in outputs else ()):
        writer.function(f"grad_{n}", "s, b, h, i, j, A", gradient.factor)
        writer.place(f"place_{n}", gradient.source, gradient.index)
        names += [f"grad_{n}", f"place_{n}"]
    if isinstance(writer, Bounder) and graph.mask is not None:
        writer.bounds_of_tiles(graph.mask)
        names.append("bounds")
    return writer.text(), tuple(names), writer.signature()


class Tables:
    """A program's captured tensors as kernels read them: on their device, small integers in 32 bits.

    A tensor that was changed in place is looked at again.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.narrow = frozenset(k for k, t in enumerate(tensors) if t.dtype == torch.int32)  # no more than 32 bits
        self._small: dict[int, tuple[Any, bool]] = {}
        self._copies: dict[tuple[int, torch.device], tuple[Any, Tensor]] = {}

    def small(self) -> frozenset[int]:
        """The places of integer tensors with no value beyond SMALL."""
        return frozenset(k for k in self.guesses()[1] if self._is_small(k))

    def guesses(self) -> tuple[frozenset[int], frozenset[int]]:
        """The places that are known to be small without a look, and those that may be: a look waits for the device."""
        integers = frozenset(k for k, t in enumerate(self.tensors) if kind_of(t) == "i")
        return frozenset(k for k in integers if _known_small(self.tensors[k])), integers

    def _is_small(self, place: int) -> bool:
        table = self.tensors[place]
        if _known_small(table):
            return True
        version, small = self._small.get(place, (None, False))
        if version is None or version != _version(table):
            low, high = torch.stack(table.aminmax()).tolist()
            small = low >= -SMALL and high <= SMALL
            self._small[place] = _version(table), small
        return small

    def on(self, place: int, device: torch.device | str | None) -> Tensor:
        table = self.tensors[place]
        target = table.device if device is None else torch.device(device)
        version, copy = self._copies.get((place, target), (None, table))
        if version is None or version != _version(table):
            narrow = table.dtype == torch.int64 and self._is_small(place)
            copy = table.detach().to(target, torch.int32 if narrow else table.dtype)
            self._copies[place, target] = _version(table), copy
        return copy


def _known_small(table: Tensor) -> bool:
    return table.dtype.itemsize < 4 or not table.numel()


def _version(tensor: Tensor) -> tuple[int, int] | None:
    """Changes whenever the tensor does, or gets other data; None where torch does not count."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def _check_readable(name: int | str, table: Tensor) -> None:
    what = f"operand {name!r}" if isinstance(name, str) else f"captured tensor {name}"
    if not table.numel():
        raise ValueError(f"{what} is empty: {list(table.shape)}")
    if table.ndim and max(*table.shape, (table.shape[-1] - 1) * table.stride(-1)) >= NARROW:
        raise ValueError(f"{what} is too long to be read with 32 bits: {list(table.shape)}")


_LOADED: dict[str, ModuleType] = {}
_LOADING = threading.Lock()


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(text: str) -> ModuleType:
    """The module of a text. Triton reads functions from files, so there is one."""
    name = f"manyheads_kernels_{_key(text)}"
    with _LOADING:
        if name not in _LOADED:
            path = _folder() / f"{name}.py"
            if not path.is_file() or path.read_text() != text:
                _write(path, text)
            module = ModuleType(name)
            module.__file__ = str(path)
            exec(compile(text, path, "exec"), module.__dict__)
            _LOADED[name] = sys.modules[name] = module
    return _LOADED[name]


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "kernels"
    folder = Path(os.environ.get("MANYHEADS_CACHE") or Path(tempfile.gettempdir()) / f"manyheads-{user}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whoever else is writing."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
