"""Attention buckets: copies of a model with several rotary bases vote on each token, so that none is overlooked.

    f(m; b) = 2 sum_{c < d/2} cos(m b^(-2c/d))    the score of a query of ones on a key of ones at distance m, base b
    z = sum_b w_b z_b,   w_b = softmax_b(max_v z_bv)    the logits z over words v, from those of each copy

As f goes up and down with distance, tokens in its troughs get little attention; another base has its troughs elsewhere.
`choose_bases` starts with the model's own base and adds, one by one, the base most of whose peaks meet troughs that are
still open, and the other way about. Every copy reads and keeps everything: cost and cache are those of a batch as many
times as large.

Chen, Lv, Lin, et al. "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for
Effective Tool Use." 2023. arXiv:2312.04455. Peaks are those of f's slow waves, here the highest within 50 positions;
the released code has another rule, and its search does not end at the published `BASES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.rotary_waves import BASES


def attention_buckets(model: Any, bases: Sequence[float] = BASES) -> ExitStack:
    """Let a causal language model with rotary positions run once for each base, and vote; then use `generate` as ever.

    Returns a context manager: leaving it, or `close()`, restores the model. Raises NotImplementedError for a model
    whose positions are not plain rotary ones. Beam search is not for it: it knows nothing of the copies.
    """
    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if len(rotary) != 1 or getattr(rotary[0], "rope_type", None) != "default":
        kinds = ", ".join(str(getattr(module, "rope_type", None)) for module in rotary) or "none"
        raise NotImplementedError(f"attention buckets need one plain rotary embedding; this model has: {kinds}")
    if not bases or not all(base > 1 for base in bases):
        raise ValueError(f"bases must be numbers above 1, at least one, not {tuple(bases)}")
    copies = len(bases)

    def multiplied(module: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if given.get("labels") is not None:
            raise ValueError("attention buckets vote while a model generates; they have no loss, so give no labels")
        if isinstance(given.get("attention_mask"), dict):
            raise NotImplementedError("attention buckets need an attention mask [batch, len], not one for each layer")
        inputs = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        several = {n: given[n].repeat(copies, *[1] * (given[n].ndim - 1)) for n in inputs if given.get(n) is not None}
        return tuple(t.repeat(copies, *[1] * (t.ndim - 1)) for t in args), {**given, **several}

    def turned(module: Any, args: tuple, given: dict[str, Any], out: Any) -> tuple[Tensor, Tensor]:
        x = args[0] if args else given["x"]
        positions = (given["position_ids"] if "position_ids" in given else args[1]).expand(len(x), -1)
        channels = torch.arange(len(module.inv_freq), device=x.device) / len(module.inv_freq)
        speed = torch.tensor(bases, device=x.device)[:, None] ** -channels
        angle = positions[..., None].float() * speed.repeat_interleave(len(x) // copies, 0)[:, None]
        angle = torch.cat([angle, angle], -1)
        cos, sin = ((part * module.attention_scaling).to(x.dtype) for part in (angle.cos(), angle.sin()))
        return cos, sin

    def voted(module: nn.Module, args: tuple, given: dict[str, Any], out: Any) -> Any:
        out.logits = vote(out.logits.unflatten(0, (copies, -1)))
        return out

    done = ExitStack()
    done.callback(model.register_forward_pre_hook(multiplied, with_kwargs=True).remove)
    done.callback(rotary[0].register_forward_hook(turned, with_kwargs=True).remove)
    done.callback(model.register_forward_hook(voted, with_kwargs=True).remove)
    return done


def vote(logits: Tensor) -> Tensor:
    """Logits of the copies [copies, ..., words] as one [..., words]: the surer a copy is, the more it counts."""
    weights = logits.float().amax(-1, keepdim=True).softmax(0)
    return (weights * logits).sum(0).to(logits.dtype)
