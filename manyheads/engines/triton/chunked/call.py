"""A call of the kernels: what all its launches share, and what is prepared once for forward and for backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from manyheads.engines.triton.blocks import cdiv, padded
from manyheads.engines.triton.chunked import hopper, tables
from manyheads.engines.triton.chunked.hopper import gradients as on_hopper
from manyheads.engines.triton.chunked.kernels.gates import CHUNKS, fades_of_channels, gates
from manyheads.engines.triton.chunked.kernels.pairs import AT_ONCE, pairs, rapid
from manyheads.engines.triton.chunked.kernels.solve import solve
from manyheads.engines.triton.launch import INTERPRETED, _rows, _steps
from manyheads.engines.triton.quick import empty, empty_like, launch, zeros

Steps = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """q, k, v: rows of numbers side by side. g: log decays [batch, heads, kv_len] or, for each channel, with head_dim
    behind; or None. beta: strengths of writes that correct, [batch, heads, kv_len], or None for those that add."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float) -> Call:
        if g is not None and g.ndim == 4 and g.stride(3) != 1:
            g = g.contiguous()
        return cls(_rows(q), _rows(k), _rows(v), g, beta, scale)

    @property
    def channels(self) -> bool:
        return self.g is not None and self.g.ndim == 4

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def group(self) -> int:
        return self.heads // self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def v_head_dim(self) -> int:
        return self.v.shape[3]

    @property
    def kv_len(self) -> int:
        return self.k.shape[2]

    @property
    def ahead(self) -> int:
        """Tokens before the first query."""
        return self.kv_len - self.q.shape[2]

    @property
    def chunk(self) -> int:
        return tables.CHUNK[self.q.element_size()]

    @property
    def even(self) -> bool:
        """Whether chunks are whole, and all of their tokens ask."""
        return not self.ahead and self.kv_len % self.chunk == 0

    @property
    def chunks(self) -> int:
        return cdiv(self.kv_len, self.chunk)

    @property
    def state(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.head_dim, self.v_head_dim

    def tile(self, kernel: str) -> tables.Tile:
        width = self.v_head_dim if kernel in ("walk", "back", "gradients") else self.head_dim
        return tables.tile(kernel, self.q.element_size(), padded(self.head_dim), width, self.channels)

    @cached_property
    def segments(self) -> int:
        if self.beta is not None and self.head_dim > tables.LARGEST:
            return 1
        programs = self.rows * cdiv(self.v_head_dim, self.tile("walk").columns)
        return tables.segments(programs, self.chunks, self.q.device, few=self.g is None and hopper.takes(self))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.kv_len, self.ahead, self.heads, self.group

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(shape, dtype, self.q.device)

    def like(self, *shape: int) -> Tensor:
        return self.new(*shape, dtype=self.q.dtype)


Solved = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Prepared:
    """q, k, k_out, ends: of single channels what kernels/pairs.py says, but that the walks of hopper/ take the call's q
    and k, and no k_out, and, without `a`, fill `ends`; else the call's q and k and g, and no k_out. g: sums of log
    decays, float32 [batch, heads, chunks * chunk], with head_dim behind where channels have their own (where
    hopper/gradients.py finds gradients, only those of fast chunks). fades: bounds of what chunks leave of a state,
    [rows, chunks + 1], where there are decays. beta: float32 [rows, chunks * chunk]. a, b, t: what pairs.py and
    solve.py leave behind, [rows, chunks, chunk, chunk]; None where nobody reads it."""

    q: Tensor
    k: Tensor | None
    k_out: Tensor | None
    ends: Tensor | None
    g: Tensor | None
    fades: Tensor | None
    beta: Tensor | None
    a: Tensor | None
    b: Tensor | None
    t: Tensor | None

    @property
    def solved(self) -> Solved:
        """What a backward pass is given of it: little, and half as much as q where writes correct. Of sums of single
        channels, the last ones."""
        return self.ends, self.fades, self.beta, self.t


def prepare(call: Call, keep: bool = True, solved: Solved | None = None, returns: bool = True) -> Prepared:
    """keep: for a backward pass. solved: if that has been prepared before. returns: whether a backward pass follows."""
    a = b = k_out = ends = None
    g, fades, beta, t = (None, None, None, None) if solved is None else solved
    q, k, length = call.q, call.k, call.chunk
    shape, tokens = (call.rows, call.chunks, length, length), (call.batch, call.heads, call.chunks * length)
    unit, steps = _steps(call.q, call.k)
    common: tuple[Any, ...] = (call.head_dim, padded(call.head_dim), length, unit, INTERPRETED)
    programs = call.rows * call.chunks
    if fades is None and call.g is not None and not call.channels:
        fades = _fades(call)
        g = call.new(*tokens)
    if call.channels and call.beta is None and solved is None and not keep and hopper.takes(call):
        ends, fades = call.new(*shape[:2], call.head_dim), _fades(call)
        ahead, per = call.segments - (not returns), cdiv(call.chunks, call.segments)
        own = call.g, fades, *steps_of(call.g), call.kv_len, call.heads, call.rows, ahead, per, *common[:2], length
        if ahead:
            launch(fades_of_channels, call.rows * ahead * per, own, num_warps=4)
    elif call.channels and solved is not None and on_hopper.takes_channels(call):
        assert g is not None, "where channels decay, ends are kept"
        ends, a, g = g, call.like(*shape), call.new(*tokens, call.head_dim)
        fast_chunks(call, ends, g, a=a)
    elif call.channels:
        fades = _fades(call)
        a, b = call.like(*shape), None if call.beta is None else call.like(*shape)
        g = call.new(*tokens, call.head_dim)
        ends = call.new(*shape[:2], call.head_dim)
        q_in = k_in = None
        if not hopper.takes(call):
            q = q_in = call.like(*call.q.shape)
            k_out = call.like(call.batch, call.heads, call.kv_len, call.head_dim)
            k = k_in = None if call.beta is None else empty_like(k_out)
        own = call.q, call.k, call.g, call.beta, g, a, b, q_in, k_in, k_out, ends, fades, *steps, *steps_of(call.g)
        tile = call.tile("pairs")
        shared = *steps_of(call.beta), *call.sizes, *common[:2], tile.columns, common[2], keep, *common[3:]
        launch(pairs, programs, (*own, *shared), **tile.options)
    if solved is None and call.beta is not None:
        t, beta = call.like(*shape), call.new(*tokens)
        known = (None, None, None) if call.channels else (call.g, g, fades)
        own = call.k, known[0], call.beta, b, t, known[1], beta, known[2], *steps[3:], *steps_of(call.g)
        tile = call.tile("solve")
        shared = *steps_of(call.beta), call.kv_len, call.heads, call.group, *common[:2], tile.columns, *common[2:]
        launch(solve, programs, (*own, *shared), **tile.options)
    elif solved is None and g is not None and not call.channels:
        own = call.g, g, fades, *steps_of(call.g), call.kv_len, call.heads, length, CHUNKS
        launch(gates, call.rows * cdiv(call.chunks, CHUNKS), own, num_warps=4)
    return Prepared(q, k, k_out, ends if call.channels else g, g, fades, beta, a, b, t)


def fast_chunks(
    call: Call, ends: Tensor, sums: Tensor | None, *, a: Tensor | None = None, o: Tensor | None = None
) -> None:
    """A of those that decay fast, with their sums; or what it adds to o."""
    out = call.v if o is None else o
    unit, steps = _steps(call.q, call.k, call.v, out)
    total, tile = call.rows * call.chunks, call.tile("pairs")
    programs = cdiv(total, AT_ONCE)
    sums = call.new(programs, call.chunk, call.head_dim) if sums is None else sums
    arguments = (
        call.q, call.k, call.v, call.g, sums, a, o, ends, *steps, *steps_of(call.g), total, *call.sizes, call.scale,
        call.head_dim, padded(call.head_dim), call.v_head_dim, min(call.chunk, padded(call.v_head_dim)), tile.columns,
        call.chunk, AT_ONCE, unit, INTERPRETED,
    )  # fmt: skip
    launch(rapid, programs, arguments, **tile.options)


def _fades(call: Call) -> Tensor:
    return zeros((call.rows, call.chunks + 1), torch.float32, call.q.device)


def steps_of(t: Tensor | None) -> Steps:
    """From one batch, head and token to the next."""
    return (0, 0, 0) if t is None else t.stride()[:3]
