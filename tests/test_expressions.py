"""Masks and scores as programs: equal to the plain functions, tiles sound and tight, keys stable, errors clear."""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.core.expressions import EMPTY, FULL, PARTIAL, Program, TraceError, trace
from manyheads.core.expressions.ops import interval_of

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 256, 16


# ---- cases ----


def masks(length: int = LENGTH, width: int = WIDTH) -> dict:
    """Masks of all the kinds there are. Each closes over numbers or tensors."""
    g = torch.Generator().manual_seed(0)
    document = torch.randint(0, 5, (length,), generator=g).sort().values.int()
    other = torch.randint(0, 3, (length,), generator=g).sort().values.int()
    documents = torch.stack([document, other])
    identity = torch.randint(0, 4, (length,), generator=g)
    prefix = torch.randint(1, length, (length,), generator=g)
    row_prefix = torch.tensor([length // 3, length // 2])
    head_window = torch.tensor([8, 64, length // 2, length])
    window, sink, radius, dilation, chunk, block = length // 8, 4, 3, 4, 96, 32
    table = torch.rand(HEADS, length // block, length // block, generator=g) < 0.3
    keep = torch.arange(length) % 5 != 0
    height = length // width
    return dict(
        causal=lambda b, h, i, j: j <= i,
        window=lambda b, h, i, j: (j <= i) & (i - j < window),
        window_chained=lambda b, h, i, j: 0 <= i - j < window,
        sink_window=lambda b, h, i, j: (j <= i) and (i - j < window or j < sink),
        document=lambda b, h, i, j: document[i] == document[j],
        document_causal_batched=lambda b, h, i, j: (documents[b, i] == documents[b][j]) & (i >= j),
        random_ids=lambda b, h, i, j: identity[i] == identity[j],
        prefix_of_row=lambda b, h, i, j: j < prefix[i],
        prefix_lm=lambda b, h, i, j: (j <= i) | (j < row_prefix[b]),
        block_causal=lambda b, h, i, j: i // chunk >= j // chunk,
        natten_2d=lambda b, h, i, j: (abs(i // width - j // width) <= radius) & (abs(i % width - j % width) <= radius),
        natten_2d_clamped=lambda b, h, i, j: (
            ((j // width - (i // width).clamp(radius, height - 1 - radius)).abs() <= radius)
            & ((j % width - torch.clamp(i % width, radius, width - 1 - radius)).abs() <= radius)
        ),
        swin_2d=lambda b, h, i, j: (i // width // 4 == j // width // 4) & (i % width // 4 == j % width // 4),
        swin_shifted=lambda b, h, i, j: (
            (((i // width + 2) % width) // 4 == ((j // width + 2) % width) // 4)
            & (((i % width + 2) % width) // 4 == ((j % width + 2) % width) // 4)
        ),
        natten_3d=lambda b, h, i, j: (
            (abs(i // 64 - j // 64) <= 1) & (abs(i // 8 % 8 - j // 8 % 8) <= 1) & (abs(i % 8 - j % 8) <= 1)
        ),
        dilated=lambda b, h, i, j: ((i - j) % dilation == 0) & (j <= i),
        dilated_window=lambda b, h, i, j: ((i - j) % dilation == 0) & (abs(i - j) < window),
        power_of_two=lambda b, h, i, j: (((i - j) & (i - j - 1)) == 0) & (j <= i),
        head_window=lambda b, h, i, j: (i - j < head_window[h]) & (j <= i),
        block_table=lambda b, h, i, j: table[h, i // block, j // block] & (j <= i),
        key_padding=lambda b, h, i, j: (j < row_prefix[b]) & keep[j],
        log_distance=lambda b, h, i, j: torch.log2((i - j).clamp(min=0) + 1.0) * 2.0 < h + 6,
        strided=lambda b, h, i, j: (j <= i) and ((i - j) < 32 or (j % 32) >= 28),
        modular=lambda b, h, i, j: (i * 3 + j * 5) % 7 == 0,
        circle=lambda b, h, i, j: (i - length // 2) ** 2 + (j - length // 2) ** 2 < (length // 2) ** 2,
        min_max=lambda b, h, i, j: max(i, j) - min(i, j) < window,
    )


def scores(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> dict:
    g = torch.Generator().manual_seed(1)
    width, cap, rate = WIDTH, 30.0, 0.3
    slopes = torch.rand(HEADS, generator=g).to(dtype)
    relative = torch.randn(2 * length - 1, generator=g).to(dtype)
    pair = torch.randn(HEADS, length, length, generator=g).to(dtype)
    temperature = torch.rand(HEADS, length, generator=g).to(dtype) + 0.5
    rows = torch.randn(HEADS, 2 * width - 1, generator=g).to(dtype)
    columns = torch.randn(HEADS, 2 * width - 1, generator=g).to(dtype)
    return dict(
        softcap=lambda s, b, h, i, j: cap * torch.tanh(s / cap),
        alibi=lambda s, b, h, i, j: s + slopes[h] * (j - i),
        relative_bias=lambda s, b, h, i, j: s + relative[i - j + length - 1],
        pair_bias=lambda s, b, h, i, j: s + pair[h, i, j],
        log_distance=lambda s, b, h, i, j: s - rate * torch.log1p(abs(i - j).float()),
        row_temperature=lambda s, b, h, i, j: s * temperature[h, i],
        swin_bias=lambda s, b, h, i, j: (
            s
            + rows[h, i // width % width - j // width % width + width - 1]
            + columns[h][i % width - j % width + width - 1]
        ),
        branches=lambda s, b, h, i, j: torch.sigmoid(s) * s if j < 4 else (s if s > 0 else s * 0.1),
        many=lambda s, b, h, i, j: (
            (s * s + 1).sqrt() * 2
            - torch.exp(-abs(s))
            + s**3 * 0.01
            + torch.clamp(s, -1, 1)
            + torch.maximum(s, torch.cos(s)) / (s * s + 2)
            + s % 2.0
        ),
    )


def grid(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, h, i, j that broadcast to [batch, heads, q_len, kv_len], from positions [len] or [batch, len]."""
    b = torch.arange(BATCH).view(-1, 1, 1, 1)
    h = torch.arange(HEADS).view(1, -1, 1, 1)
    return b, h, torch.atleast_2d(i)[:, None, :, None], torch.atleast_2d(j)[:, None, None, :]


SQUARE = grid(torch.arange(LENGTH), torch.arange(LENGTH))


def sample(count: int) -> list[tuple[Tensor, ...]]:
    """Random (b, h, i, j) as 0-d tensors: on these, every plain function runs, branches and all."""
    g = torch.Generator().manual_seed(2)
    limits = (BATCH, HEADS, LENGTH, LENGTH)
    return [tuple(torch.randint(0, n, (), generator=g) for n in limits) for _ in range(count)]


# ---- running on tensors ----


@pytest.mark.parametrize("name", masks())
def test_mask_equals_plain_function(name):
    plain = masks()[name]
    result = trace(plain).mask(*SQUARE).expand(BATCH, HEADS, LENGTH, LENGTH)
    assert result.dtype == torch.bool
    for at in sample(300):
        assert result[at] == bool(plain(*at)), at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", scores())
def test_score_equals_plain_function(name, dtype):
    plain = scores(dtype=dtype)[name]
    s = torch.randn(BATCH, HEADS, LENGTH, LENGTH, dtype=dtype, generator=torch.Generator().manual_seed(3)) * 3
    result = trace(score=plain).score(s, *SQUARE)
    assert result.dtype == dtype and result.shape == s.shape
    # .float() means the precision of the score: the plain function rounds to float32, the program need not.
    tolerance = 1e-12 if dtype == torch.float64 and name != "log_distance" else 1e-5
    for at in sample(200):
        torch.testing.assert_close(result[at], plain(s[at], *at).to(dtype), rtol=tolerance, atol=tolerance)


def test_python_numbers_are_not_rounded_to_float32():
    third, s = 1 / 3, torch.ones(1, dtype=torch.float64)
    at = [torch.zeros(1, dtype=torch.int64)] * 4
    scale = trace(score=lambda s, b, h, i, j: s * third * 0.1 * (third + 0.2)).score(s, *at)
    assert scale.item() == pytest.approx(third * 0.1 * (third + 0.2), rel=1e-15)
    choice = trace(score=lambda s, b, h, i, j: s * torch.where(i < j, 0.1, third)).score(s, *at)
    assert choice.item() == third
    distance = trace(score=lambda s, b, h, i, j: s * torch.log((i - j).float() + 3)).score(s, *at)
    assert distance.item() == pytest.approx(math.log(3), rel=1e-15)


def test_narrow_dtypes_are_computed_wide_and_kept():
    bias = torch.full((8,), 1 / 3, dtype=torch.bfloat16)
    small = torch.full((8,), 200, dtype=torch.uint8)
    s, at = torch.ones(1, dtype=torch.bfloat16), [torch.zeros(1, dtype=torch.int64)] * 4
    result = trace(score=lambda s, b, h, i, j: (s * 3.001 + bias[i] * 3.001) * 300 - 1200).score(s, *at)
    assert result.dtype == torch.bfloat16
    assert result.item() == (torch.tensor((1 + bias[0].item()) * 3.001 * 300 - 1200).bfloat16()).item()
    assert trace(lambda b, h, i, j: small[i] * 300 > 50000 + j).mask(*at)


@pytest.mark.parametrize("name", scores())
def test_score_gradients(name):
    """To s and to every captured tensor, against finite differences."""
    program = trace(score=scores(dtype=torch.float64)[name])
    at = grid(torch.tensor([3, 40]), torch.tensor([1, 40, 90]))
    s = torch.randn(BATCH, HEADS, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 3
    small = [t.clone() for t in program.tensors]
    assert torch.autograd.gradcheck(lambda s: program.score(s, *at), s.requires_grad_())
    for k in range(len(small)):
        direction = torch.randn_like(small[k])

        def along(step, k=k, direction=direction):
            moved = [t + step * direction if n == k else t for n, t in enumerate(small)]
            return program.rebind(program.numbers, moved).score(s.detach(), *at)

        assert torch.autograd.gradcheck(along, torch.zeros((), dtype=torch.float64, requires_grad=True))


def test_gradients_reach_what_was_captured():
    bias = torch.randn(HEADS, LENGTH, requires_grad=True)
    program = trace(score=lambda s, b, h, i, j: s * bias[h, i] + bias[h][j])
    assert program.tensors[0] is bias
    s, (_, h, i, j) = torch.randn(BATCH, HEADS, LENGTH, LENGTH), SQUARE
    weight = torch.randn_like(s)
    (ours,) = torch.autograd.grad((program.score(s, *SQUARE) * weight).sum(), bias)
    (plain,) = torch.autograd.grad(((s * bias[h, i] + bias[h, j]) * weight).sum(), bias)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


# ---- operands ----


def test_operands_follow_j_by_name_and_are_differentiable():
    declared = {"unused": (1, "i"), "forget": (3, "f"), "length": (1, "i"), "gain": (0, "f")}
    program = trace(
        mask=lambda b, h, i, j, length: j < length[b],
        score=lambda s, b, h, i, j, gain, forget: s * gain + forget[b, h, i] - forget[b][h, j],
        operands=declared,
    )
    assert program.operand_names == ("forget", "length", "gain")
    forget = torch.randn(BATCH, HEADS, LENGTH, requires_grad=True)
    gain = torch.tensor(1.5, requires_grad=True)
    values = dict(forget=forget, length=torch.tensor([7, 100]), gain=gain)
    b, h, i, j = SQUARE
    assert torch.equal(program.mask(*SQUARE, **values).expand(BATCH, 1, 1, LENGTH), j < values["length"][b])
    s = torch.randn(BATCH, HEADS, LENGTH, LENGTH)
    ours, plain = program.score(s, *SQUARE, **values), s * gain + forget[b, h, i] - forget[b, h, j]
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(s)
    found = torch.autograd.grad((ours * weight).sum(), (forget, gain))
    expected = torch.autograd.grad((plain * weight).sum(), (forget, gain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    needless = check_tiles(program, range(LENGTH), range(LENGTH), (64, 64), **values)
    assert needless == 0


def test_operands_are_checked():
    program = trace(score=lambda s, b, h, i, j, forget: s + forget[b, h, i], operands={"forget": (3, "f")})
    s, forget = torch.zeros(1), torch.zeros(BATCH, HEADS, LENGTH)
    with pytest.raises(TypeError, match="operand 'forget' is missing"):
        program.score(s, *SQUARE)
    with pytest.raises(TypeError, match="'forgot' is no operand; declared: forget"):
        program.score(s, *SQUARE, forget=forget, forgot=forget)
    with pytest.raises(ValueError, match="'forget' must have 3 dimensions and a float dtype, not 2"):
        program.score(s, *SQUARE, forget=forget[0])
    with pytest.raises(ValueError, match=r"float dtype, not 3 and torch\.int64"):
        program.score(s, *SQUARE, forget=forget.long())
    with pytest.raises(TraceError, match=r"mask takes a parameter 'decay' .*declared: forget.*; write it as"):
        trace(mask=lambda b, h, i, j, decay: i < j, operands={"forget": (3, "f")})
    with pytest.raises(ValueError, match=r"declare \(ndim, 'b', 'i' or 'f'\)"):
        trace(mask=lambda b, h, i, j: i < j, operands={"forget": (3, "float")})


def test_a_parameter_with_a_default_needs_no_operand():
    def mask(b, h, i, j, window=5, *, sink=2):
        return (i - j < window) | (j < sink)

    assert trace(mask).numbers == (5, 2)
    assert trace(mask, operands={"sink": (0, "i")}).operand_names == ("sink",)


# ---- results ----


def test_absent_and_constant_functions():
    at, s = SQUARE, torch.randn(3)
    nothing = trace()
    assert not nothing.has_mask and not nothing.has_score
    assert nothing.mask(*at).ndim == 0 and nothing.mask(*at).item() is True
    assert nothing.score(s, *at) is s
    constant = trace(mask=lambda b, h, i, j: False, score=lambda s, b, h, i, j: 2)
    assert constant.has_mask and constant.has_score
    assert constant.mask(*at).item() is False and constant.mask(*at).dtype == torch.bool
    assert constant.score(s, *at).item() == 2 and constant.score(s, *at).dtype == s.dtype
    assert constant.mask_depends == constant.score_depends == frozenset()
    assert trace(mask=lambda b, h, i, j: i - j).mask(*at)[0, 0].equal(~torch.eye(LENGTH, dtype=torch.bool))


def test_depends_on_no_more_than_it_reads():
    found = {name: "".join(sorted(trace(f).mask_depends)) for name, f in masks().items()}
    assert found.pop("document_causal_batched") == found.pop("prefix_lm") == "bij"
    assert found.pop("head_window") == found.pop("block_table") == found.pop("log_distance") == "hij"
    assert found.pop("key_padding") == "bj"
    assert set(found.values()) == {"ij"}
    assert trace(lambda b, h, i, j: (i < 5) | (0 * j + b - b * 1 < h * 0 - 7)).mask_depends == {"b", "i"}
    assert "".join(sorted(trace(score=scores()["row_temperature"]).score_depends)) == "his"
    program = trace(masks()["key_padding"])
    b, h, i, j = SQUARE
    assert program.mask(b, h[:, :1], i[:, :, :1], j).shape == (BATCH, 1, 1, LENGTH)


def test_reads_beyond_a_tensor_wrap_once_and_are_clamped():
    table = torch.arange(5) * 10
    for plain in (lambda b, h, i, j: table[i] == j, lambda b, h, i, j: (table[i] == j) & (table[-1] == 40)):
        for i, expected in ((4, 40), (5, 40), (1000, 40), (-1, 40), (-5, 0), (-6, 0), (-1000, 0)):
            program = trace(plain)
            assert program.mask(*map(torch.tensor, (0, 0, i, expected))), i
    beyond, before, back = 7, -9, -2
    assert trace(lambda b, h, i, j: table[beyond] + table[before] + table[back] == 70).mask(*SQUARE)


def test_what_was_captured_moves_to_the_device_of_the_positions():
    program = trace(masks()["document"], scores()["alibi"])
    b, h, i, j = (x.to("meta") for x in SQUARE)
    assert program.mask(b, h, i, j).device.type == "meta"
    assert program.score(torch.empty(1, device="meta"), b, h, i, j).shape == (1, HEADS, LENGTH, LENGTH)


# ---- tiles ----


def tile_map(program: Program, i: Tensor, j: Tensor, tile: tuple[int, int], **operands: Tensor) -> Tensor:
    """EMPTY, PARTIAL and FULL from the whole mask."""
    at = grid(i, j)
    absent = (at[2] < 0) | (at[3] < 0)
    mask = program.mask(*at, **operands).expand(BATCH, HEADS, i.shape[-1], j.shape[-1]) & ~absent
    rows, columns = -(-i.shape[-1] // tile[0]), -(-j.shape[-1] // tile[1])
    padding = (0, columns * tile[1] - j.shape[-1], 0, rows * tile[0] - i.shape[-1])

    def tiles(outside: bool) -> Tensor:
        padded = torch.nn.functional.pad(mask, padding, value=outside)
        return padded.view(BATCH, HEADS, rows, tile[0], columns, tile[1]).transpose(3, 4).flatten(-2)

    result = tiles(False).any(-1).to(torch.uint8) * PARTIAL
    result[tiles(True).all(-1)] = FULL
    void_i, void_j = ((x < 0).expand(mask.shape) for x in (at[2], at[3]))
    for void in (void_i, void_j):
        padded = torch.nn.functional.pad(void, padding, value=True)
        gone = padded.view(BATCH, HEADS, rows, tile[0], columns, tile[1]).transpose(3, 4).flatten(-2).all(-1)
        result[gone] = EMPTY
    return result


def check_tiles(program: Program, i, j, tile: tuple[int, int], **operands: Tensor) -> int:
    """Asserts that the tiles are sound; returns how many are needlessly called partial."""
    found = program.tiles(i, j, tile=tile, batch=BATCH, heads=HEADS, **operands)
    i, j = (torch.tensor(x) if isinstance(x, range) else x for x in (i, j))
    expected = tile_map(program, i, j, tile, **operands)
    assert found.dtype == torch.uint8
    assert found.shape[0] in (1, BATCH) and found.shape[1] in (1, HEADS) and found.shape[2:] == expected.shape[2:]
    found = found.expand_as(expected)
    wrong = (found != PARTIAL) & (found != expected)
    assert not wrong.any(), f"{int(wrong.sum())} unsound tiles, first {wrong.nonzero()[0].tolist()}"
    return int((found != expected).sum())


def layouts() -> dict:
    g = torch.Generator().manual_seed(5)
    every = torch.arange(LENGTH)
    gaps = torch.randperm(LENGTH, generator=g)[:170].sort().values
    padded = every.clone().repeat(BATCH, 1)
    padded[0, :70] = -1  # a whole tile and a part of the next
    padded[1, 200:] = -1
    scattered = torch.where(torch.rand(BATCH, 150, generator=g) < 0.1, -1, torch.randperm(150, generator=g))
    return dict(
        aligned=(range(LENGTH), range(LENGTH)),
        tails=(range(200), range(170)),
        offset=(range(LENGTH - 75, LENGTH), range(LENGTH)),
        single=(range(LENGTH - 1, LENGTH), range(LENGTH)),
        run=(torch.arange(30, LENGTH), torch.arange(3, 230)),
        gaps=(every[60:], gaps),
        unsorted=(torch.randperm(LENGTH, generator=g), gaps.flip(0)),
        padded=(padded, padded),
        padded_keys=(torch.arange(100, 250), padded),
        scattered=(scattered, scattered.flip(1)),
        steps=(torch.tensor([[255], [90]]), torch.stack([every, every - 165]).clamp(min=-1)),
        strided=(range(0, LENGTH, 3), range(LENGTH)),
    )


TILES = [(64, 64), (128, 128), (32, 128), (48, 16)]


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("name", masks())
def test_tiles_are_sound(name, layout):
    program = trace(masks()[name])
    for tile in TILES:
        check_tiles(program, *layouts()[layout], tile)


broken = torch.linspace(-9, 9, LENGTH)
broken[::50] = math.nan
broken[7::50] = math.inf

NASTY = dict(
    nan=lambda b, h, i, j: torch.sqrt((i - 2 * j) * 1.0) >= 0,
    nan_at_most_infinity=lambda b, h, i, j: torch.sqrt((i - 2 * j) * 1.0) <= math.inf,
    nan_in_minimum=lambda b, h, i, j: torch.minimum(torch.sqrt((i - 2 * j) * 1.0), h * 0.0) <= 1,
    nan_in_exponential=lambda b, h, i, j: torch.exp(torch.log((i - 2 * j) * 1.0)) >= 0,
    underflow=lambda b, h, i, j: torch.exp((i + 2 * j) * -1.0) > 0,
    overflow=lambda b, h, i, j: torch.exp((i + 2 * j) * 1.0) - torch.exp((2 * i + j) * 1.0) <= 1e30,
    rounded_constant=lambda b, h, i, j: (i + 2 * j) * 1e6 % 0.1 < 0.02,
    rounded_quotient=lambda b, h, i, j: ((i + 2 * j) * 0.1) // 0.1 >= i + 2 * j,
    rounded_equality=lambda b, h, i, j: (i + 2 * j) * 0.1 == (i + 2 * j) / 10,
    floor_below_zero=lambda b, h, i, j: (i - 2 * j) // 16 >= -4,
    divisor_of_both_signs=lambda b, h, i, j: 100 / (i - 2 * j + 0.5) < 3,
    negative_divisor=lambda b, h, i, j: (i + 2 * j) % -7 == -3,
    moving_divisor=lambda b, h, i, j: (i + 2 * j) % (i * 4 + 100) < 50,
    modulus_of_infinity=lambda b, h, i, j: torch.exp((i + 2 * j) * 1.0) % 2.0 < 3,
    nan_captured=lambda b, h, i, j: broken[i] >= broken[j] * 1.5,
    sum_of_unknowns=lambda b, h, i, j: sum((i - 2 * j) ^ k for k in (1, 2, 4, 8)) > 0,
    bits_of_one_negative=lambda b, h, i, j: ((i + j) | (i - 2 * j)) >= 0,
    saturating=lambda b, h, i, j: ((i - 2 * j) ^ 5) * ((i - 2 * j) ^ 9) * 1000 > 77,
    bits=lambda b, h, i, j: ((i + 2 * j) & 48) | ((i - 2 * j) & 7) < 40,
    shifts=lambda b, h, i, j: ((i - 2 * j) << 3) >> 5 < -2,
    elementary=lambda b, h, i, j: (
        torch.sigmoid((i - 2 * j) * 0.05) + torch.tanh((i - 3 * j) * 0.02) * torch.exp2((j - 2 * i) * 0.01)
        < torch.log2(i + 2 * j + 1.0) * 0.2 - torch.sqrt(i + 3 * j + 1.0) * 0.03
    ),
    truncation=lambda b, h, i, j: ((i - 2 * j) * 0.3).long() == 0,
    xor_of_masks=lambda b, h, i, j: (i < 2 * j) ^ (i + j > 200),
    equal_masks=lambda b, h, i, j: (i < 2 * j) == (i + j > 200),
    squares=lambda b, h, i, j: (i - 2 * j) ** 2 - abs(i - 2 * j) * 3 < 100,
    waves=lambda b, h, i, j: torch.sin(i * 0.01) * torch.cos((i + 2 * j) * 0.02) < 0.3,
    choice=lambda b, h, i, j: torch.where(i < 2 * j, i + j, i - 3 * j) > 20,
    edges=lambda b, h, i, j: (2 * j + 1 <= i + 2) & (i + 2 < 3 * j + 5),
    beside=lambda b, h, i, j: torch.where((i + j) % 2 == 0, 1, 2) == torch.where(i * j > 900, 2, 3),
)  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_tiles_are_sound_where_numbers_are_nasty(name):
    program = trace(NASTY[name])
    for layout in ("aligned", "tails", "gaps"):
        for tile in TILES:
            check_tiles(program, *layouts()[layout], tile)
    check_tiles(program, range(40), range(40), (1, 1))  # the bounds are what was computed: nothing hides rounding


BOUNDED = dict(
    bits=lambda b, h, i, j: ((i - 2 * j) & 7) < 8,
    more_bits=lambda b, h, i, j: ((i + 2 * j) | (3 * i + j)) - ((i + 2 * j) ^ (3 * i + j)) > -1024,
    remainder=lambda b, h, i, j: (i - 2 * j) % 5 < 5,
    shifts=lambda b, h, i, j: ((i + 2 * j + 32) << 2) >> 1 >= 64,
    quotient=lambda b, h, i, j: (i + 2 * j) // 5 >= 0,
    float_quotient=lambda b, h, i, j: (i + 2 * j + 1.5) // 2 >= 0,
    absolute=lambda b, h, i, j: abs(i - 2 * j) > -1,
    square=lambda b, h, i, j: (i - 2 * j) ** 2 >= 0,
    minimum=lambda b, h, i, j: torch.minimum(i - 2 * j, i * 0 + 5) < 6,
    maximum=lambda b, h, i, j: torch.maximum(i + j + 9, i - 2 * j) > 4,
    clamp=lambda b, h, i, j: (i - 2 * j).clamp(3, 9) + (2 * i - j).clamp(max=2) <= 11,
    where=lambda b, h, i, j: torch.where(i < 2 * j, 3, 5) > 2,
    tanh=lambda b, h, i, j: torch.tanh((i - 2 * j) * 0.01) < 1.5,
    erf=lambda b, h, i, j: torch.erf((i - 2 * j) * 0.01) < 1.5,
    sigmoid=lambda b, h, i, j: torch.sigmoid((i - 2 * j) * 0.01) > -0.5,
    waves=lambda b, h, i, j: torch.sin((i - 2 * j) * 0.01) * torch.cos((i - 2 * j) * 0.01) < 1.5,
    growth=lambda b, h, i, j: torch.exp((i + 2 * j) * -0.1) + torch.exp2((i - 2 * j) * 0.01) > 0,
    logarithm=lambda b, h, i, j: torch.log(i + 2 * j + 1.0) + torch.log2(i + 2 * j + 1.0) < 17,
    root=lambda b, h, i, j: torch.sqrt(i + 2 * j + 1.0) >= 0.5,
    floor=lambda b, h, i, j: torch.floor((i + 2 * j) * 0.5) >= 0,
    integer=lambda b, h, i, j: ((i + 2 * j) * 0.5 + 1.5).long() > 0,
    division=lambda b, h, i, j: (i + 2 * j) / 5 > -0.5,
    exclusive=lambda b, h, i, j: ~((i + 2 * j < 0) ^ (i + 2 * j > 5000)),
    same_truth=lambda b, h, i, j: (i + 2 * j < 0) == (i + 2 * j > 5000),
    strict=lambda b, h, i, j: ~(i // 128 + 1 < j // 128),
)  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_show_what_is_always_true(name):
    program = trace(BOUNDED[name])
    q = kv = range(LENGTH)
    assert check_tiles(program, q, kv, (64, 32)) == 0
    assert (program.tiles(q, kv, tile=(64, 32), heads=HEADS, batch=BATCH) == FULL).all()


def test_a_quotient_may_be_rounded_up_to_the_next_integer():
    """torch's own float division with floor is exact, but floor(a / b) in a kernel is not."""
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    low, high = interval_of("floordiv", "f", [(a, a), (b, b)])
    assert low < 2.1 and high > 2.9


def test_tiles_of_tensors_read_at_indices_that_are_bounded_only():
    g = torch.Generator().manual_seed(6)
    line = torch.randint(0, 50, (64,), generator=g).sort().values
    square = torch.rand(40, 40, generator=g).sort(0).values
    for plain in (
        lambda b, h, i, j: line[(i + j) // 8] < 25,
        lambda b, h, i, j: line[(i + j) // 8 - 20] < 25,  # wraps
        lambda b, h, i, j: line[(i + j) // 8 + 20] < 25,  # clamps
        lambda b, h, i, j: square[(i + j) // 32, (i - 2 * j) // 32 + 10] < 0.4,
    ):
        program = trace(plain)
        for tile in ((16, 16), (8, 4)):
            tiles = program.tiles(range(LENGTH), range(LENGTH), tile=tile)
            needless = check_tiles(program, range(LENGTH), range(LENGTH), tile)
            assert (tiles != PARTIAL).any() and needless < tiles.numel() * BATCH * HEADS / 4


@pytest.mark.parametrize("name", [name for name in masks() if name != "block_table"])
@pytest.mark.parametrize("tile", [(64, 64), (32, 64), (64, 32)])
def test_tiles_are_tight(name, tile):
    assert check_tiles(trace(masks()[name]), range(LENGTH), range(LENGTH), tile) == 0


@pytest.mark.parametrize("layout", ["tails", "offset", "single", "run", "padded", "steps"])
@pytest.mark.parametrize("name", ["causal", "window_chained", "dilated", "dilated_window", "power_of_two"])
def test_tiles_are_tight_for_runs_wherever_they_start(name, layout):
    """Also where a tile sticks out. Padding is no exception, but for the tiles that it cuts."""
    i, j = layouts()[layout]
    program = trace(masks()[name])
    for tile in TILES:
        cut = BATCH * HEADS * 12 if layout in ("padded", "steps") else 0
        assert check_tiles(program, i, j, tile) <= cut, tile


def test_a_tensor_of_positions_is_as_good_as_a_range():
    for name, plain in masks().items():
        program = trace(plain)
        for q, kv in ((range(200), range(170)), (range(31, 256), range(256))):
            by_range = program.tiles(q, kv, batch=BATCH, heads=HEADS, tile=(32, 64))
            by_tensor = program.tiles(torch.tensor(q), torch.tensor(kv), batch=BATCH, heads=HEADS, tile=(32, 64))
            assert torch.equal(by_range, by_tensor), name


def test_tiles_say_what_is_absent():
    everything = trace()
    assert (everything.tiles(range(200), range(70), tile=(64, 64)) == FULL).all()
    i = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, -1, -1, -1, 8, 9]])
    j = torch.tensor([0, 1, -1, 3, 4])
    for program in (everything, trace(lambda b, h, i, j: i < 100), trace(lambda b, h, i, j: i - j < 100)):
        tiles = program.tiles(i, j, tile=(3, 2), batch=2)
        first = [[FULL, PARTIAL, FULL], [FULL, PARTIAL, FULL]]
        second = [[EMPTY, EMPTY, EMPTY], [PARTIAL, PARTIAL, PARTIAL]]
        assert tiles.tolist() == [[first], [second]]
    # What is absent must not make a tile look emptier or fuller than its tokens do.
    late = torch.tensor([-1, -1, 60, 61])
    assert trace(lambda b, h, i, j: j <= i).tiles(late, torch.tensor([50, 70]), tile=(4, 2)).item() == PARTIAL
    assert trace(lambda b, h, i, j: j > i + 20).tiles(late, torch.tensor([50, 70]), tile=(4, 2)).item() == EMPTY


def test_shapes_of_tiles():
    causal = trace(lambda b, h, i, j: j <= i)
    assert causal.tiles(range(300), range(100), batch=3, heads=5).shape == (1, 1, 3, 1)
    assert causal.tiles(torch.arange(300).repeat(3, 1), range(100), batch=3, heads=5).shape == (3, 1, 3, 1)
    assert trace(masks()["head_window"]).tiles(range(9), range(9), heads=HEADS).shape == (1, HEADS, 1, 1)
    assert causal.tiles(range(0), range(100)).shape == (1, 1, 0, 1)
    assert causal.tiles(range(100), torch.zeros(0, dtype=torch.int64)).shape == (1, 1, 1, 0)
    with pytest.raises(ValueError, match="positions of 2 rows for a batch of 3"):
        causal.tiles(torch.zeros(2, 5, dtype=torch.int64), range(5), batch=3)
    with pytest.raises(ValueError, match="positions must be integers"):
        causal.tiles(torch.zeros(5), range(5))


# ---- fuzzing ----

INTEGERS = ["i", "j", "i-j", "j-i", "t[i]", "t[j]", "u[h,j]", "t[i-j]", "t[(i+j)//2]", "b", "h", "(0*i+13)", "(0*j-7)"]
INTEGER_OPERATIONS = [
    "({a}+{b})", "({a}-{b})", "({a})*-3", "({a})*5", "({a})//{k}", "({a})%{k}", "abs({a})",
    "torch.minimum({a}+0*i,{b}+0*j)", "torch.maximum({a}+0*i,{b}+0*j)", "(({a})&{k})", "(({a})*({a}))", "(({a})|{k})",
    "(({a})^({b}))", "(({a})<<2)", "(({a})>>3)", "torch.where({a}<{b},{b},{a}+1)",
]  # fmt: skip
FLOATS = [
    "torch.log2(abs({a})+1.0)", "({a})*0.37", "torch.tanh(({a})/50.0)*9", "torch.sqrt(abs({a})+0.5)", "w[i]*({a})",
    "torch.exp(-abs({a})*0.01)", "torch.sigmoid(({a})*0.1)", "torch.floor(({a})*0.3)",
]  # fmt: skip


@st.composite
def integer(draw, depth):
    if depth == 0:
        return draw(st.sampled_from(INTEGERS))
    form = draw(st.sampled_from(INTEGER_OPERATIONS))
    k = draw(st.sampled_from([2, 3, 7, 16, 33, 64]))
    return form.format(a=draw(integer(depth - 1)), b=draw(integer(0)), k=k)


@st.composite
def boolean(draw, depth):
    if depth:
        form = draw(st.sampled_from(["({a}&{b})", "({a}|{b})", "(~{a})", "({a}^{b})"]))
        return form.format(a=draw(boolean(depth - 1)), b=draw(boolean(depth - 1)))
    if draw(st.booleans()):
        sides = [draw(st.sampled_from(FLOATS)).format(a=draw(integer(1))) for _ in range(2)]
        # No ties: a number that was folded in double precision may differ in the last bit.
        return f"({sides[0]}{draw(st.sampled_from(['<', '>=']))}{sides[1]}+0.00123)"
    sides = [draw(integer(draw(st.integers(0, 2)))) for _ in range(2)]
    return f"({sides[0]}{draw(st.sampled_from(['<', '<=', '==', '>', '>=', '!=']))}{sides[1]})"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(boolean(2), st.sampled_from(sorted(layouts())), st.sampled_from([(32, 32), (64, 32), (16, 48), (64, 64)]))
def test_random_masks(source, layout, tile):
    g = torch.Generator().manual_seed(7)
    tables = dict(
        t=torch.randint(0, 9, (LENGTH + 1,), generator=g).cumsum(0) // 8,
        u=torch.randint(-3, 60, (HEADS, LENGTH + 1), generator=g),
        w=torch.randn(LENGTH + 1, generator=g),
    )
    plain = eval(f"lambda b, h, i, j: {source}", {"torch": torch, **tables})
    program = trace(plain)
    i, j = (torch.tensor(x) if isinstance(x, range) else x for x in layouts()[layout])
    at = grid(i, j)
    present = ((at[2] >= 0) & (at[3] >= 0)).expand(BATCH, HEADS, -1, -1)
    expected = torch.as_tensor(plain(*(x.clamp(min=0) if n > 1 else x for n, x in enumerate(at))))
    assert torch.equal(program.mask(*at).expand_as(present)[present], expected.expand_as(present)[present])
    check_tiles(program, *layouts()[layout], tile)


# ---- identity ----


def window_mask(size):
    return lambda b, h, i, j: (j <= i) & (i - j < size)


def cap_score(cap):
    return lambda s, b, h, i, j: cap * torch.tanh(s / cap)


def test_keys_are_equal_for_equal_structure():
    def renamed(row, head, query, key):
        is_near = query - key < reach
        return (key <= query) & is_near

    reach = 9
    key = trace(window_mask(128)).key
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert trace(window_mask(4096)).key == key
    assert trace(window_mask(1)).key == trace(window_mask(0)).key == trace(window_mask(-5)).key == key
    assert trace(renamed).key == key
    assert trace(score=cap_score(30.0)).key == trace(score=cap_score(50.0)).key
    short, long = torch.zeros(512, dtype=torch.int32), torch.arange(700)
    same = lambda document: lambda b, h, i, j: document[i] == document[j]  # noqa: E731
    assert trace(same(short)).key == trace(same(long)).key
    both = lambda size, document: lambda b, h, i, j: window_mask(size)(b, h, i, j) & same(document)(b, h, i, j)  # noqa: E731
    assert trace(both(7, short)).key == trace(both(70, long)).key


def test_keys_differ_with_what_changes_the_code():
    document, other = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    different = [
        trace(window_mask(5)),
        trace(window_mask(5.0)),
        trace(lambda b, h, i, j: (j < i) & (i - j < 5)),
        trace(lambda b, h, i, j: (j <= i) & (i - j < 6)),
        trace(lambda b, h, i, j: (j <= i) | (i - j < 5)),
        trace(lambda b, h, i, j: i // 64 >= j // 64),
        trace(lambda b, h, i, j: i // 96 >= j // 96),
        trace(lambda b, h, i, j: document[i] == document[j]),
        trace(lambda b, h, i, j: document[i] == other[j]),
        trace(lambda b, h, i, j: document.float()[i] == document.float()[j]),
        trace(lambda b, h, i, j, x: x[i] == x[j], operands={"x": (1, "i")}),
        trace(lambda b, h, i, j, y: y[i] == y[j], operands={"y": (1, "i")}),
        trace(score=cap_score(30.0)),
        trace(window_mask(5), cap_score(30.0)),
        trace(),
    ]
    assert len({program.key for program in different}) == len(different)
    block = lambda size: lambda b, h, i, j: i // size >= j // size  # noqa: E731
    assert trace(block(64)).key != trace(block(96)).key
    assert trace(block(64)).numbers == ()
    shift = lambda size: lambda b, h, i, j: (i >> size >= j >> size) | (i << size < 0)  # noqa: E731
    assert trace(shift(6)).key != trace(shift(5)).key
    assert trace(shift(6)).numbers == ()


RADIUS, DILATION = 6, 3


def near(x, y):
    return abs(x - y) < RADIUS


def test_numbers_are_lifted_from_wherever_they_come():
    sizes, shift = [4, 8], {"left": 2}

    def mask(b, h, i, j, extra=11):
        def inner(x):
            return x < extra

        return (near(i, j) & (i < sizes[1])) | inner(j) | ((i - j) % DILATION == shift["left"])

    program = trace(mask)
    assert sorted(program.numbers) == [2, 6, 8, 11]  # the modulus is baked
    partial = trace(functools.partial(lambda size, b, h, i, j: i - j < size, 7))
    assert partial.numbers == (7,) and partial.mask(*map(torch.tensor, (0, 0, 9, 3)))

    class Window:
        def __init__(self, size):
            self.size = size

        def __call__(self, b, h, i, j):
            return near(i, j) & (i - j < self.size)

        def method(self, b, h, i, j):
            return self(b, h, i, j)

    for function in (Window(4), Window(4).method):
        assert trace(function).mask(*map(torch.tensor, (0, 0, 9, 6)))
        assert not trace(function).mask(*map(torch.tensor, (0, 0, 9, 5)))


def test_rebinding_changes_numbers_and_tensors_only():
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    make = lambda size, cap, document: trace(  # noqa: E731
        lambda b, h, i, j: (i - j < 2 * size) & (document[i] == document[j]),
        lambda s, b, h, i, j: torch.where(i > j, s, cap) * (cap + 1.0),
    )
    one, two = make(1, 2.0, documents[0]), make(2, 3.0, documents[1])
    at = grid(torch.arange(7), torch.arange(7))
    s = torch.randn(1, 1, 7, 7)
    as_tensors = tuple(torch.tensor(n) for n in two.numbers)
    for program in (one.rebind(two.numbers, two.tensors), one.rebind(as_tensors, two.tensors)):
        assert program.key == one.key == two.key
        assert torch.equal(program.mask(*at), two.mask(*at))
        assert torch.equal(program.score(s, *at), two.score(s, *at))
        assert torch.equal(program.tiles(range(7), range(7), (2, 2)), two.tiles(range(7), range(7), (2, 2)))
    assert not torch.equal(one.mask(*at), two.mask(*at))
    with pytest.raises(ValueError, match="2 numbers and 1 tensors, not 1 and 1"):
        one.rebind(one.numbers[:1], one.tensors)
    with pytest.raises(TypeError, match=r"number 1\.5 was an integer when traced"):
        one.rebind((1.5, 2.0), one.tensors)
    with pytest.raises(ValueError, match="1 dimensions and a integer dtype"):
        one.rebind(one.numbers, (torch.zeros(7),))


# ---- what Python allows ----


def many_tests(count):
    return lambda b, h, i, j: any(j == i - k for k in range(count))


def test_branches_are_merged():
    def by_head(b, h, i, j):
        if b == 0:
            return abs(i - j) < 5
        elif h > 2:
            return j <= i
        return True

    cases = [
        by_head,
        many_tests(10),
        lambda b, h, i, j: (i - j) in (0, 1, 4),
        lambda b, h, i, j: not (j > i) and (i - j < 5 or j < 4),
        lambda b, h, i, j: (j <= i) if h < 2 else (j >= i),
        lambda b, h, i, j: (j <= i) if i != 2 * j else False,
        lambda b, h, i, j: sum(1 if i < j else 2 for _ in range(9)) + i < 40,  # one test, however often it is asked
        lambda b, h, i, j: torch.logical_and(i, j) | torch.logical_not(i),
        lambda b, h, i, j: max(i, j, 3 * h) - min(i, j) < 9,
        lambda b, h, i, j: sorted((1, 2))[0] + i < 2**3 + j,
    ]
    for plain in cases:
        result = trace(plain).mask(*SQUARE).expand(BATCH, HEADS, LENGTH, LENGTH)
        for at in sample(100) + [(*at[:2], at[2], at[2] // 2) for at in sample(50)]:
            assert result[at] == bool(plain(*at))


SPELLINGS = [
    lambda s, x: torch.relu(s) + s.clamp_min(-0.3) - s.clamp_max(0.7) + s.clip(-0.5, 0.4) + torch.clamp(s, max=0.1),
    lambda s, x: torch.sign(s) + s.ceil() + 2 * s.floor() + torch.sign(x - 4) + torch.absolute(s).neg(),
    lambda s, x: torch.rsub(s, 2.0) + (s + 2).rsqrt() + torch.reciprocal(s + 3) + torch.log1p(s.abs()) + (+s),
    lambda s, x: torch.exp2(s) + torch.sin(s) * s.cos() - torch.log(s.abs() + 1) + torch.square(s) + s.sigmoid(),
    lambda s, x: (torch.logical_xor(x, x > 4) | torch.logical_and(x, s) | torch.logical_not(x - 2)).float(),
    lambda s, x: torch.floor_divide(x, 3) + torch.div(x, 2, rounding_mode="floor") + torch.remainder(x, 3) * s,
    lambda s, x: torch.true_divide(x, 3) - torch.subtract(x, s) + torch.multiply(s, x) * torch.maximum(s, s * x),
    lambda s, x: (~x) * s + (x ^ 3) + (x & 6) + (x | 9) + (x << 2) + (x >> 1) + 7 // (x + 1) - 3 / (x + 1),
    lambda s, x: torch.where(torch.ne(x, 3) & torch.ge(x, 2) & torch.gt(s, -1) & (x.long() <= 5), s, x),
    lambda s, x: (s * 2.7).to(torch.int64) + x.to(s.dtype) + x.type_as(s) + (s * 3).int() + (x > 2).to(s.dtype),
    lambda s, x: (s > 0).bool() * 2.0 + (x.bool() == (s > 0.5)) + (2.0 - s) + (1 - x) + 2**x + 7 % (x + 1),
    lambda s, x: torch.where(s < 0.3, s, 0.3) - 2 * torch.where(s < x * 0.1, x * 0.1, s),
    lambda s, x: (((s > 0) & True) | False) + 2 * (((s > 0) | True) & True) + 4 * ((s > 0) & False) + s,
    lambda s, x: torch.bitwise_and(x, 5) + torch.bitwise_or(x, 8) - torch.bitwise_xor(x, 3) * torch.bitwise_not(x),
]  # fmt: skip


@pytest.mark.parametrize("plain", SPELLINGS)
def test_spellings_equal_torch(plain):
    s = torch.linspace(-1.9, 1.9, 33, dtype=torch.float64)[:, None]
    x = torch.arange(9)
    result = trace(score=lambda s, b, h, i, j: plain(s, j)).score(s, x, x, x, x)
    torch.testing.assert_close(result, plain(s, x).double(), rtol=1e-6, atol=1e-6)


def test_floats_are_not_simplified_away():
    s, at = torch.tensor([math.inf, math.nan, 1.5, -1.5]), [torch.arange(4)] * 4
    for plain in (lambda s, b, h, i, j: s * 0.0, lambda s, b, h, i, j: s // 1.0, lambda s, b, h, i, j: s - s):
        torch.testing.assert_close(trace(score=plain).score(s, *at), plain(s, *at), equal_nan=True)


def test_powers():
    s, at = torch.rand(9, dtype=torch.float64) + 0.5, [torch.arange(9)] * 4
    for plain in (
        lambda s, b, h, i, j: s**2 + s**5 - s**-3 + s**0.5 + s**1.7 + s**0,
        lambda s, b, h, i, j: s * 0.9 ** (i + j) + 2**i,
        lambda s, b, h, i, j: (s - 3.0) ** 9 + (i - 4) ** 3,
        lambda s, b, h, i, j: s + (i * 1000) ** 8.0,
    ):
        torch.testing.assert_close(trace(score=plain).score(s, *at), plain(s, *at).double(), rtol=1e-6, atol=1e-6)


def test_numpy_tables_become_tensors():
    numpy = pytest.importorskip("numpy")
    table, size = numpy.arange(LENGTH) // 64, numpy.int64(3)
    program = trace(lambda b, h, i, j: (table[i] == table[j]) & (i - j < size))
    assert program.numbers == (3,) and len(program.tensors) == 1
    at = tuple(torch.tensor(x) for x in (0, 0, 66, 64))
    assert program.mask(*at) and not program.mask(at[0], at[1], at[2] + 2, at[3])


# ---- errors ----

table_1d, table_2d = torch.zeros(8, dtype=torch.int64), torch.rand(4, 8)
plain_list = [1, 2, 3]
leak = types.SimpleNamespace(i=None)
trace(lambda b, h, i, j: setattr(leak, "i", i) is None)


def endless(b, h, i, j):
    n = 0
    while i > n:
        n += 1
    return j < n


def leaks(b, h, i, j):
    return leak.i < j


def writes(b, h, i, j):
    table_1d[i] = 3
    return i < j


ERRORS = dict(
    math=(lambda b, h, i, j: math.log(i - j) < 3, "float() or a function of math", "torch function of that name"),
    list_index=(lambda b, h, i, j: plain_list[h] > i - j, "a Python index", "a tensor in place of a list"),
    range=(lambda b, h, i, j: any(j == i - k for k in range(i)), "range() or shape needs a Python number", "a tensor"),
    partial_index=(lambda b, h, i, j: table_2d[h] < 3, "2 dimensions was read with 1 indices", "t[h, i]"),
    whole_tensor=(lambda b, h, i, j: table_2d * i < 3, "2 dimensions was read with 0 indices", "t[h, i]"),
    slice=(lambda b, h, i, j: table_2d[h, 1:3].sum() < i, "a slice", "one integer index for each dimension"),
    float_index=(lambda b, h, i, j: table_1d[i / 2] < 3, "read with float", "use //"),
    mask_index=(lambda b, h, i, j: table_1d[i < j] < 3, "read with boolean", "1 integer indices"),
    too_many=(lambda b, h, i, j: table_1d[i, j] < 3, "1 dimensions was read with integer, integer", "1 integer"),
    indexed_expression=(lambda b, h, i, j: (i + j)[h] < 3, "only tensors can be indexed", "captured tensor"),
    reduction=(lambda b, h, i, j: i.max() < 3, "max takes 2 operands", "no reductions"),
    softmax=(lambda b, h, i, j: torch.softmax(i, -1) < 3, "softmax is not supported", "before normalisation"),
    random=(lambda b, h, i, j: torch.rand_like(i) < 0.5, "rand_like is not supported", "it with: abs, add,"),
    item=(lambda b, h, i, j: i.item() < 3, "item is not supported", "the expression itself"),
    isin=(lambda b, h, i, j: torch.isin(i, table_1d), "isin is not supported", "any(x == value"),
    in_place=(lambda b, h, i, j: i.add_(1) < j, "add_ is not supported", "x = x + ..."),
    keyword=(lambda b, h, i, j: torch.add(i, j, alpha=2) < 3, "add was given alpha", "add of its operands"),
    clamp=(lambda b, h, i, j: i.clamp(minimum=2) < j, "clamp: got an unexpected keyword", "operands"),
    write=(writes, "writing into a tensor|setitem is not supported", "torch.where"),
    endless=(endless, "more than 64 tests", "bounded by a Python number"),
    paths=(many_tests(80), "more than 64 ", "torch.where, & and |"),
    membership=(lambda b, h, i, j: i in j, "cannot be iterated", "t[h, i]"),
    iteration=(lambda b, h, i, j: any(i == x for x in j), "cannot be iterated", "t[h, i]"),
    string=(lambda b, h, i, j: i < "a", "a str cannot be used", "a Python number or a tensor"),
    complex=(lambda b, h, i, j: i * 1j == j, "a complex cannot be used", "a Python number"),
    nothing=(lambda b, h, i, j: None, "mask returned None", "a return on every path"),
    base=(lambda b, h, i, j: torch.tensor(0.9) ** (i - j) < 3, "must be a Python number", "torch.exp2"),
    zero=(lambda b, h, i, j: i % 0 == j, "division by zero", "other than 0"),
    float_bits=(lambda b, h, i, j: (i * 0.5) & 1 == 0, "and was given a float", "booleans or integers"),
    half=(lambda b, h, i, j: i.to(torch.float16) < j, "torch.float16 is no type", "torch.float32"),
    arity=(lambda q, k: q < k, "mask takes (q, k)", "(b, h, i, j) first"),
    no_function=(3, "mask is no function", "a Python function"),
    leaked=(leaks, "another trace", "its own arguments"),
)  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_where_and_what_to_write(name):
    function, what, instead = ERRORS[name]
    with pytest.raises(TraceError) as caught:
        trace(function)
    message, _, advice = str(caught.value).partition("; write ")
    assert any(part in message for part in what.split("|")), message
    assert instead in advice
    assert isinstance(caught.value, TypeError)
    assert re.search(r"\[.*test_expressions\.py:\d+", advice)


def test_errors_point_at_the_line():
    def mask(b, h, i, j):
        fine = i < j
        wrong = i.exponential()
        return fine & wrong

    with pytest.raises(TraceError, match=rf"test_expressions\.py:{mask.__code__.co_firstlineno + 2} in mask\]"):
        trace(mask)


# ---- where programs run ----


def test_runs_under_vmap():
    for name, score in (("sink_window", "branches"), ("document_causal_batched", "swin_bias"), ("natten_2d", "many")):
        program = trace(masks()[name], scores()[score])
        s = torch.randn(BATCH, HEADS, 20, 24)
        ranges = [torch.arange(n) for n in s.shape]

        def everywhere(function, *, with_s):
            for n in reversed(range(4)):
                dims = [0 if k == n else None for k in range(4)]
                function = torch.func.vmap(function, in_dims=(*((0,) if with_s else ()), *dims))
            return function

        b, h, i, j = grid(ranges[2], ranges[3])
        mask = everywhere(lambda *at, p=program: p.mask(*at) & (at[1] >= 0) & (at[0] >= 0), with_s=False)(*ranges)
        assert torch.equal(mask, program.mask(b, h, i, j).expand_as(mask))
        found = everywhere(lambda s, *at, p=program: p.score(s, *at), with_s=True)(s, *ranges)
        torch.testing.assert_close(found, program.score(s, b, h, i, j))


def test_compiles_in_one_graph_with_numbers_as_inputs():
    program = trace(masks()["natten_2d_clamped"], scores()["softcap"])

    def attend(s, numbers, tensors, at):
        bound = program.rebind(numbers, tensors)
        return bound.score(s, *at).masked_fill(~bound.mask(*at), -torch.inf)

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=False)
    s = torch.randn(LENGTH, LENGTH)
    for change in (0, 2):
        numbers = tuple(torch.tensor(n + change) for n in program.numbers)
        eager = attend(s, tuple(n + change for n in program.numbers), program.tensors, SQUARE)
        torch.testing.assert_close(compiled(s, numbers, program.tensors, SQUARE), eager)
    assert len(graphs) == 1  # other numbers compile nothing


def test_threads_trace_side_by_side():
    functions = [*masks().values()] * 2
    expected, found, start = [trace(f).key for f in functions], {}, threading.Barrier(4)

    def work(k):
        start.wait()
        found[k] = [trace(f).key for f in functions]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(found[k] == expected for k in range(4))


# ---- speed and memory ----


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


LONG = 2**17


@pytest.mark.parametrize("name", ["causal", "sink_window", "document", "power_of_two", "natten_2d_clamped", "circle"])
def test_long_maps_are_fast_and_small(name):
    """The whole mask would take 16 GiB; the map is 1 MiB."""
    program = trace(masks(LONG, width=256)[name])
    for positions in (range(LONG), torch.arange(LONG)):
        with Largest() as largest:
            program.tiles(positions, positions)
        assert largest.bytes <= 4 * 2**20
        start = time.perf_counter()
        tiles = program.tiles(positions, positions)
        assert time.perf_counter() - start < 1
        assert tiles.shape == (1, 1, 1024, 1024)
    if name == "causal":
        query, key = torch.arange(1024)[:, None], torch.arange(1024)
        expected = torch.where(key < query, FULL, torch.where(key == query, PARTIAL, EMPTY))
        assert torch.equal(tiles[0, 0], expected.to(torch.uint8))
