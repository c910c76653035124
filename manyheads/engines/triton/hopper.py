"""Hopper GPUs: the forward pass of hopper_kernel. Which tiles of keys a tile of queries needs is a table on the device.

table = lists(program.tiles(..., tile=(QUERIES, TILINGS[head_dim].keys)), kv_len) or ranges(...), or None for all
o, lse = forward(q, k, v, scale=scale, source=source, table=table)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core.expressions import EMPTY, FULL, Program
from manyheads.core.expressions.source import Source
from manyheads.core.forms import Form, Scores
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import position_operands

try:
    from manyheads.engines.triton import hopper_kernel
    from manyheads.engines.triton.hopper_names import TensorDescriptor, gl
except (ImportError, AttributeError) as error:  # no triton, or one that renamed something
    hopper_kernel, MISSING = None, f"this Triton has no Gluon for Hopper that is known here ({error})"
else:
    MISSING = None

QUERIES = 128  # in a tile: two warp groups of 64
EVERY, RANGES, LISTS = 0, 1, 2  # kinds of tables, as in hopper_kernel


class Tiling(NamedTuple):
    """keys: in a tile. stages: tiles of keys, and of values, that are in shared memory at a time."""

    keys: int
    stages: int


# By head_dim.
TILINGS = {64: Tiling(128, 4), 128: Tiling(128, 2), 256: Tiling(64, 2)}


class Table(NamedTuple):
    """values: int32 [batch | 1, heads | 1, query tiles, n], see `ranges` and `lists`."""

    kind: int
    values: Tensor

    def to(self, device: torch.device) -> Table:
        return Table(self.kind, self.values.to(device, non_blocking=True))


def why_not(form: Form, x: Inputs) -> str | None:
    """Why `run` cannot take it. It gives o and the lse, and no gradients."""
    if MISSING:
        return MISSING
    if not isinstance(form, Scores):
        return f"the Hopper kernel has no {type(form).__name__}"
    if form.normaliser != "softmax":
        return f"the Hopper kernel has no {form.normaliser!r} normaliser"
    if x.q.device.type != "cuda" or torch.version.hip or _capability(x.q.device) != 9:
        return "the Hopper kernel needs a GPU of compute capability 9"
    if x.q.dtype not in (torch.bfloat16, torch.float16) or not x.q.dtype == x.k.dtype == x.v.dtype:
        return f"the Hopper kernel takes bfloat16 and float16, not {x.q.dtype}"
    if x.q.shape[3] not in TILINGS:
        return f"the Hopper kernel has head dimensions {', '.join(map(str, TILINGS))}, not {x.q.shape[3]}"
    if x.v_head_dim != x.q.shape[3]:
        return f"the Hopper kernel needs values as wide as keys, not {x.v_head_dim} and {x.q.shape[3]}"
    if not all(isinstance(p, range) and p.step == 1 for p in (x.q_positions, x.kv_positions)):
        return "the Hopper kernel needs rows without absent tokens, at consecutive positions"
    return None


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# ---- tables ----


def ranges(tiles: Tensor, kv_len: int, keys: int) -> Table:
    """From a map of tiles [batch | 1, heads | 1, query tiles, key tiles]: lo, hi, f0, f1 for each tile of queries.

    The key tiles lo to hi - 1 hold all that are needed; the longest run of full ones is f0 to f1 - 1, and the mask
    looks at all others, empty ones among them. Computed where the map lies, without waiting for it.
    """
    needed, full = _needed(tiles, kv_len, keys)
    at = torch.arange(tiles.shape[-1], device=tiles.device)
    hi = torch.where(needed, at + 1, 0).amax(-1)
    lo = torch.minimum(torch.where(needed, at, tiles.shape[-1]).amin(-1), hi)
    length, last = (at - torch.where(full, -1, at).cummax(-1).values).max(-1)
    return Table(RANGES, torch.stack([lo, hi, last + 1 - length, last + 1], -1).int().contiguous())


def lists(tiles: Tensor, kv_len: int, keys: int) -> Table:
    """From a map of tiles: for each tile of queries the number of key tiles it needs, then 2 * tile + (0 if it is
    full) for each of them in ascending order, then 1s. Computed where the map lies, without waiting for it."""
    needed, full = _needed(tiles, kv_len, keys)
    at = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32)
    far = 2 * tiles.shape[-1] + 2
    entries = torch.where(needed, 2 * at + (~full).int(), far).sort(-1).values
    entries = torch.where(entries == far, 1, entries)
    return Table(LISTS, torch.cat([needed.sum(-1, keepdim=True), entries], -1).int().contiguous())


def table(tiles: Tensor, kv_len: int, keys: int) -> Table:
    """Ranges where the needed tiles of every row are one run, else lists. A map on a GPU is not waited for: lists."""
    if tiles.device.type == "cpu":
        found = ranges(tiles, kv_len, keys)
        lo, hi = found.values[..., 0], found.values[..., 1]
        if int((hi - lo).sum()) == int((tiles != EMPTY).sum()):
            return found
    return lists(tiles, kv_len, keys)


def _needed(tiles: Tensor, kv_len: int, keys: int) -> tuple[Tensor, Tensor]:
    full = tiles == FULL
    if kv_len % keys:  # the last tile sticks out of the keys: the mask must look at it
        full[..., -1] = False
    return tiles != EMPTY, full


# ---- launching ----

_ENTRIES: dict[str, Any] = {}  # by text
_TABLES: OrderedDict[tuple[Any, ...], tuple[Table, Any]] = OrderedDict()  # beside a table what it was made of
KEPT = 64  # tables


def run(form: Scores, x: Inputs, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse), without gradients."""
    program, device = form.program, x.q.device
    tiling = tiling or TILINGS[x.q.shape[3]]
    if not (program.has_mask or program.has_score):
        return forward(x.q, x.k, x.v, scale=x.scale, tiling=tiling)
    assert isinstance(x.q_positions, range) and isinstance(x.kv_positions, range), "why_not said so"
    operands = position_operands(form, x)
    source = program.source("gluon", ("mask", "score"), length=_length(max(x.q_positions.stop, x.kv_positions.stop)))
    return forward(
        x.q, x.k, x.v, scale=x.scale, source=source, arguments=source.arguments(device, **operands),
        table=_table_of(program, x, tiling.keys, operands), tiling=tiling,
        q_start=x.q_positions.start, kv_start=x.kv_positions.start,
    )  # fmt: skip


def _length(positions: int) -> int:
    """Texts differ with the length: not more often than need be."""
    return max(2**20, 1 << (positions - 1).bit_length())


def _table_of(program: Program, x: Inputs, keys: int, operands: dict[str, Tensor]) -> Table | None:
    if not program.has_mask or not x.q_len or not x.kv_len:
        return None

    def make() -> Table:
        tile, at = (QUERIES, keys), (x.q_positions, x.kv_positions)
        tiles = program.tiles(*at, tile=tile, batch=x.batch, heads=x.heads, device=None, **operands)
        return table(tiles, x.kv_len, keys).to(x.q.device)

    tensors, numbers = program.tensors, program.numbers
    if (
        any(isinstance(n, Tensor) for n in numbers)
        or any(t.is_inference() for t in tensors)
        or (operands and program.mask_reads_operands)
    ):
        return make()
    versions = tuple((id(t), t._version) for t in tensors)
    key = program.key, numbers, versions, x.q_positions, x.kv_positions, x.batch, x.heads, keys, x.q.device
    if key in _TABLES:
        _TABLES.move_to_end(key)
    else:
        _TABLES[key] = make(), tensors
        if len(_TABLES) > KEPT:
            _TABLES.popitem(last=False)
    return _TABLES[key][0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    source: Source | None = None,
    arguments: tuple[Any, ...] = (),
    table: Table | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """o [batch, heads, q_len, head_dim] in q's dtype and the natural lse in float32: 0 and -inf for a query that sees
    nothing.

    source: Gluon functions mask and score; arguments: what they read, from source.arguments(device, ...).
    table: which tiles the mask needs, for tiles of QUERIES by tiling.keys; None if there is no mask.
    q_start, kv_start: the positions of the first query and the first key.
    """
    assert hopper_kernel is not None, MISSING
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    o = torch.empty(batch, heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return o.zero_(), lse.fill_(-math.inf)
    names = source.names if source is not None else ()
    if ("mask" in names) != (table is not None):
        raise ValueError("a mask needs a table of its tiles, and a table a mask")
    if scale <= 0 and "score" not in names:  # a masked score is -inf, and must be after scaling
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    keys, stages = tiling or TILINGS[head_dim]
    kind, values = table or (EVERY, lse)
    steps = (0, 0, 0) if table is None else _steps(values, (batch, heads, -(-q_len // QUERIES), -(-kv_len // keys)))
    own = (
        _descriptor(q, QUERIES // 2), _descriptor(k, keys), _descriptor(v, keys),
        _descriptor(o, QUERIES // 2), lse, values, *steps, heads, heads // kv_heads, q_len, kv_len,
        q_start, kv_start, float(scale), stages, kind, table is not None or kv_len % keys != 0,
    )  # fmt: skip
    grid = (-(-q_len // QUERIES) * heads * batch,)
    with torch.cuda.device_of(q):
        if source is None:
            hopper_kernel.attend[grid](*own, None, None, None, num_warps=4)
        else:
            _entry(source)[grid](*own, *arguments, num_warps=4)
    return o, lse


# What must not lead to another compilation when its value changes, and the kernel's own parameters.
FIXED = (
    "table_batch", "table_head", "table_row", "heads", "group", "q_len", "kv_len", "q_start", "kv_start",
)  # fmt: skip
OWN = (
    "q_desc", "k_desc", "v_desc", "o_desc", "lse", "table", *FIXED, "scale",
    "STAGES: tl.constexpr", "KIND: tl.constexpr", "MASKED: tl.constexpr",
)  # fmt: skip


def _entry(source: Source) -> Any:
    assert hopper_kernel is not None, MISSING
    if source.text not in _ENTRIES:
        _ENTRIES[source.text] = source.entry(f"{hopper_kernel.__name__}:attend", OWN, ("mask", "score"), FIXED)
    return _ENTRIES[source.text]


def _steps(values: Tensor, shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Strides of a table, 0 where it is shared."""
    batch, heads, rows, _ = values.shape
    if batch not in (1, shape[0]) or heads not in (1, shape[1]) or rows != shape[2] or not values.is_contiguous():
        raise ValueError(f"a table of {list(values.shape)} does not fit {shape[0]} x {shape[1]} heads, {shape[2]} rows")
    return (values.stride(0) if batch > 1 else 0), (values.stride(1) if heads > 1 else 0), values.stride(2)


def _descriptor(x: Tensor, rows: int) -> Any:
    """x [batch, heads, len, head_dim] in boxes of `rows` of one head. What the hardware cannot step over is copied."""
    shape = list(x.shape)
    unit = 16 // x.element_size()
    strides = [s if n > 1 else shape[3] for n, s in zip(shape[:3], x.stride()[:3], strict=True)]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(s % unit or not s for s in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    block = [1, 1, rows, shape[3]]
    return TensorDescriptor(x, shape, [*strides, 1], block, _layout(rows, shape[3], x.dtype))


@cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], kind)
