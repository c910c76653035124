"""A recurrence as calls of one function that an engine gives: features before, a normaliser behind.

    base(q, k, v, g, beta, state, scale) -> (o, the state behind the last token)

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   or + beta_t k_t (v_t - (diag(exp(g_t)) S_{t-1})^T k_t)^T with a beta
    o_t = S_t^T (scale q_t)

q [batch, heads, q_len, d] are the last of the tokens of k [batch, kv_heads, kv_len, d] and v [..., v]; g [batch, heads,
kv_len] or with d behind, and beta [batch, heads, kv_len], may be None; so may the state [batch, heads, d, v] before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import getclosurevars, isfunction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.forms import Recurrence, identity
from manyheads.core.inputs import Inputs, Positions, as_rows

Base = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]
]  # fmt: skip

# A log decay below it, as that of a gate that is shut, is read as this by engines that sum log decays up: of it no
# float32 is left in one token either, and differences of sums stay numbers.
LEAST_DECAY = -177.0


def recur(form: Recurrence, x: Inputs, base: Base, by_value: Base, *, columns: int = 1) -> tuple[Tensor, Tensor]:
    """o, and the state behind the last token.

    by_value: as `base`, but that g [..., v] is of channels of the values, S_t = S_{t-1} diag(exp(g_t)) + k_t v_t^T, and
        q, k and v have as many heads.
    columns: how many ones are the value where keys are summed up; 1: as a column beside the values, and more: in a call
        of their own, for an engine that takes some widths only.
    """
    asks, here = present(x.q_positions, x), present(x.kv_positions, x)
    # Absent tokens may hold anything, and a feature may make infinity of it, or NaN.
    q = featured(form.query_feature, zeroed(x.q, asks))
    if not form.causal:
        o, end = _reduced(form, q, zeroed(x.k, here), zeroed(x.v, here), here, x.scale)
        return zeroed(o, asks), end
    k, v, g, beta, n = x.k, x.v, log_decays(form, x), x.operands.get("beta"), form.writes
    if n > 1:
        # A token is n tokens: the state decays before the first and is read behind the last.
        q = torch.stack([torch.zeros_like(q)] * (n - 1) + [q], 3).flatten(2, 3)
        k, v = _behind(k, x.operands["more_keys"]), _behind(v, x.operands["more_values"])
        g = None if g is None else torch.stack([g] + [torch.zeros_like(g)] * (n - 1), 3).flatten(2, 3)
        beta = None if beta is None else beta.flatten(2, 3)
        here = None if here is None else here.repeat_interleave(n, 2)
    k, v = zeroed(k, here), zeroed(v, here)
    k = zeroed(featured(form.key_feature, k), here)  # an absent token writes nothing and lets nothing decay
    if g is not None and here is not None:
        g = zeroed(g, here if g.ndim == 4 else here[..., 0])
    if form.write == "slots":
        assert g is not None, "slots declare it"
        o, end = _slots(q, k, v, g, x, base, by_value)
    elif form.normaliser == "sum":
        o, end = _normalised(form, q, k, v, g, beta, x, base, columns)
    else:
        o, end = base(q, k, v, g, beta, x.state, x.scale)
    return zeroed(o[:, :, n - 1 :: n], asks), end


def is_direct(form: Recurrence) -> bool:
    """Whether `recur` is one call of `base`, for what it was given."""
    return (
        form.causal
        and form.query_feature is form.key_feature is identity
        and form.decay is None
        and form.writes == 1
        and form.write != "slots"
        and form.normaliser == "none"
    )


def _behind(first: Tensor, others: Tensor) -> Tensor:
    """What a token writes one after the other, as tokens."""
    return torch.cat([first[:, :, :, None], others.to(first.dtype)], 3).flatten(2, 3)


def state_shape(form: Recurrence, x: Inputs) -> tuple[int, ...]:
    """Of what `recur` takes and returns."""
    if form.write == "slots":
        return x.batch, x.heads, form.operands["g"].shape(x.sizes)[-1], x.q.shape[3] + x.v_head_dim
    return x.batch, x.heads, key_width(form, x), x.v_head_dim + (form.normaliser == "sum")


# ---- features and decays ----


def featured(feature: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Computed in float32 or wider."""
    return t if feature is identity else feature(t.to(torch.promote_types(t.dtype, torch.float32))).to(t.dtype)


def key_width(form: Recurrence, x: Inputs) -> int:
    """How many numbers a key has behind its feature."""
    if form.key_feature is identity:
        return x.q.shape[3]
    of = _width.__wrapped__ if torch.compiler.is_compiling() else _width  # which warns of caches
    return of(form, x.kv_heads, x.q.shape[3], x.q.device)


@lru_cache(256)
def _width(form: Recurrence, kv_heads: int, head_dim: int, device: torch.device) -> int:
    return form.key_feature(torch.zeros(1, kv_heads, 1, head_dim, device=device)).shape[3]


def log_decays(form: Recurrence, x: Inputs) -> Tensor | None:
    """Of each token, [batch, heads, kv_len], or of its channels, with them behind; None without any."""
    g = x.operands.get("g")
    if form.decay is None:
        return g
    constant = _constant(form, x.heads, x.q.device).to(torch.promote_types(x.q.dtype, torch.float32))[None, :, None]
    if g is None:
        return constant.expand(x.batch, -1, x.kv_len)
    return constant + g if g.ndim == 3 else constant[..., None] + g


def _constant(form: Recurrence, heads: int, device: torch.device) -> Tensor:
    """The log decay of each head. Computed once, unless the function reads tensors, which may change, or somebody
    stands between: what is made then may be no tensor of numbers."""
    assert form.decay is not None, "log_decays looked"
    modes: int = torch._C._len_torch_dispatch_stack()  # type: ignore[attr-defined]  not declared
    if torch.compiler.is_compiling() or modes or _reads(form):
        return form.decay(torch.arange(heads, device=device), heads)
    return _computed(form, heads, device)


@lru_cache(256)
def _computed(form: Any, heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be used where gradients are wanted
        return form.decay(torch.arange(heads, device=device), heads)


@lru_cache(256)
def _reads(form: Recurrence) -> bool:
    if not isfunction(form.decay):  # a module, for instance
        return True
    seen = getclosurevars(form.decay)
    return any(isinstance(t, Tensor | torch.nn.Module) for t in (*seen.nonlocals.values(), *seen.globals.values()))


# ---- absent tokens ----


def present(positions: Positions, x: Inputs) -> Tensor | None:
    """bool [batch | 1, 1, len, 1], where a token is, or None if all are."""
    return None if not isinstance(positions, Tensor) else (as_rows(positions, x.q.device) >= 0)[:, None, :, None]


def zeroed(t: Tensor, here: Tensor | None) -> Tensor:
    return t if here is None else torch.where(here, t, 0.0)


def to_heads(t: Tensor, heads: int) -> Tensor:
    """Grouped heads side by side: a state belongs to each query head."""
    return t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] != heads else t


# ---- what is put together from calls ----


def _normalised(
    form: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, x: Inputs, base: Base,
    columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums of keys have the last column of the state."""
    if columns == 1:
        o, end = base(q, k, _with_one(v), g, beta, x.state, x.scale)
        return _divided(form, o[..., :-1], o[..., -1:]), end
    ones, before, sums = v.new_ones(columns).expand(*v.shape[:3], -1), None, None
    if x.state is not None:
        before, sums = x.state[..., :-1], x.state[..., -1:].expand(-1, -1, -1, columns)
    o, end = base(q, k, v, g, beta, before, x.scale)
    total, sums = base(q, k, ones, g, beta, sums, x.scale)
    return _divided(form, o, total[..., :1]), torch.cat([end, sums[..., :1]], -1)


def _reduced(
    form: Recurrence, q: Tensor, k: Tensor, v: Tensor, here: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Not causal: one state for all queries."""
    if form.key_softmax:
        k = k.softmax(2) if here is None else k.masked_fill(~here, -torch.inf).softmax(2).nan_to_num(0.0)
    k = zeroed(featured(form.key_feature, k), here)
    state = to_heads(k.mT @ (v if form.normaliser == "none" else _with_one(v)), q.shape[1])
    o = q * scale @ state
    return o if form.normaliser == "none" else _divided(form, o[..., :-1], o[..., -1:]), state


def _with_one(v: Tensor) -> Tensor:
    return F.pad(v, (0, 1), value=1.0)


def _divided(form: Recurrence, o: Tensor, total: Tensor) -> Tensor:
    """o is 0 where the sum is of nothing."""
    total = total if form.least is None else total.clamp(min=form.least)
    return o / torch.where(total == 0, 1.0, total)


def _slots(q: Tensor, k: Tensor, v: Tensor, g: Tensor, x: Inputs, base: Base, by_value: Base) -> tuple[Tensor, Tensor]:
    """Two recurrences, and between them a softmax over the slots: weights of slots are values first, and then keys."""
    k, v = to_heads(k, q.shape[1]), to_heads(v, q.shape[1])
    weights, keys, values = -torch.expm1(g).to(q.dtype), None, None
    if x.state is not None:
        keys, values = x.state[..., : k.shape[3]].mT, x.state[..., k.shape[3] :]
    scores, keys = by_value(q, k, weights, g, None, keys, x.scale)
    o, values = base(scores.softmax(-1), weights, v, g, None, values, 1.0)
    return o, torch.cat([keys.mT, values], -1)
