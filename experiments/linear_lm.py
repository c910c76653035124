"""The tiny language model of `tiny_lm`, with what keeps a state in place of attention."""

from __future__ import annotations

from typing import Any

from experiments.core import SLOW, Claim, Experiment
from experiments.tiny_lm import BATCH, BLOCKS, DIM, LENGTH, STEPS, Variant, at_most, beats, of, trained

WINDOW = LENGTH // 4
MEMORY = {"window": LENGTH // 2, "chunk": LENGTH // 2, "widen": 1}


def recurrent(name: str, **settings: Any) -> Variant:
    """Without rotary positions: what fades tells how long ago it was."""
    return of(name, rope_theta=None, **settings)


def in_turn(name: str, *settings: dict[str, Any]) -> Variant:
    """Settings for the first block and for the second."""
    return Variant(name, every=tuple((name, each) for each in settings))


def by_layer(name: str, **settings: Any) -> Variant:
    return in_turn(name, *({"layer": i, "layers": BLOCKS, **settings} for i in range(BLOCKS)))


def transnormer(variant: int, *parts: str) -> Variant:
    return in_turn("transnormer", *({"part": p, "variant": variant, "block_size": WINDOW} for p in parts))


VARIANTS = {
    "causal": of("causal"),
    "causal, 8 heads": of("causal", heads=8),
    "causal, no rotary": of("causal", rope_theta=None),
    "lightning_attention": by_layer("lightning_attention", rope_theta=None),
    "lightning_attention_2": by_layer("lightning_attention_2", rope_theta=None),
    "state_space_duality": recurrent("state_space_duality"),
    "gated delta rule": recurrent("deltaproduct", products=1, gated=True, negative=False, **SLOW),
    "deltaproduct": recurrent("deltaproduct"),
    "deltaproduct, gated": recurrent("deltaproduct", gated=True, **SLOW),
    "kimi_delta_attention": recurrent("kimi_delta_attention", **SLOW),
    "gated_slot_attention": recurrent("gated_slot_attention", slots=16),
    "fastmax p=2, 8 heads": of("fastmax", heads=8),
    "fastmax p=1, 8 heads": of("fastmax", heads=8, p=1),
    "aaren": of("aaren"),
    "audio_mamba fo-fo": of("audio_mamba", variant="fo-fo"),
    "chela": of("chela", long=LENGTH),
    "hymba": of("hymba", expand=1, meta=8),
    "hymba, a quarter in sight": of("hymba", expand=1, meta=8, window=WINDOW),
    "mamba2": of("mamba2", head_dim=32, state_dim=32),
    "matvlm": of("matvlm"),
    "mega": of("mega", values=DIM),
    "mega laplace": of("mega", values=DIM, kind="laplace"),
    "mega in chunks": of("mega", values=DIM, chunk=WINDOW),
    "s4d": of("s4d"),
    "titans lmm": of("titans", variant="lmm", **MEMORY),
    "titans mac": of("titans", variant="mac", **MEMORY),
    "titans mag": of("titans", variant="mag", **MEMORY),
    "titans mal": of("titans", variant="mal", **MEMORY),
    "transnormer T1, diag and norm": transnormer(1, "diag", "norm"),
    "transnormer T1, norm and diag": transnormer(1, "norm", "diag"),
    "transnormer T2, diag and norm": transnormer(2, "diag", "norm"),
    "transnormer T2, norm and diag": transnormer(2, "norm", "diag"),
    "transnormerllm": by_layer("transnormerllm"),
}


def run(name: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    return trained(VARIANTS[name], seed, device, steps)


EXPERIMENT = Experiment(
    name="linear_lm",
    about=f"The same language model over bytes, for what keeps a state: {BLOCKS} blocks of width {DIM}, {LENGTH} bytes "
    f"of context, {BATCH * LENGTH} bytes a step; windows, blocks and chunks are of {WINDOW} bytes, "
    f"those of titans of {LENGTH // 2}.",
    metric="loss", better="low", variants=tuple(VARIANTS), baseline="causal", run=run, steps=STEPS,
    claims=(
        Claim("transnormerllm", "at most 0.02 nats above softmax attention",
              at_most("transnormerllm", "causal", plus=0.02)),
        Claim("fastmax", "p = 2 is within 5% of softmax attention",
              at_most("fastmax p=2, 8 heads", "causal, 8 heads", factor=1.05)),
        *(Claim("transnormer", f"{kind}: blocks of tokens below and a norm above are better than the other way round",
                beats(f"transnormer {kind}, diag and norm", f"transnormer {kind}, norm and diag"))
          for kind in ("T1", "T2")),
    ),
)  # fmt: skip
