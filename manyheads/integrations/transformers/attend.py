"""The attention and mask functions that transformers calls, and the hook that goes before them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from manyheads.core.forms import Form, inverse_sqrt
from manyheads.dispatch import attention
from manyheads.integrations.transformers.layers import EvictingLayer, OperandLayer, StateLayer, adopt
from manyheads.integrations.transformers.plan import ATTRIBUTE, CALL, OPERANDS, Call, Plan

# Arguments that change what attention computes, and that no mechanism here takes from a model.
REFUSED = {
    "softcap": "a soft-cap on the scores",
    "s_aux": "learned attention sinks",
    "position_bias": "a bias added to the scores",
    "indices": "a selection of keys of its own",
    "block_indices": "a selection of key blocks of its own",
    "sliding_window": "a sliding window of its own",
    "cu_seq_lens_q": "sequences packed into one row",
    "cu_seq_lens_k": "sequences packed into one row",
    "cache": "paged attention (continuous batching)",
}


class Implementation(str):
    """The name that the configuration holds while manyheads is applied; it remembers the one before."""

    original: str


# ---- what transformers calls ----


def mask(*, config: Any, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None,
         local_size: int | None = None, **rest: Any) -> Any:  # fmt: skip
    """For plain causal layers the padding mask, bool [batch, len], or None without padding: `attend` does the rest. For
    other layers, and for masks that are more than causal, what the model's own implementation makes."""
    if mask_function is causal_mask_function and local_size is None:
        if attention_mask is None or torch.compiler.is_compiling():
            return attention_mask
        return None if bool(attention_mask.all()) else attention_mask
    original = getattr(config._attn_implementation, "original", None)
    if original is None:
        raise RuntimeError("the attention implementation 'manyheads' is set by manyheads.apply, not by its name")
    if local_size is None and "flash" in original:
        # Such masks are dropped for flash attention; our layers would not know that there was one.
        raise NotImplementedError(f"{_MORE_THAN_CAUSAL}; with attn_implementation='sdpa' other layers would have them")
    if local_size is not None:
        rest["local_size"] = local_size
    own = ALL_MASK_ATTENTION_FUNCTIONS[original]
    return own(config=config, mask_function=mask_function, attention_mask=attention_mask, **rest)


_MORE_THAN_CAUSAL = (
    "manyheads handles causal masks with padding, not others (sequences packed by position_ids, image tokens that see "
    "each other, 4D masks)"
)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [batch, heads, q_len, head_dim]; key, value [batch, kv_heads, kv_len, ...] with what the cache held.

    Returns (o [batch, q_len, heads, v_head_dim], None). Raises for what it cannot honour.
    """
    plan, call = vars(module).get(ATTRIBUTE), rest.get(CALL)
    if plan is None or call is None:
        raise RuntimeError(
            f"{type(module).__name__} was not prepared for manyheads: it came after manyheads.apply, or it keeps its "
            "keyword arguments to itself"
        )
    _refuse(module, attention_mask, dropout, is_causal, rest)
    operands: dict[str, Any] = {name: source(call.hidden) for name, source in _sources(module)}
    scale = scaling if _takes_the_models_scale(plan.form, query.shape[3]) else None
    match call.layer:
        case EvictingLayer():
            o = _evicting(plan, call.layer, query, key, value, attention_mask, scale, operands)
        case StateLayer():
            o = _recurrent(plan, call.layer, query, key, value, attention_mask, scale, operands)
        case _:
            if isinstance(call.layer, OperandLayer):
                stored = call.layer.extend({name: operands[name] for name in plan.stored_operands})
                operands = {**operands, **stored}
            at = None if attention_mask is None else _positions(attention_mask, key.shape[2])
            o = attention(
                query, key, value, plan.form, engine=plan.engine, scale=scale,
                q_positions=None if at is None else at[:, -query.shape[2] :], kv_positions=at, **operands,
            )  # fmt: skip
    return o.transpose(1, 2).contiguous(), None


def _sources(module: Any) -> Iterable[tuple[str, nn.Module]]:
    return getattr(module, OPERANDS, {}).items()


def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The forward pre-hook of an attention module: find its cache layer, and hand it to `attend`."""
    plan = vars(module)[ATTRIBUTE]
    given = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
    past = next((given[name] for name in ("past_key_values", "layer_past") if given.get(name) is not None), None)
    if past is None and plan.policy is not None:
        raise ValueError(f"{plan.policy.name} evicts from a cache, and this call has none: use_cache must not be False")
    layer = None if past is None else adopt(past, plan)
    call = Call(layer, given["hidden_states"] if plan.form.operands else None)
    return args, {**kwargs, CALL: call}


@cache
def _parameters(module: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)[1:]


# ---- the three ways to hold what was ----


def _evicting(
    plan: Plan, layer: EvictingLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
    operands: dict[str, Any],
) -> Tensor:  # fmt: skip
    batch, heads, q_len, head_dim = q.shape
    i = _new_positions(mask, layer.seen, q)
    j = layer.place(i, solid=mask is None)
    run = partial(attention, mechanism=plan.form, engine=plan.engine, scale=scale)
    if layer.solid and (layer.whole or plan.positionless):
        o = run(q, k, v, **operands)
    elif j.shape[1] == 1:
        o = run(q, k, v, q_positions=i, kv_positions=j[:, 0], **operands)
    else:
        # Heads hold different tokens: each becomes a row of its own, with its group of query heads.
        kv_heads = k.shape[1]
        o = run(
            q.reshape(batch * kv_heads, heads // kv_heads, q_len, head_dim),
            k.flatten(0, 1)[:, None],
            v.flatten(0, 1)[:, None],
            q_positions=i.repeat_interleave(kv_heads, 0),
            kv_positions=j.flatten(0, 1),
        ).reshape(batch, heads, q_len, -1)
    layer.evict(q, i, plan.form.default_scale(head_dim) if scale is None else scale)
    return o


def _recurrent(
    plan: Plan, layer: StateLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
    operands: dict[str, Any],
) -> Tensor:  # fmt: skip
    at = None if mask is None else _new_positions(mask, layer.seen, q)
    o, layer.state = attention(
        q, k, v, plan.form, engine=plan.engine, scale=scale, q_positions=at, kv_positions=at, state=layer.state,
        return_state=True, **operands,
    )  # fmt: skip
    return o


# ---- positions ----


def _positions(mask: Tensor, length: int) -> Tensor:
    """Where each token stands among its row's own: int64 [batch, length], -1 where the mask is False."""
    if mask.shape[1] != length:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {length} with those in the cache"
        )
    present = mask.bool()
    return torch.where(present, present.cumsum(1) - 1, -1)


def _new_positions(mask: Tensor | None, seen: int, q: Tensor) -> Tensor:
    """The positions of the queries, the last q_len of `seen` tokens: int64 [batch, q_len]."""
    batch, _, q_len, _ = q.shape
    if mask is None:
        return torch.arange(seen - q_len, seen, device=q.device).expand(batch, -1)
    return _positions(mask, seen)[:, seen - q_len :]


def _takes_the_models_scale(form: Form, head_dim: int) -> bool:
    """A mechanism with a scale of its own keeps it; softmax attention takes what the model was trained with."""
    return form.default_scale(head_dim) == inverse_sqrt(head_dim)


def _refuse(module: Any, mask: Any, dropout: float, is_causal: bool | None, rest: dict[str, Any]) -> None:
    who = f"{type(module).__name__} {module.layer_idx}"
    for name, what in REFUSED.items():
        if rest.get(name) is not None:
            raise NotImplementedError(f"{who} asks for {what} ({name}), which manyheads does not do")
    if dropout:
        raise NotImplementedError(
            f"{who} asks for attention dropout {dropout}, which manyheads does not do: set it to 0"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{who} asks for attention that is not causal, which manyheads does not do here")
    if rest.get("output_attentions"):
        raise NotImplementedError(f"{who} is asked for attention weights (output_attentions), which are never made")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        got = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise NotImplementedError(f"{who} was given {got} as its mask: {_MORE_THAN_CAUSAL}")
