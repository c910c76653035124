"""Queries and keys of a transformers model, as its attention layers get them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def queries_and_keys(model: Any, tokens: Tensor, layers: Iterable[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """The first two of what `queries_keys_and_values` gives."""
    return {layer: (q, k) for layer, (q, k, _) in queries_keys_and_values(model, tokens, layers).items()}


@torch.no_grad()
def queries_keys_and_values(
    model: Any, tokens: Tensor, layers: Iterable[int]
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """{layer: (q [1, heads, len, head_dim], k [1, kv_heads, len, head_dim], v)} after rotary positions, for `layers`.

    The model is run once, without a cache, and left as it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wanted, seen = set(layers), {}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def capture(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx in wanted:
            seen[module.layer_idx] = tuple(x.detach().clone() for x in (query, key, value))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    name, before = "manyheads_capture", model.config._attn_implementation
    AttentionInterface.register(name, capture)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen
