"""Cache layers that a model's cache gets in place of its plain ones: keys that are evicted, a state, operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from manyheads.cache.budgets import tokens
from manyheads.cache.eviction import keep
from manyheads.cache.policy import Context
from manyheads.integrations.transformers.plan import Plan


class _Layer(DynamicLayer):
    """What ours share. `held` names the attributes that are tensors [batch, ...]."""

    is_croppable = False
    held: tuple[str, ...] = ("keys", "values")

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.seen = 0  # tokens so far, padding and evicted ones included

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.__init__(self.plan)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"the cache of layer {self.plan.index} cannot be cropped: what {self._gives_up} cannot be put back, so "
                "assisted decoding and other rollbacks do not work with it"
            )

    _gives_up = "it has given up"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.held:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value))


class EvictingLayer(_Layer):
    """Keys and values that a policy thins out after each step's attention.

    positions: int64 [batch, 1 | kv_heads, n], where each stored token stands among its row's own tokens; -1 is free.
    budgets: int64 [batch] tokens that a row may keep; `most` and `fewest` bound them without asking the device.
    solid: no row has ever had padding, so no place is free.
    """

    held = ("keys", "values", "positions", "budgets")
    _gives_up = "a policy evicted"

    def __init__(self, plan: Plan):
        super().__init__(plan)
        assert plan.policy is not None and plan.budget is not None
        self.policy, self.budget = plan.policy, plan.budget
        self.positions: Tensor | None = None
        self.budgets: Tensor | None = None
        self.most = self.fewest = 0
        self.solid = True

    @property
    def whole(self) -> bool:
        """Nothing was evicted yet."""
        return self.keys is not None and self.keys.shape[2] == self.seen

    def place(self, new: Tensor, solid: bool) -> Tensor:
        """Record where the tokens of the last update stand, int64 [batch, q_len]. Returns positions."""
        self.solid = self.solid and solid
        more = new[:, None]
        if self.positions is not None:
            more = torch.cat([self.positions, more.expand(-1, self.positions.shape[1], -1)], 2)
        self.positions = more
        return more

    def evict(self, q: Tensor, q_positions: Tensor, scale: float) -> None:
        """Keep what the policy wants to keep, in storage of its own. q [batch, heads, q_len, head_dim]."""
        k, v, at, prompt = self.keys, self.values, self.positions, q.shape[2] > 1
        assert k is not None and v is not None and at is not None, "place and update come first"
        if self.budgets is None or prompt:
            # A share is of the tokens that a row has had when its prompt, or the latest part of it, ends.
            self.budgets = tokens(self.budget, at.amax((1, 2)) + 1, self.policy.least)
            if isinstance(self.budget, int):
                self.most = self.fewest = self.budget
            else:
                self.most, self.fewest = int(self.budgets.max()), int(self.budgets.min())
        heads, n = k.shape[1:3]
        if n <= self.fewest or (self.policy.when == "prefill" and not prompt):
            return
        with torch.no_grad():
            at = at.expand(-1, heads, -1)
            importance = self.policy.score(Context(q, k, v, q_positions, at, scale))
            index, self.positions = keep(importance, at[:, : importance.shape[1]], self.budgets, min(n, self.most))
        index = index.expand(-1, heads, -1)[..., None]
        self.keys = k.gather(2, index.expand(-1, -1, -1, k.shape[3]))
        self.values = v.gather(2, index.expand(-1, -1, -1, v.shape[3]))


class StateLayer(_Layer):
    """A recurrence's state in place of keys and values."""

    held = ("state",)
    _gives_up = "its state has taken in"

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.state: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.seen += key_states.shape[-2]
        return key_states, value_states


class OperandLayer(_Layer):
    """Keys and values, and beside them the operands that have a value for each token."""

    is_croppable = True

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.operands: dict[str, Tensor] = {}

    def extend(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Append the operands of this step's tokens. Returns those of all."""
        for name, value in new.items():
            if name in self.operands:
                value = torch.cat([self.operands[name], value], self._len(name))
            self.operands[name] = value
        return self.operands

    def crop(self, tokens_to_remove: int) -> None:
        DynamicLayer.crop(self, tokens_to_remove)
        self.seen += tokens_to_remove  # a negative number
        for name, value in self.operands.items():
            self.operands[name] = value.narrow(self._len(name), 0, self.seen)

    def _len(self, name: str) -> int:
        return self.plan.form.operands[name].names.index("len")

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        for name, value in self.operands.items():
            if self.plan.form.operands[name].names[0] == "batch":
                self.operands[name] = change(value)


def adopt(cache: Any, plan: Plan) -> _Layer | None:
    """Put the layer that the plan needs into a cache, unless it is there. Returns it, or None if any layer will do.

    Raises TypeError for caches that cannot be used, ValueError for one that was filled without this plan.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, not {type(cache).__name__}")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= plan.index:
        cache.layers.append(cache.layer_class_to_replicate())
    # Layers that share keys may have no place of their own.
    layer: Any = cache.layers[plan.index] if plan.index < len(cache.layers) else None
    wanted = _wanted(plan)
    if wanted is None:
        if isinstance(layer, StaticLayer | DynamicSlidingWindowLayer | _Layer):
            raise TypeError(_cannot(layer, plan))
        return None
    if type(layer) is wanted and layer.plan is plan:
        return layer
    if type(layer) is not DynamicLayer or cache.offloading:
        raise TypeError(_cannot(layer, plan, offloading=cache.offloading))
    if layer.get_seq_length():
        raise ValueError(
            f"layer {plan.index} of the cache holds {layer.get_seq_length()} tokens from before manyheads was applied; "
            "start with a new cache"
        )
    cache.layers[plan.index] = ours = wanted(plan)
    return ours


def _wanted(plan: Plan) -> type[_Layer] | None:
    if plan.recurrent:
        return StateLayer
    if plan.policy is not None:
        return EvictingLayer
    return OperandLayer if plan.stored_operands else None


def _cannot(layer: Any, plan: Plan, offloading: bool = False) -> str:
    if isinstance(layer, _Layer):
        return f"layer {plan.index} of the cache was filled under another manyheads.apply: start with a new cache"
    kind = "an offloaded cache" if offloading else f"a cache with a {type(layer).__name__}"
    return f"{plan.name} in layer {plan.index} cannot use {kind}; use the default, a DynamicCache"


def cache_bytes(past_key_values: Any) -> int:
    """The bytes that a cache really holds: every storage behind its tensors, once and whole.

    Keys, values, states, positions, operands: whatever the layers store, of this package or of transformers' own.
    """
    storages = {}
    for tensor in _tensors(past_key_values, set()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(x: Any, met: set[int]) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif id(x) in met or isinstance(x, Plan):
        return
    elif isinstance(x, dict):
        met.add(id(x))
        for value in x.values():
            yield from _tensors(value, met)
    elif isinstance(x, list | tuple):
        met.add(id(x))
        for value in x:
            yield from _tensors(value, met)
    elif isinstance(x, Cache | CacheLayerMixin) or type(x).__module__.startswith("transformers."):
        met.add(id(x))
        yield from _tensors(vars(x), met)
