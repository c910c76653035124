"""The tiny language model of `tiny_lm` with four blocks: attention in some of them, a state in the others, or both."""

from __future__ import annotations

from typing import Any

from experiments.core import SLOW, Claim, Experiment, Mixer, lower
from experiments.hybrids import kept, side_by_side
from experiments.tiny_lm import BATCH, DIM, LENGTH, STEPS, Variant, at_most, attention, trained
from manyheads.core import Form

BLOCKS, FAR, WINDOW, MANY = 4, 4, LENGTH // 4, 64 * 1024
Setting = tuple[str | Form, dict[str, Any]]
ROTARY: Setting = ("causal", {})
NONE: Setting = ("causal", {"rope_theta": None})
KIMI: Setting = ("kimi_delta_attention", {"rope_theta": None, **SLOW})
DELTA: Setting = (
    "deltaproduct", {"products": 1, "gated": True, "negative": False, "rope_theta": None, **SLOW}
)  # fmt: skip
MAMBA: Setting = ("mamba2", {"expand": 1, "head_dim": 32, "state_dim": 32})
NEAR: Setting = ("sliding_window", {"window": WINDOW, "sinks": 0, "engine": "eager"})
BOTH: Setting = (side_by_side(WINDOW), {"rope_theta": None, **SLOW})


def in_turn(*blocks: Setting) -> Variant:
    """Settings for the first block, the second and so on, and from the start again."""
    return Variant(blocks[0][0], every=blocks, blocks=BLOCKS, places=False)


VARIANTS = {
    "causal": in_turn(ROTARY),
    "causal, no rotary": in_turn(NONE),
    "kimi": in_turn(KIMI),
    "kimi 3 : 1 causal": in_turn(KIMI, KIMI, KIMI, ROTARY),
    "kimi 3 : 1 causal, no rotary": in_turn(KIMI, KIMI, KIMI, NONE),
    "kimi 1 : 1 causal, no rotary": in_turn(KIMI, NONE),
    "sliding_window": in_turn(NEAR),
    "kimi 1 : 1 sliding_window": in_turn(KIMI, NEAR),
    "kimi beside a window": in_turn(BOTH),
    "gated delta rule": in_turn(DELTA),
    "gated delta rule 3 : 1 causal": in_turn(DELTA, DELTA, DELTA, ROTARY),
    "mamba2": in_turn(MAMBA),
    "mamba2 3 : 1 causal, no rotary": in_turn(MAMBA, MAMBA, MAMBA, NONE),
}


def run(name: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    numbers = trained(VARIANTS[name], seed, device, steps, far=FAR)
    mixers = [attention(VARIANTS[name], block) for block in range(BLOCKS)]
    if all(isinstance(mixer, Mixer) for mixer in mixers):
        numbers["kept"] = sum(kept(mixer, MANY) for mixer in mixers if isinstance(mixer, Mixer))
    return numbers


HYBRID = "kimi 3 : 1 causal, no rotary"
EXPERIMENT = Experiment(
    name="hybrid_lm",
    about=f"The same language model over bytes with {BLOCKS} blocks of width {DIM} and no learned positions, as large "
    f"as the others, {LENGTH} bytes of context, {BATCH * LENGTH} bytes a step. 3 : 1 is three blocks with a state and "
    f"one with attention, 1 : 1 is in turn; windows are of {WINDOW} bytes. Claims are also about the rest of texts "
    f"{FAR} times as long (loss_far) and about how many numbers are kept of {MANY} bytes (kept).",
    metric="loss", better="low", variants=tuple(VARIANTS), baseline="causal", run=run, steps=STEPS,
    claims=(
        Claim("kimi_delta_attention", "with three blocks of it to one of attention, loss is lower than with attention",
              at_most(HYBRID, "causal")),
        Claim("kimi_delta_attention", "and as low as with one to one, or lower (0.01 nats)",
              at_most(HYBRID, "kimi 1 : 1 causal, no rotary", plus=0.01)),
        Claim("kimi_delta_attention", "attention needs no rotary positions beside it (0.01 nats)",
              at_most(HYBRID, "kimi 3 : 1 causal", plus=0.01)),
        Claim("kimi_delta_attention", "and is better without them in texts longer than those of the training",
              (lower(HYBRID, "kimi 3 : 1 causal", "loss_far"),)),
        Claim("kimi_delta_attention", "three to one, a quarter of what attention keeps of 64k tokens is kept (26%)",
              (lower(HYBRID, "causal", "kept", factor=0.26),)),
        Claim("kimi_delta_attention", "lower loss than the gated delta rule, alone and with attention",
              (*at_most("kimi", "gated delta rule"),
               *at_most("kimi 3 : 1 causal", "gated delta rule 3 : 1 causal"))),
        Claim("hymba", "a window and a state side by side have lower loss than in turn",
              at_most("kimi beside a window", "kimi 1 : 1 sliding_window")),
        Claim("hymba", "and than either alone",
              (*at_most("kimi beside a window", "kimi"), *at_most("kimi beside a window", "sliding_window"))),
    ),
    also=("loss_far", "kept"),
)  # fmt: skip
