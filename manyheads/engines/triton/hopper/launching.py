"""From tensors and numbers to a launch: descriptors, positions, and a program's functions behind a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manyheads.core.expressions.source import Source
from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, Positions, as_rows
from manyheads.engines.triton import quick
from manyheads.engines.triton.hopper.names import TensorDescriptor, gl

WIDTHS = (64, 128, 256)  # of rows in a kernel: what is beyond a row's end reads as zeros
UNIT = 8  # 16 bytes, which rows must be a multiple of
NORMALISERS = {"softmax": 0, "signed": 1, "none": 2}  # as in kernels/common.py


def wide(head_dim: int) -> int:
    """The width that a kernel is compiled for."""
    return next(width for width in WIDTHS if head_dim <= width)


@dataclass(frozen=True)
class Kernel:
    """A Gluon function: its own parameters, those of them whose value must not lead to another compilation, and the
    functions of a mask and score that it takes behind them."""

    module: Any
    name: str
    own: tuple[str, ...]
    fixed: tuple[str, ...]
    functions: tuple[str, ...]

    def run(self, programs: int, own: tuple[Any, ...], source: Source | None, arguments: tuple[Any, ...]) -> None:
        if source is None:
            entry, given = getattr(self.module, self.name), (*own, None, *(None for _ in self.functions))
        else:
            entry, given = self.entry(source), (*own, *arguments)
        quick.launch(entry, programs, given, **OPTIONS)

    def entry(self, source: Source) -> Any:
        key = self.name, source.text
        if key not in _ENTRIES:
            at = f"{self.module.__name__}:{self.name}"
            _ENTRIES[key] = source.entry(at, self.own, self.functions, self.fixed)
        return _ENTRIES[key]


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_ENTRIES: dict[tuple[str, str], Any] = {}  # by kernel and text
SIZES = ("heads", "group", "q_len", "kv_len", "q_start", "kv_start", "q_at_step", "kv_at_step")
STEPS = ("table_batch", "table_head", "table_row")
DROPOUT = ("seed", "threshold", "inflation")
BLOCK_SIZES = ("QUERY_BLOCK: tl.constexpr", "KEY_BLOCK: tl.constexpr")


def source_of(form: Scores, x: Inputs, functions: tuple[str, ...]) -> Source:
    return form.program.source("gluon", functions, length_of(x))


def length_of(x: Inputs) -> int:
    """Positions are below it. Texts differ with the length: not more often than need be. Tensors of positions hold what
    is not known here."""
    ends = [2**30 if isinstance(p, Tensor) else p.stop for p in (x.q_positions, x.kv_positions)]
    return max(2**20, 1 << (max(ends) - 1).bit_length())


def places(
    positions: tuple[Positions, Positions], q_len: int, kv_len: int, device: torch.device
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, int], tuple[int, int]]:
    """Positions as kernels take them: int32 rows, or (None, None) for ranges; where ranges start; steps of the rows."""
    q, kv = positions
    if not isinstance(q, Tensor) and not isinstance(kv, Tensor):
        return (None, None), (q.start, kv.start), (0, 0)
    q, kv = (as_rows(p, device).to(device, torch.int32).contiguous() for p in positions)
    q_step, kv_step = (t.stride(0) if t.shape[0] > 1 else 0 for t in (q, kv))
    return (q, kv), (0, 0), (q_step, kv_step)


def masked(table: Any, sticks_out: bool, at: Tensor | None, cut: bool = False) -> int:
    """MASKED, as in kernels/common.py. table: of tiles, sticks_out: the last of them, at: positions, if not ranges,
    cut: as selected.cut has it."""
    if table is not None and not table.partial:
        return 2 if sticks_out else 0
    return 2 if sticks_out or at is not None or cut else int(table is not None)


def dropping(x: Inputs) -> tuple[Tensor | None, int | None, float | None]:
    """DROPOUT, the threshold as the int32 of the same bits; None without."""
    if x.dropout is None:
        return None, None, None
    threshold = x.dropout.threshold
    return x.dropout.seed, threshold - 2**32 if threshold >= 2**31 else threshold, x.dropout.inflation


def descriptor(x: Tensor, rows: int, parts: int = 1) -> quick.Box:
    """x [batch, heads, len, head_dim] in boxes of `rows` of one head; parts: of a part of them, and of 64 columns. What
    the hardware cannot step over is copied."""
    shape, strides = x.shape, x.stride()
    if 1 in shape[:3]:  # a step that is never taken may be any, and the hardware wants a multiple of 16 bytes
        strides = *(s if n > 1 else shape[3] for n, s in zip(shape[:3], strides[:3], strict=True)), strides[3]
    b, h, n, last = strides
    if last != 1 or x.data_ptr() % 16 or (b | h | n) % UNIT or not (b and h and n):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = x.stride()
    return quick.Box(x, shape, strides, kind_of((1, 1, rows // parts, wide(shape[3]) if parts == 1 else 64), x.dtype))


@cache
def kind_of(block: tuple[int, ...], dtype: torch.dtype) -> quick.Kind:
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(list(block), kinds[dtype])
    return quick.Kind(TensorDescriptor, block, layout)
