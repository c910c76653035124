"""A model's attention modules: which can be changed, which are left alone, and what nothing here supports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# Layer types of transformers, and why they stay as they are.
LEFT_ALONE = {
    "sliding_attention": "sliding: it keeps a window of its own",
    "chunked_attention": "chunked: it keeps to a chunk of its own",
    "linear_attention": "linear: it has a state instead of keys",
    "conv": "a convolution: it has no keys",
    "mamba": "a state-space layer: it has no keys",
    "moe": "it has no attention",
    "mlp": "it has no attention",
}
FULL = ("full_attention", "attention")


@dataclass(frozen=True, eq=False)
class Found:
    """One attention module of a decoder. why: "" if it can be changed; shared: it reads another layer's keys."""

    index: int
    module: nn.Module
    why: str = ""
    shared: bool = False


def survey(model: Any) -> tuple[Any, list[Found]]:
    """The decoder's configuration, and its attention modules in order.

    Raises TypeError if this is no decoder of transformers, NotImplementedError for what no mechanism can honour.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"apply takes a model of transformers, not {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    _refuse_model(model, config)
    found = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal"):
            if getattr(module, "config", None) is not config:
                continue
            found.append(_look_at(module, config))
    found.sort(key=lambda one: one.index)
    if len({one.index for one in found}) != len(found) or not found:
        raise NotImplementedError(
            f"manyheads finds {len(found)} attention modules in {type(model).__name__}; it needs one for each layer "
            "with attention"
        )
    return config, found


def layer_type(config: Any, index: int) -> str:
    """A layer's type in the words of transformers."""
    if types := getattr(config, "layer_types", None):
        return types[index]
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "chunked_attention" if getattr(config, "attention_chunk_size", None) is not None else "full_attention"


def _look_at(module: Any, config: Any) -> Found:
    index = module.layer_idx
    kind = layer_type(config, index)
    if kind in LEFT_ALONE:
        return Found(index, module, LEFT_ALONE[kind])
    if kind not in FULL:
        raise NotImplementedError(f"layer {index} is of type {kind!r}, which manyheads does not know")
    _refuse_module(module, config)
    if getattr(module, "is_kv_shared_layer", False):
        return Found(index, module, "kv-shared: it reads the keys of another layer", shared=True)
    return Found(index, module)


def _refuse_model(model: Any, config: Any) -> None:
    name = type(model).__name__
    crossing = any("crossattention" in type(module).__name__.lower() for module in model.modules())
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False) or crossing:
        raise NotImplementedError(f"{name} has cross-attention, whose keys are no past of its queries")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False) is True:
        raise NotImplementedError(f"{name} is not causal: its tokens see later ones, which a cache does not have")


def _refuse_module(module: Any, config: Any) -> None:
    who = f"{type(module).__name__} {module.layer_idx}"
    if not module.is_causal:
        raise NotImplementedError(f"{who} is not causal: its tokens see later ones, which a cache does not have")
    cap = getattr(module, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None))
    if cap is not None:
        raise NotImplementedError(f"{who} has a soft-cap on its scores ({cap}), which manyheads does not do")
    if getattr(module, "sinks", None) is not None:
        raise NotImplementedError(f"{who} has learned attention sinks, which manyheads does not do")
    if hasattr(module, "kv_lora_rank"):
        raise NotImplementedError(f"{who} is multi-head latent attention (MLA), whose cache manyheads does not handle")
    if getattr(config, "alibi", False) is True:
        raise NotImplementedError(f"{who} adds position biases (ALiBi) to its scores, which manyheads does not do")
