"""Gradients of what a score reads: of captured tensors and operands, added up in fixed point. The same every run.

Each number that a score reads (gradient n of a program) has a place in a tensor. A tile's ds = p (dp - delta), times
the derivative of the score by that number, is summed along the axes that the place does not depend on, and added there
to an integer, so that the order does not matter. The unit follows from a bound that is computed on the device: the sum
of all |ds| is at most m = sum over the queries of |dO_i| max |v_j| + |delta_i| (without a normaliser kv_len |dO_i| max
|v_j|), and the first of two launches finds g, the largest derivative that anybody sees. No sum exceeds m g, and it is
kept in units of less than 2^-59 m g. Each contribution loses less than one: a million of them 2^-39 m g. If m g is
infinite or NaN, no unit fits, and the gradient is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.core.inputs import Positions
from manyheads.engines.triton.backward import base_two, load_row, score_gradient, weights
from manyheads.engines.triton.forward import allowed, dot, list_of, load_tile, positions

BITS = 60  # of a sum; the rest of 64 is for the sign and for what rounding adds


def scales(
    largest: Tensor, do: Tensor, v: Tensor, delta: Tensor | None, q_positions: Positions, kv_positions: Positions
) -> Tensor:
    """What contributions are multiplied by: powers of two, or NaN where there is no bound. largest and the result:
    float32 [gradients]."""
    lengths = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)
    rows = torch.linalg.vector_norm(do, dim=-1, dtype=torch.float32).double()
    rows = rows * _present(lengths, kv_positions).amax()
    rows = rows * v.shape[2] if delta is None else rows + delta.abs()
    bound = _present(rows, q_positions).sum() * largest.double()
    exponent = (BITS - bound.log2()).floor().clamp(-120, 120)
    return torch.where(bound.isfinite(), exponent, torch.nan).exp2().float()


def _present(values: Tensor, positions: Positions) -> Tensor:
    """values [batch, heads, len], 0 where no token is: what it holds means nothing."""
    return values if not isinstance(positions, Tensor) else torch.where(positions[:, None] >= 0, values, 0.0)


@triton.jit
def add_to_tables(TABLES, SCALES, s, ds, b, h, i, j, A, GRADIENTS: tl.constexpr, PLACES: tl.constexpr):
    """One tile. What nobody sees has ds = 0, and may have any derivative."""
    for n in tl.static_range(len(GRADIENTS)):  # type: ignore[misc]  (its types are for Python)
        if TABLES[n] is not None:
            place = PLACES[n](s, b, h, i, j, A) + tl.zeros([1, 1], tl.int64)
            value = tl.where(ds == 0.0, 0.0, ds * GRADIENTS[n](s, b, h, i, j, A))
            if place.shape[0] == 1:
                value = tl.sum(value, 0, keep_dims=True)
            if place.shape[1] == 1:
                value = tl.sum(value, 1, keep_dims=True)
            units = (value * tl.load(SCALES + n)).to(tl.int64)
            tl.atomic_add(TABLES[n] + place, units, mask=units != 0, sem="relaxed")


@triton.jit
def find_largest(LARGEST, s, seen, b, h, i, j, A, GRADIENTS: tl.constexpr):
    """One tile. NaN counts as infinite."""
    for n in tl.static_range(len(GRADIENTS)):  # type: ignore[misc]  (its types are for Python)
        size = tl.abs(tl.zeros_like(s) + GRADIENTS[n](s, b, h, i, j, A))
        size = tl.where(size == size, size, float("inf"))
        tl.atomic_max(LARGEST + n, tl.max(tl.max(tl.where(seen, size, 0.0), 1), 0), sem="relaxed")


@triton.jit
def gradients(
    Q, K, V, DO, LSE, DELTA, LARGEST, SCALES, TABLES, Q_AT, KV_AT, COUNTS, LISTS, q_b, q_h, q_n, k_b, k_h, k_n, v_b,
    v_h, v_n, do_b, do_h, do_n, qat_b, kvat_b, list_b, list_h, q_start, kv_start, q_len, kv_len, heads, group, scale,
    NORMALISER: tl.constexpr, FOLDED: tl.constexpr, Q_GIVEN: tl.constexpr, KV_GIVEN: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIMULATED: tl.constexpr,
    UNIT: tl.constexpr, A, MASK: tl.constexpr, SCORE: tl.constexpr, GRADIENTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A tile of queries. With LARGEST, the largest derivatives; else what it adds to TABLES, in units of 1 / SCALES."""
    tiles = tl.cdiv(q_len, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    wide_b, wide_h, kv_h = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    first = tile * BM
    wide = first.to(tl.int64)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    x = first + rows
    q_n, k_n, v_n, do_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, do_n * UNIT
    q = load_tile(Q + (wide_b * q_b + wide_h * q_h) * UNIT + wide * q_n, q_n, rows, q_len - first, D, PD, True)
    i = positions(Q_AT + wide_b * qat_b, q_start, x, q_len, Q_GIVEN)[:, None]
    if LARGEST is None:
        do_at = DO + (wide_b * do_b + wide_h * do_h) * UNIT + wide * do_n
        do = load_tile(do_at, do_n, rows, q_len - first, DV, PV, True)
        line = bh.to(tl.int64) * q_len
        lse = base_two(LSE + line, x, q_len, True)[:, None]
        row_delta = load_row(DELTA + line, x, q_len, True)[:, None]
    KV_AT += wide_b * kvat_b
    K += (wide_b * k_b + kv_h * k_h) * UNIT
    V += (wide_b * v_b + kv_h * v_h) * UNIT
    row = b * list_b + h * list_h + tile
    list_at, partial, full = list_of(COUNTS, LISTS, row, tl.cdiv(kv_len, BN))
    for n in tl.range(0, partial + full):
        start = tl.load(list_at + n) * BN
        y = start + columns
        k = load_tile(K + start.to(tl.int64) * k_n, k_n, columns, kv_len - start, D, PD, True)
        product = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32), SIMULATED)
        j = positions(KV_AT, kv_start, y, kv_len, KV_GIVEN)[None, :]
        s = product * scale
        if LARGEST is not None:
            seen = allowed(b, h, i, j, x[:, None], y[None, :], q_len, kv_len, A, MASK, Q_GIVEN or KV_GIVEN)
            find_largest(LARGEST, s, seen, b, h, i, j, A, GRADIENTS)
        else:
            v = load_tile(V + start.to(tl.int64) * v_n, v_n, columns, kv_len - start, DV, PV, True)
            _, slope, sign = weights(
                product, lse, b, h, i, j, x[:, None], y[None, :], q_len, kv_len, scale, A, MASK, SCORE, None,
                NORMALISER, FOLDED, True, Q_GIVEN or KV_GIVEN,
            )  # fmt: skip
            ds = score_gradient(do, tl.trans(v), slope, sign, row_delta, NORMALISER, SIMULATED)
            add_to_tables(TABLES, SCALES, s, ds, b, h, i, j, A, GRADIENTS, PLACES)
