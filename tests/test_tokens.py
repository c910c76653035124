"""Tokens that choose blocks with all heads of a key head: the kernels in the interpreter against eager, and on a GPU.

Triton decides at import whether it interprets, so those cases run in a process of their own.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from manyheads import get
from manyheads.core.dropout import Dropout
from manyheads.core.forms import Blocks, Operand, Scores, Selection
from manyheads.core.inputs import Inputs, default_positions
from manyheads.core.tiling import choose
from manyheads.engines import eager, triton
from manyheads.engines.triton import hopper
from manyheads.engines.triton.hopper import tokens
from tests.interpreter import interpret

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
SCORES = {"causal": Scores(mask=lambda b, h, i, j: j <= i), "full": Scores()}


def inputs(q_len, kv_len, heads=4, kv_heads=1, batch=1, dim=16, v_dim=None, dtype=torch.float32, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    sizes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim or dim)
    q, k, v = (torch.randn(batch, *size, generator=draw).to(device, dtype) for size in sizes)
    return Inputs(q, k, v, dim**-0.5, *default_positions(q_len, kv_len))


def selection(scores, x, width=3, key_block=16, fewer=0.3, together=True, **sizes):
    """Lists of up to `width` blocks drawn at random, later ones than the own one among them, a share of `fewer` with
    fewer, or none."""
    draw, group = torch.Generator().manual_seed(0), x.heads // x.kv_heads
    likes = torch.rand(x.batch, x.kv_heads, x.q_len, -(-x.kv_len // key_block), generator=draw)
    indices = likes.topk(min(width, likes.shape[-1]), -1).indices
    number = torch.randint(0, indices.shape[-1] + 1, indices.shape[:-1], generator=draw)
    number = torch.where(torch.rand(number.shape, generator=draw) < fewer, number, indices.shape[-1])
    blocks = Blocks.from_indices(indices, torch.arange(indices.shape[-1]) < number[..., None])
    blocks = Blocks(*(t.to(x.q.device).repeat_interleave(group, 1) for t in (blocks.indices, blocks.counts)))
    return Selection(
        select=lambda q, k, *, scale, offset: blocks, scores=scores, key_block=key_block, together=together,
        **{"query_block": 1, **sizes},
    )  # fmt: skip


def check(form, x, bound, needed=(True, True, True)):
    """o, lse and the gradients against eager in float64."""
    assert hopper.selected.why_not(form, x) is None and tokens.able(form, x)
    draw = torch.Generator().manual_seed(1)
    wide = x.with_(**{name: getattr(x, name).double().requires_grad_() for name in "qkv"})
    o, lse = eager.run(form, wide)
    do = torch.randn(o.shape, generator=draw).to(x.q)
    dlse = torch.where(lse > -torch.inf, torch.randn(lse.shape, generator=draw).to(x.q.device), 0).float()
    loss = (o * do).sum() + torch.where(lse > -torch.inf, lse * dlse, 0).sum()
    true = torch.autograd.grad(loss, [wide.q, wide.k, wide.v])
    chosen = tokens.chosen_of(form, x, choose(form, x))
    found = tokens.run(form.scores, x, chosen)
    torch.testing.assert_close(found[1].double(), lse.detach(), atol=1e-4, rtol=bound)  # -inf where there is none
    close("o", found[0], o, bound)
    assert (found[0][lse == -torch.inf] == 0).all()
    grads = tokens.gradients(form.scores, x, *found, do, dlse, needed, chosen)
    for name, wanted, a, b in zip(("dq", "dk", "dv"), needed, grads, true, strict=True):
        close(name, a, b, 2 * bound) if wanted else None
        assert wanted or a is None


def close(name, a, b, bound):
    assert torch.isfinite(a).all() and (a.double() - b).norm() <= bound * b.norm(), name


# ---- the kernels, in the interpreter ----


def prepared(o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """As backward.prepared, which is Gluon and is not interpreted: one longer than need be."""
    top = torch.where(lse > -torch.inf, lse * 1.4426950408889634, torch.inf)
    return tuple(torch.nn.functional.pad(t, (0, 1)) for t in (top, (o * do).sum(-1) - dlse))


CASES: dict[str, dict[str, Any]] = {
    "a group of 4": dict(q_len=70, kv_len=70, heads=8, kv_heads=2),
    "a group of 16": dict(q_len=17, kv_len=17, heads=16),
    "a group of 5, and of batches": dict(q_len=20, kv_len=50, heads=10, kv_heads=2, batch=2),
    "one head": dict(q_len=17, kv_len=33, heads=2, kv_heads=2),
    "more heads than rows": dict(q_len=5, kv_len=70, heads=20),
    "one token": dict(q_len=1, kv_len=1, heads=16),
    "one query": dict(q_len=1, kv_len=70),
    "sizes": dict(q_len=33, kv_len=40, dim=24, v_dim=40),
}
EXACT = 1e-5  # float32, summed in another order


def interpreted(name):
    tokens.backward.prepared = prepared
    x = inputs(**CASES[name])
    for scores in SCORES.values():
        check(selection(scores, x), x, EXACT)
    check(selection(SCORES["causal"], x.with_(scale=-0.3), key_block=32), x, EXACT)


def interpreted_tiles():
    """Blocks of several tiles; steps between numbers, as those of many tokens; and what is not needed."""
    tokens.backward.prepared, tokens.FAR = prepared, 0
    x = inputs(20, 150)
    for key_block in (64, 128):
        check(selection(SCORES["causal"], x, width=2, key_block=key_block), x, EXACT)
    form = selection(SCORES["causal"], x, width=0)
    check(form, x, EXACT)
    form, y = selection(SCORES["causal"], x), x.with_(**{name: getattr(x, name).mT.contiguous().mT for name in "qkv"})
    for needed in product([False, True], repeat=3):
        check(form, y, EXACT, needed)


@pytest.mark.parametrize("name", CASES)
def test_against_eager(name):
    interpret("test_tokens", f"interpreted({name!r})")


def test_tiles_and_steps():
    interpret("test_tokens", "interpreted_tiles()")


def test_they_compile_for_hopper(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import compiled

    for name, make in compiled.token_kernels():
        made = compiled.read(make())
        assert made.shared <= compiled.LIMIT and made.spilled <= 16, (name, made)
        assert made.hgmma > 0 or name != "keys of tokens 128", (name, made)


# ---- when ----


def test_when_they_are_run():
    """By sizes; and not where heads choose apart, blocks are of several queries, or scores are other ones."""
    x = inputs(65536, 65536, heads=16, dim=8).with_(q=torch.empty(1, 16, 65536, 8, device="meta"))

    def how(scores=SCORES["causal"], y=x, width=8, key_block=64, **sizes):
        form = Selection(
            select=lambda q, k, *, scale, offset: None, scores=scores, key_block=key_block,
            **{"query_block": 1, "together": True, **sizes},
        )  # fmt: skip
        blocks = Blocks(torch.empty(1, y.heads, y.q_len, width, device="meta"), torch.empty(0, device="meta"))
        return tokens.pay(form, y, blocks)

    assert how() and how(SCORES["full"]) and how(key_block=128) and how(key_block=16)
    assert how(width=170) and not how(width=171), "of 512 that half of all queries see, 3 times"
    assert not how(together=False) and not how(query_block=2)
    assert not how(key_block=48) and not how(key_block=256)
    causal, sinks = SCORES["causal"].mask, {"sink": Operand("heads")}
    for other in (
        Scores(mask=lambda b, h, i, j: (j <= i) & (i - j < 999)), Scores(mask=causal, normaliser="signed"),
        Scores(mask=causal, score=lambda s, b, h, i, j: 2 * s), Scores(mask=causal, sink="sink", operands=sinks),
    ):  # fmt: skip
        assert not how(other)
    assert not how(y=x.with_(dropout=Dropout(0.3, torch.tensor([5]))))
    apart = x.with_(k=x.k.expand(-1, 16, -1, -1))
    assert how(y=apart) and not how(y=apart, width=16), "tiles of one row among 16"


def test_infllm_v2_chooses_together():
    x = inputs(40, 40, heads=8, kv_heads=2)
    sizes = dict(block_size=4, window=4, kernel=4, stride=2, top_k=2, dense_len=0)
    form, apart = (get("infllm_v2")(**sizes, group=group) for group in (None, 2))
    assert isinstance(form, Selection) and isinstance(apart, Selection) and form.together and not apart.together
    blocks = choose(form, x)
    own = tokens.chosen_of(form, x, blocks).blocks
    for every, once in ((blocks.indices, own.indices), (blocks.counts, own.counts)):
        assert torch.equal(every, once.repeat_interleave(4, 1))


# ---- on a GPU ----


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")(test))


HALF: dict[str, Any] = dict(dtype=torch.bfloat16, device="cuda")
ROUNDED = 5e-3  # of what is rounded to bfloat16


@on_hopper
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_sizes_on_a_gpu(dim, name):
    for heads, kv_heads, key_block in ((32, 2, 64), (8, 2, 16), (5, 1, 128)):
        x = inputs(500, 700, heads=heads, kv_heads=kv_heads, batch=2, dim=dim, **HALF)
        check(selection(SCORES[name], x, key_block=key_block), x, ROUNDED)
    x = inputs(333, 333, heads=16, dim=dim, v_dim=dim - 40, **HALF)
    check(selection(SCORES[name], x, key_block=32), x, ROUNDED)


@on_hopper
def test_the_same_bits_every_run_on_a_gpu():
    x = inputs(4096, 4096, heads=32, kv_heads=2, dim=128, **HALF)
    form = selection(SCORES["causal"], x, width=16, key_block=64)
    chosen, found = tokens.chosen_of(form, x, choose(form, x)), []
    for _ in range(3):
        o, lse = tokens.run(form.scores, x, chosen)
        found.append([o, lse, *tokens.gradients(form.scores, x, o, lse, o, None, (True, True, True), chosen)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@on_hopper
def test_the_engine_takes_it_on_a_gpu():
    """From q, k and v to gradients, with torch.compile's operators and without."""
    x = inputs(16384, 16384, heads=16, dim=64, **HALF)
    form = selection(SCORES["causal"], x, width=4, key_block=64)
    assert isinstance(hopper.chosen_of(form, x, choose(form, x)), tokens.Tokens)
    leaves, found = [getattr(x, name).requires_grad_() for name in "qkv"], []
    for run in (triton.run, triton.op.ATTEND):
        o, lse = run(form, x)
        found.append([o, lse, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(map(torch.equal, *found))
