"""Lists of key blocks turned round by counting: the bits of hopper/kernels/uniting.py, one for each query block that
lists a key block, BITS to a word, say how many there are and which."""

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(32)
COLUMNS = 32  # key blocks of a program


@triton.jit
def bits_of(word):
    """int32 [N, BITS] of words int32 [N]."""
    return (word[:, None] >> tl.arange(0, BITS)[None, :]) & 1


@triton.jit(do_not_specialize=["chunks", "key_blocks"])
def count(words, numbers, chunks, key_blocks, COLUMNS: tl.constexpr):
    """numbers int32 [heads, key_blocks]: of query blocks that list each. words: int32 [heads, chunks, key_blocks].
    Grid: heads * key_blocks / COLUMNS."""
    parts = tl.cdiv(key_blocks, COLUMNS)
    head = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.zeros([COLUMNS], tl.int32)
    for chunk in range(0, chunks):
        word = tl.load(words + (head * chunks + chunk) * key_blocks + column, mask=column < key_blocks, other=0)
        number += tl.sum(bits_of(word), 1)
    tl.store(numbers + head * key_blocks + column, number, mask=column < key_blocks)


@triton.jit(do_not_specialize=["chunks", "key_blocks"])
def place(words, begins, out, chunks, key_blocks, COLUMNS: tl.constexpr):
    """The query blocks of each key block, ascending, from where it begins in `out` on. Grid: as for `count`."""
    parts = tl.cdiv(key_blocks, COLUMNS)
    head = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.load(begins + head * key_blocks + column, mask=column < key_blocks, other=0)
    for chunk in range(0, chunks):
        word = tl.load(words + (head * chunks + chunk) * key_blocks + column, mask=column < key_blocks, other=0)
        bits = bits_of(word)
        row = tl.zeros([COLUMNS, BITS], tl.int32) + chunk * BITS + tl.arange(0, BITS)[None, :]
        tl.store(out + at[:, None] + tl.cumsum(bits, 1) - bits, row, mask=bits != 0)
        at += tl.sum(bits, 1)
