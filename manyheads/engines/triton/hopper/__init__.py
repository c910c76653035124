"""Hopper GPUs: kernels in Gluon, forward and backward, for any mask and score and any tiles of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.core.forms import Blocks, Form, Scores, Selection
from manyheads.core.inputs import Inputs
from manyheads.engines.triton.blocks import is_hopper

try:
    from manyheads.engines.triton import replay
    from manyheads.engines.triton.hopper import backward, entmax, forward, rounds, selected, tables, tokens, top_k
    from manyheads.engines.triton.hopper.launching import NORMALISERS, UNIT, WIDTHS
    from manyheads.engines.triton.hopper.tokens import Chosen
except (ImportError, AttributeError) as error:  # no triton, or one that renamed something
    if (getattr(error, "name", None) or "").startswith("manyheads"):
        raise
    MISSING = f"this Triton has no Gluon for Hopper that is known here ({error})"
else:
    MISSING = None
    LEVELLED = {"entmax": entmax, "top_k": top_k}  # normalisers that find a level for each row first


def why_not(form: Form, x: Inputs) -> str | None:
    """Why `run` cannot take it."""
    if MISSING:
        return MISSING
    if not isinstance(form, Scores):
        return f"the Hopper kernel has no {type(form).__name__}"
    if form.normaliser not in (*NORMALISERS, *LEVELLED):
        return f"the Hopper kernel has no {form.normaliser!r} normaliser"
    if x.dropout is not None and torch.is_grad_enabled():
        read = *form.program.tensors, *(t for name, t in x.operands.items() if name != form.sink)
        if any(t.requires_grad for t in read):
            return "under dropout the Hopper kernel gives gradients to q, k, v and sinks alone"
    if not is_hopper(x.q.device):
        return "the Hopper kernel needs a GPU of compute capability 9"
    if x.q.dtype not in (torch.bfloat16, torch.float16) or not x.q.dtype == x.k.dtype == x.v.dtype:
        return f"the Hopper kernel takes bfloat16 and float16, not {x.q.dtype}"
    if max(x.q.shape[3], x.v_head_dim) > WIDTHS[-1] or x.q.shape[3] % UNIT or x.v_head_dim % UNIT:
        given = f"{x.q.shape[3]} and {x.v_head_dim}"
        return (
            f"the Hopper kernel takes multiples of {UNIT} up to {WIDTHS[-1]} for head_dim and v_head_dim, not {given}"
        )
    if not all(isinstance(p, Tensor) or p.step == 1 for p in (x.q_positions, x.kv_positions)):
        return "the Hopper kernel needs consecutive positions, or a tensor of them"
    return LEVELLED[form.normaliser].why_not(form, x) if form.normaliser in LEVELLED else None


def why_no_lists(form: Selection, x: Inputs) -> str | None:
    """Why `run` cannot take a selection's inner scores and the blocks that were chosen."""
    why = why_not(form.scores, x)
    return selected.why_not(form, x) if why is None else why


def chosen_of(form: Selection, x: Inputs, blocks: Blocks) -> Chosen:
    """What `run` takes for the blocks that `form` chose for x, which why_no_lists let pass."""
    if tokens.pay(form, x, blocks):
        return tokens.chosen_of(form, x, blocks)
    if rounds.pay(form, x, blocks):
        return rounds.Rounds(blocks, form.query_block, form.key_block)
    return selected.chosen_of(form, x, blocks)


def run(form: Scores, x: Inputs, chosen: Chosen | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse), without gradients. Of LEVELLED ones, which have no lse, the levels stand in its place."""
    if form.normaliser in LEVELLED:
        return LEVELLED[form.normaliser].run(form, x)
    if isinstance(chosen, rounds.Rounds):
        return rounds.run(form, x, chosen)
    if isinstance(chosen, tokens.Tokens):
        return tokens.run(form, x, chosen)
    given = x.q, x.k, x.v, *x.operands.values()
    key = replay.key_of(form, x, given) if chosen is None else None
    return replay.replayed(
        key, given, form.program.tensors, lambda: _still(form, x), lambda: forward.run(form, x, chosen=chosen)
    )  # type: ignore[return-value]  as compute does


def again(form: Scores, x: Inputs) -> replay.Call | None:
    """What `run` launched for q, k, v and operands like those of x, once it is known."""
    if MISSING or form.normaliser in LEVELLED:
        return None
    return replay.known(replay.key_of(form, x, (x.q, x.k, x.v, *x.operands.values())))


def gradients(
    form: Scores, x: Inputs, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
    needed: tuple[bool, bool, bool] = (True, True, True), chosen: Chosen | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv of what `run` gave; None for those that are not needed."""
    if form.normaliser in LEVELLED:
        return LEVELLED[form.normaliser].gradients(form, x, lse, do, needed)
    if isinstance(chosen, rounds.Rounds):
        return rounds.gradients(form, x, o, lse, do, dlse, needed, chosen)
    if isinstance(chosen, tokens.Tokens):
        return tokens.gradients(form, x, o, lse, do, dlse, needed, chosen)
    common = None if form.normaliser == "none" else o
    given = x.q, x.k, x.v, common, lse, do, dlse, *x.operands.values()
    key = replay.key_of(form, x, given, needed) if chosen is None else None
    return replay.replayed(
        key,
        given,
        form.program.tensors,
        lambda: _still(form, x),
        lambda: backward.run(form, x, common, lse, do, dlse, needed, chosen=chosen),
    )  # type: ignore[return-value]  as compute does


def alpha_gradient(form: Scores, x: Inputs, tau: Tensor, do: Tensor) -> Tensor:
    """Of the alpha of entmax, float32 [heads]. tau: what `run` gave in place of an lse."""
    return entmax.alpha_gradient(form, x, tau, do)


def _still(form: Scores, x: Inputs) -> Iterator[Tensor]:
    """What kernels read besides their inputs: tables of tiles that are kept, and captured tensors."""
    yield from (found.values for found in tables.KEPT.all())
    yield from (form.program.tables.on(place, x.q.device) for place in range(len(form.program.tensors)))
