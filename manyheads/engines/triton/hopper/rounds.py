"""Queries that choose by themselves among blocks of many keys: every query meets one block at a time, together with all
others that chose the same one, and the results are merged. What is computed grows as what was chosen, where tiles of
neighbours visit all that any of them chose.

A query's own block, which a causal mask cuts, is computed in natural order. All other blocks lie before the query (or
there is no mask), so that their tiles need none: the rows of queries are copied into the order of their blocks, a part
of them at a time (ordering.py), and the ordinary kernels run over them.

Lu et al. "MoBA: Mixture of Block Attention for Long-Context LLMs." 2025. arXiv:2502.13189, section 2.3, has this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manyheads.core.attending import with_captured
from manyheads.core.forms import Blocks, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.core.tiling import row_start
from manyheads.engines.triton import quick
from manyheads.engines.triton.blocks import cdiv
from manyheads.engines.triton.hopper import backward, forward
from manyheads.engines.triton.hopper.moving import add, at_places, gathered, merge, numbers_at
from manyheads.engines.triton.hopper.ordering import TILE, Order, Own, Part, order_of, parts
from manyheads.engines.triton.hopper.selected import Chosen as United

COPIED = 640  # keys that are computed with in the time in which a row goes there and its result comes back


@dataclass(frozen=True, eq=False)
class Rounds:
    """The blocks that were chosen."""

    blocks: Blocks
    query_block: int
    key_block: int


Chosen = United | Rounds


def pay(form: Selection, x: Inputs, blocks: Blocks) -> bool:
    """Whether it can be done so, and takes less time than tiles that unite the lists of their queries, as far as sizes
    tell: a query of `width` blocks either computes with these and is copied for each, or with those of all lists of its
    tile, at most with all that it sees, which is half of them on average where there is a mask."""
    number, (_, _, lists, width) = cdiv(x.kv_len, form.key_block), blocks.indices.shape
    seen = number if form.scores.mask is None else number / 2
    united = min(seen, width * min(lists, cdiv(TILE, form.query_block)))
    return width * (form.key_block + COPIED) < united * form.key_block and able(form, x)


def able(form: Selection, x: Inputs) -> bool:
    """Tiles of one block, no mask but a causal one, and scores that are the same wherever the query is copied."""
    scores = form.scores
    known = scores.program.score_depends <= {"s", "j"} and scores.normaliser in ("softmax", "signed")
    known = known and x.dropout is None and x.q.numel() > 0 and x.k.numel() > 0
    return form.key_block % TILE == 0 and known and (scores.mask is None or _causal(scores))


def run(form: Scores, x: Inputs, chosen: Rounds) -> tuple[Tensor, Tensor]:
    """As forward.run."""
    o = quick.empty((x.batch, x.heads, x.q_len, x.v_head_dim), x.q.dtype, x.q.device)
    lse = quick.empty((x.batch, x.heads, x.q_len), torch.float32, x.q.device)
    sink = None if form.sink is None else x.operands[form.sink].detach().float().contiguous()
    own, others = forms_of(form, row_start(x.q_positions), chosen.key_block)
    for part, y, order in ordered(form, x, chosen):
        of_own = (None, None) if own is None else forward.run(own, y, chosen=Own(chosen.key_block))
        theirs = None if sink is None else sink[part.heads]
        merge(o[part.own], lse[part.own], *of_own, theirs, *_of_others(others, y, order), order)
    return o, lse


def _of_others(form: Scores, x: Inputs, order: Order) -> tuple[Tensor, Tensor]:
    return forward.run(form, at_places(x, order), chosen=order)


def gradients(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needed: tuple[bool, bool, bool],
    chosen: Rounds,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As backward.run. The gradients of keys and values are what each part rounds, summed in float32 in the parts'
    order."""
    do = do if do.stride(3) == 1 else do.contiguous()
    with torch.cuda.device_of(x.q):
        top, delta = backward.prepared(o, lse, do, dlse)
    own, others = forms_of(form, row_start(x.q_positions), chosen.key_block)
    dq = quick.empty(x.q.shape, x.q.dtype, x.q.device) if needed[0] else None
    dk = torch.zeros_like(x.k, dtype=torch.float32) if needed[1] else None
    dv = torch.zeros_like(x.v, dtype=torch.float32) if needed[2] else None
    for part, y, order in ordered(form, x, chosen):
        dy, rest, dq_own = do[part.own], (top[part.own], delta[part.own], needed), None
        if own is not None:
            dq_own, *more = _gradients_of_own(own, y, dy, *rest, order)
            _collect(part, (dk, dv), more)
        dq_parts, *more = _gradients_of_others(others, y, dy, *rest, order)
        _collect(part, (dk, dv), more)
        if dq is not None and dq_parts is not None:
            add(dq[part.own], dq_own, dq_parts, order)
        del dq_parts  # a part's memory goes before the next part asks for as much
    return dq, None if dk is None else dk.to(x.k.dtype), None if dv is None else dv.to(x.v.dtype)


def _gradients_of_own(
    form: Scores, x: Inputs, do: Tensor, top: Tensor, delta: Tensor, needed: tuple[bool, bool, bool], order: Order
) -> tuple[Tensor | None, ...]:
    assert order.own is not None, "it has one where there is a mask"
    seen = top.masked_fill(order.own == 0, torch.inf)
    numbers = _padded(seen, torch.inf), _padded(delta, 0.0)
    return backward.products(form, x, do, *numbers, needed, chosen=Own(order.key_block))


def _gradients_of_others(
    form: Scores, x: Inputs, do: Tensor, top: Tensor, delta: Tensor, needed: tuple[bool, bool, bool], order: Order
) -> tuple[Tensor | None, ...]:
    numbers = numbers_at(top, delta, order)
    return backward.products(form, at_places(x, order), gathered(do, order), *numbers, needed, chosen=order)


# ---- which scores ----


def _of(mask: Any) -> str:
    return Scores(mask=mask).program.key


CAUSAL = _of(lambda b, h, i, j: j <= i)


@lru_cache(maxsize=256)
def _causal(form: Scores) -> bool:
    return replace(form, score=None, normaliser="softmax", sink=None).program.key == CAUSAL


def forms_of(form: Scores, start: int, key_block: int) -> tuple[Scores | None, Scores]:
    """For a query's own block, None without a mask; and for other blocks. They read what `form` reads, which need not
    be what its functions captured. start: where the first query stands; if tiles have queries of two blocks, the mask
    must tell them apart."""
    own, others = _forms_of(form, key_block if start % TILE else None)
    captured = [*form.program.tensors]
    return None if own is None else with_captured(own, captured), with_captured(others, captured)  # type: ignore[return-value]  they stay Scores


@lru_cache(maxsize=256)
def _forms_of(form: Scores, key_block: int | None) -> tuple[Scores | None, Scores]:
    others = replace(form, mask=None, sink=None)
    if form.mask is None:
        return None, others
    if key_block is None:
        return replace(form, sink=None), others
    return replace(others, mask=lambda b, h, i, j: (j <= i) & (i // key_block == j // key_block)), others


# ---- parts of a call ----


def ordered(form: Scores, x: Inputs, chosen: Rounds) -> Iterator[tuple[Part, Inputs, Order]]:
    """Parts of a call, one after the other."""
    past = form.mask is not None
    for part in parts(x, max(1, chosen.blocks.indices.shape[3]), cdiv(x.kv_len, chosen.key_block)):
        y = part.of(x)
        yield (
            part,
            y,
            order_of(chosen.blocks, y, part, row_start(x.q_positions), chosen.query_block, chosen.key_block, past),
        )


def _collect(part: Part, sums: tuple[Tensor | None, Tensor | None], more: list[Tensor | None]) -> None:
    for total, found in zip(sums, more, strict=True):
        if total is not None and found is not None:
            total[part.batch, part.kv_heads] += found


def _padded(numbers: Tensor, value: float) -> Tensor:
    """Up to whole tiles."""
    return torch.nn.functional.pad(numbers, (0, -numbers.shape[2] % TILE), value=value).contiguous()
