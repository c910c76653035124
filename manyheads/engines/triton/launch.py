"""From a form and its inputs to launches: block sizes, lists of tiles, and the autograd function."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from manyheads.core.expressions import EMPTY, FULL, PARTIAL, Program
from manyheads.core.forms import Scores
from manyheads.core.inputs import Inputs, Positions
from manyheads.core.tiling import position_operands
from manyheads.engines.triton import backward, forward, hopper

TINY = 1e-6  # a scale below which dividing by it might overflow
INTERPRETED = bool(knobs.runtime.interpret)


class Block(NamedTuple):
    """A tile of scores, and how a kernel is compiled for it."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 3


# By kernel, chip (the major compute capability, "" for any other), bytes of a number and padded head_dim.
BLOCKS: dict[tuple[str, str, int, int], Block] = {
    ("forward", "9", 2, 32): Block(128, 128, 8, 3),
    ("forward", "9", 2, 64): Block(128, 128, 8, 3),
    ("forward", "9", 2, 128): Block(128, 64, 8, 3),
    ("forward", "9", 2, 256): Block(128, 32, 8, 2),
    ("keys", "9", 2, 32): Block(64, 128, 8, 3),
    ("keys", "9", 2, 64): Block(64, 128, 8, 3),
    ("keys", "9", 2, 128): Block(64, 128, 8, 2),
    ("keys with score", "9", 2, 128): Block(32, 128, 8, 2),
    ("keys", "9", 2, 256): Block(32, 64, 8, 2),
    ("queries", "9", 2, 32): Block(128, 128, 8, 2),
    ("queries", "9", 2, 64): Block(128, 64, 8, 3),
    ("queries", "9", 2, 128): Block(128, 64, 8, 2),
    ("queries", "9", 2, 256): Block(128, 32, 8, 2),
    ("forward", "", 2, 32): Block(128, 64, 4, 3),
    ("forward", "", 2, 64): Block(128, 64, 4, 3),
    ("forward", "", 2, 128): Block(128, 32, 8, 2),
    ("forward", "", 2, 256): Block(64, 32, 8, 1),
    ("keys", "", 2, 32): Block(64, 64, 4, 2),
    ("keys", "", 2, 64): Block(64, 64, 4, 2),
    ("keys", "", 2, 128): Block(32, 64, 8, 1),
    ("keys", "", 2, 256): Block(32, 32, 8, 1),
    ("queries", "", 2, 32): Block(64, 64, 4, 2),
    ("queries", "", 2, 64): Block(64, 64, 4, 2),
    ("queries", "", 2, 128): Block(64, 32, 8, 1),
    ("queries", "", 2, 256): Block(32, 32, 8, 1),
    # Without tensor cores, a product is unrolled: large tiles take minutes to compile.
    ("forward", "", 4, 64): Block(32, 32, 4, 1),
    ("forward", "", 4, 256): Block(16, 16, 4, 1),
    ("keys", "", 4, 64): Block(32, 32, 4, 1),
    ("keys", "", 4, 256): Block(16, 16, 4, 1),
    ("queries", "", 4, 64): Block(32, 32, 4, 1),
    ("queries", "", 4, 256): Block(16, 16, 4, 1),
}


@cache
def block(kernel: str, chip: str, size: int, head_dim: int, scored: bool) -> Block:
    """The table's entry of the smallest head_dim that is not exceeded, a chip's own before the others'. Score functions
    have one of their own where they need registers that the ordinary one has not left."""
    for own in dict.fromkeys((chip, "")):
        for limit in (32, 64, 128, 256):
            names = (f"{kernel} with score", kernel) if scored else (kernel,)
            found = next((BLOCKS[name, own, size, limit] for name in names if (name, own, size, limit) in BLOCKS), None)
            if head_dim <= limit and found is not None:
                return found
    raise KeyError((kernel, chip, size, head_dim))


@cache
def chip_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return ""
    major = str(torch.cuda.get_device_capability(device)[0])
    return major if any(chip == major for _, chip, _, _ in BLOCKS) else ""


def padded(head_dim: int) -> int:
    """To a power of two, and to what a product takes at the least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


# ---- lists of tiles ----


class Lists(NamedTuple):
    """For each row of tiles those to visit, partial ones first. counts [batch | 1, heads | 1, rows, 2] of partial and
    full ones; tiles [batch | 1, heads | 1, rows, columns]. Steps in rows from one batch and head to the next."""

    counts: Tensor
    tiles: Tensor
    batch_step: int
    head_step: int


def lists_of(found: Tensor) -> Lists:
    """From a map of tiles, without waiting for the device."""
    rank = torch.where(found == EMPTY, 2, torch.where(found == FULL, 1, 0)).to(torch.uint8).contiguous()
    order = rank.argsort(dim=-1, stable=True).to(torch.int32)
    counts = torch.stack([(rank == 0).sum(-1), (rank == 1).sum(-1)], -1).to(torch.int32)
    batch, heads, rows, _ = found.shape
    return Lists(counts, order, heads * rows if batch > 1 else 0, rows if heads > 1 else 0)


class Kept:
    """Lists by what they depend on, the latest used; no more than so many and so large."""

    def __init__(self, sets: int = 64, elements: int = 2**26):
        self.sets, self.elements = sets, elements
        self.found: OrderedDict[tuple[Any, ...], tuple[Lists, Any]] = OrderedDict()
        self._lock = threading.Lock()  # backward passes have threads of their own

    def get(self, key: tuple[Any, ...]) -> Lists | None:
        with self._lock:
            if key not in self.found:
                return None
            self.found.move_to_end(key)
            return self.found[key][0]

    def put(self, key: tuple[Any, ...], lists: Lists, alive: Any) -> None:
        """`alive` stays so as long as the lists do."""
        with self._lock:
            self.found[key] = lists, alive
            while len(self.found) > 1 and (len(self.found) > self.sets or self._size() > self.elements):
                self.found.popitem(last=False)

    def _size(self) -> int:
        return sum(lists.tiles.numel() for lists, _ in self.found.values())


KEPT = Kept()


# ---- kernels ----

FIXED = ("list_b", "list_h", "q_start", "kv_start", "q_len", "kv_len", "heads")  # compile nothing anew
FUNCTIONS = ("mask", "score", "dscore")


def kernel_of(kernel: Any, functions: tuple[str, ...], call: Call) -> tuple[Any, tuple[Any, ...]]:
    """A kernel with a program's functions in it, and their arguments, which stand behind the kernel's own."""
    outputs = functions if call.program.has_score else ("mask",)  # a derivative that is 1 is left out
    source = call.program.source("triton", outputs, call.length)
    key = source.text, kernel.fn
    if key not in _ENTRIES:
        _ENTRIES[key] = source.entry(
            f"{kernel.fn.__module__}:{kernel.fn.__name__}", parameters(kernel), functions, FIXED
        )
    return _ENTRIES[key], source.arguments(call.device, **call.operands)


def parameters(kernel: Any) -> list[str]:
    """A kernel's own, with their annotations; not what an entry gives it."""
    given = {"A", *map(str.upper, FUNCTIONS)}
    return [
        f"{name}: tl.constexpr" if "constexpr" in str(p.annotation) else name
        for name, p in signature(kernel.fn).parameters.items()
        if name not in given
    ]


_ENTRIES: dict[tuple[str, Any], Any] = {}


# ---- a call ----


@dataclass(eq=False, slots=True)
class Call:
    """All of a call but q, k and v: what its forward and its backward pass share."""

    program: Program
    operands: Mapping[str, Tensor]
    signed: bool
    scale: float
    q_positions: Positions
    kv_positions: Positions
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    device: torch.device
    size: int
    own: dict[tuple[tuple[int, int], bool], Lists] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return isinstance(self.q_positions, Tensor) or isinstance(self.kv_positions, Tensor)

    @property
    def folded(self) -> bool:
        """Scores are products alone, so that the scale may wait for the exponential."""
        return not self.program.has_score and not self.signed and self.scale > TINY

    @property
    def length(self) -> int:
        """Positions are below it: one of few, as each has its own kernels."""
        ends = [p.stop if isinstance(p, range) else 0 for p in (self.q_positions, self.kv_positions)]
        return 2**20 if max(*ends, self.kv_len) <= 2**20 else 2**30

    def block(self, kernel: str) -> Block:
        head_dim = padded(max(self.head_dim, self.v_head_dim))
        return block(kernel, chip_of(self.device), self.size, head_dim, self.program.has_score or self.signed)

    def lists(self, block: Block, transposed: bool = False) -> Lists:
        tile = block.queries, block.keys
        if (tile, transposed) in self.own:
            return self.own[tile, transposed]
        key = self._lists_key(tile, transposed)
        lists = None if key is None else KEPT.get(key)
        if lists is None:
            lists = self._lists(tile, transposed)
            if key is not None:
                KEPT.put(key, lists, self.program.tensors)
        self.own[tile, transposed] = lists
        return lists

    def _lists(self, tile: tuple[int, int], transposed: bool) -> Lists:
        found = self.program.tiles(
            self.q_positions, self.kv_positions, tile, self.batch, self.heads, device=self.device, **self.operands
        )
        # Tiles that stick out are partial: bounds count as a mask.
        if self.q_len % tile[0]:
            found[..., -1, :] = found[..., -1, :].clamp(max=PARTIAL)
        if self.kv_len % tile[1]:
            found[..., -1] = found[..., -1].clamp(max=PARTIAL)
        return lists_of(found.mT if transposed else found)

    def _lists_key(self, tile: tuple[int, int], transposed: bool) -> tuple[Any, ...] | None:
        """What the tile map depends on; None if that is not known by name."""
        if self.ragged or any(t.is_inference() for t in self.program.tensors):
            return None
        if self.operands and self.program.mask_reads_operands:
            return None
        tensors = tuple((id(t), t._version) for t in self.program.tensors)
        depends = self.program.mask_depends
        return (
            self.program.key, self.program.numbers, tensors, self.q_positions, self.kv_positions,
            self.batch if "b" in depends else 1, self.heads if "h" in depends else 1, tile, transposed, self.device,
        )  # fmt: skip


def attend(form: Scores, x: Inputs) -> tuple[Tensor, Tensor]:
    if not (x.q.numel() and x.k.numel() and x.v.numel()):
        lse = torch.full(x.q.shape[:3], -torch.inf, device=x.q.device)
        return x.nothing(), lse
    if x.q.device.type == "cuda" and x.q.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.q.device):
            return attend(form, x)
    call = Call(
        form.program, position_operands(form, x), form.normaliser == "signed", x.scale,
        _flat(x.q_positions), _flat(x.kv_positions), x.batch, x.heads, x.kv_heads, x.q_len, x.kv_len, x.q.shape[3],
        x.v_head_dim, x.q.device, x.q.element_size(),
    )  # fmt: skip
    q, k, v = _rows(x.q), _rows(x.k), _rows(x.v)
    fast = hopper.why_not(form, x) is None

    def first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return hopper.run(form, x.with_(q=q, k=k, v=v)) if fast else run_forward(q, k, v, call)

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attend.apply(q, k, v, call, first)  # type: ignore[return-value]
    return first(q, k, v)


First = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # a forward pass


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, first: First) -> tuple[Tensor, Tensor]:
        o, lse = first(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if do is None and dlse is None:
            return None, None, None, None, None
        do = torch.zeros_like(o) if do is None else do
        return *run_backward(q, k, v, o, lse, do, dlse, ctx.call, ctx.needs_input_grad), None, None


def run_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    block = call.block("forward")
    o = _like(q, call.v_head_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kernel, arguments = kernel_of(forward.forward, ("mask", "score"), call)
    counts, tiles, batch_step, head_step = call.lists(block)
    kernel[(cdiv(call.q_len, block.queries) * call.batch * call.heads,)](
        q, k, v, o, lse, *_at(call, lse), counts, tiles, *_steps(q), *_steps(k), *_steps(v), *_steps(o),
        *_at_steps(call), batch_step, head_step, _start(call.q_positions), _start(call.kv_positions), call.q_len,
        call.kv_len, call.heads, call.heads // call.kv_heads, call.scale, call.signed, call.folded,
        *_constants(call, block), *arguments, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return o, lse


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, call: Call,
    needed: tuple[bool, ...] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    do = _rows(do)
    delta = torch.empty_like(lse)
    tiles_of_rows = 64
    dlse_steps = (0, 0, 0) if dlse is None else dlse.stride()
    sums: Any = backward.delta
    sums[(cdiv(call.q_len, tiles_of_rows) * call.batch * call.heads,)](
        o, do, lse if dlse is None else dlse, delta, *_steps(o), *_steps(do), *dlse_steps, call.q_len, call.heads,
        HAS_DLSE=dlse is not None, DV=call.v_head_dim, PV=padded(call.v_head_dim), BM=tiles_of_rows,
    )  # fmt: skip
    functions = ("mask", "score", "dscore")
    rest = (
        _start(call.q_positions), _start(call.kv_positions), call.q_len, call.kv_len, call.heads,
        call.heads // call.kv_heads, call.scale, call.signed, call.folded,
    )  # fmt: skip
    dq = dk = dv = None
    if needed[1] or needed[2]:
        block = call.block("keys")
        kernel, arguments = kernel_of(backward.keys, functions, call)
        dk, dv = _rows(torch.empty_like(k)), _rows(torch.empty_like(v))
        counts, tiles, batch_step, head_step = call.lists(block, transposed=True)
        kernel[(cdiv(call.kv_len, block.keys) * call.batch * call.kv_heads,)](
            q, k, v, do, lse, delta, dk, dv, *_at(call, lse), counts, tiles, *_steps(q), *_steps(k), *_steps(v),
            *_steps(do), *_steps(dk), *_steps(dv), *_at_steps(call), batch_step, head_step, *rest,
            *_constants(call, block), *arguments, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if needed[0]:
        block = call.block("queries")
        kernel, arguments = kernel_of(backward.queries, functions, call)
        dq = _rows(torch.empty_like(q))
        counts, tiles, batch_step, head_step = call.lists(block)
        kernel[(cdiv(call.q_len, block.queries) * call.batch * call.heads,)](
            q, k, v, do, lse, delta, dq, *_at(call, lse), counts, tiles, *_steps(q), *_steps(k), *_steps(v),
            *_steps(do), *_steps(dq), *_at_steps(call), batch_step, head_step, *rest,
            *_constants(call, block), *arguments, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk, dv


def _constants(call: Call, block: Block) -> tuple[Any, ...]:
    """From Q_GIVEN on, in the kernels' order."""
    return (
        isinstance(call.q_positions, Tensor), isinstance(call.kv_positions, Tensor), call.head_dim,
        call.v_head_dim, padded(call.head_dim), padded(call.v_head_dim), block.queries, block.keys, INTERPRETED,
    )  # fmt: skip


def _at(call: Call, placeholder: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that are tensors."""
    q, kv = call.q_positions, call.kv_positions
    return q if isinstance(q, Tensor) else placeholder, kv if isinstance(kv, Tensor) else placeholder


def _at_steps(call: Call) -> tuple[int, int]:
    q, kv = call.q_positions, call.kv_positions
    return q.stride(0) if isinstance(q, Tensor) else 0, kv.stride(0) if isinstance(kv, Tensor) else 0


def _start(positions: Positions) -> int:
    return positions.start if isinstance(positions, range) else 0


def _steps(t: Tensor) -> tuple[int, ...]:
    return t.stride()[:3]


def _rows(t: Tensor) -> Tensor:
    """Rows of numbers that lie side by side."""
    return t if t.stride(3) == 1 else t.contiguous()


def _flat(positions: Positions) -> Positions:
    return positions.contiguous() if isinstance(positions, Tensor) and positions.stride(1) != 1 else positions


def _like(q: Tensor, v_head_dim: int) -> Tensor:
    """An output, laid out as the queries are."""
    return _rows(torch.empty_like(q)) if q.shape[3] == v_head_dim else q.new_empty(*q.shape[:3], v_head_dim)
