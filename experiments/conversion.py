"""A trained language model, a quarter of whose attention becomes Mamba-2 layers, distilled into itself (MaTVLM)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.core import Claim, Experiment, above, count, fit, lower
from manyheads.layers.linear.matvlm import MaTVLM, distillation_losses

EVERY, LENGTH, BATCH, HELD, AT = 4, 256, 4, 16, 20  # layers; tokens; windows to train on, and held out; steps
VARIANTS = {
    "from attention": (True, 1.0),
    "from attention, norms of 0.1": (True, 0.1),
    "random": (False, 1.0),
    "random, norms of 0.1": (False, 0.1),
}


class Converted(nn.Module):
    """A new layer in the place of an attention of transformers, which stays beside it as its teacher."""

    def __init__(self, old: Any, from_attention: bool, norm: float):
        super().__init__()
        projections = [getattr(old, f"{name}_proj").weight for name in "qkvo"]
        head_dim = old.head_dim
        heads, kv_heads = (len(w) // head_dim for w in projections[:2])
        self.new: Any
        if from_attention:
            self.new = MaTVLM.from_attention(*projections, heads=heads)
        else:
            self.new = MaTVLM(projections[0].shape[1], heads, kv_heads=kv_heads, head_dim=head_dim).to(projections[0])
        nn.init.constant_(self.new.norm.weight, norm)
        self.old, self.teaches = old, False
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        if self.teaches:
            return self.old(hidden_states, **given)[0], None
        y = self.new(hidden_states)
        if self.training:
            with torch.no_grad():
                self.pair = y, self.old(hidden_states, **given)[0]
        return y, None


def convert(model: Any, from_attention: bool, norm: float) -> list[Converted]:
    """Every fourth layer of a Llama, from the first one on. Nothing but the new layers is trained."""
    model.requires_grad_(False)
    converted = []
    for layer in model.model.layers[::EVERY]:
        layer.self_attn = Converted(layer.self_attn, from_attention, norm)
        layer.self_attn.new.requires_grad_(True)
        converted.append(layer.self_attn)
    return converted


@contextmanager
def teacher(converted: list[Converted]) -> Iterator[None]:
    """The model as it was."""
    for one in converted:
        one.teaches = True
    try:
        with torch.no_grad():
            yield
    finally:
        for one in converted:
            one.teaches = False


@torch.no_grad()
def judged(model: Any, converted: list[Converted], windows: Tensor) -> dict[str, float]:
    """Nats a token of KL(teacher || student), and how often either has the next token first."""
    sums = torch.zeros(3)
    for tokens in windows.split(BATCH):
        with teacher(converted):
            theirs = model(tokens, use_cache=False).logits[:, :-1].float()
        ours = model(tokens, use_cache=False).logits[:, :-1].float()
        kl = F.kl_div(F.log_softmax(ours, -1), F.log_softmax(theirs, -1), log_target=True, reduction="none").sum(-1)
        right = [(logits.argmax(-1) == tokens[:, 1:]).float().mean() for logits in (ours, theirs)]
        sums += len(tokens) * torch.stack([kl.mean(), *right]).cpu()
    kl, accuracy, best = (sums / len(windows)).tolist()
    return {"kl": kl, "accuracy": accuracy, "kept": accuracy / best if best else math.nan}


def distilled(model: Any, windows: Tensor, held: Tensor, start: tuple[bool, float], steps: int) -> dict[str, Any]:
    """windows [steps * BATCH, LENGTH] are read once, in their order."""
    converted = convert(model.eval(), *start)
    curve = {0: judged(model, converted, held)}

    def loss(step: int) -> Tensor:
        if step and step % AT == 0:
            model.eval()
            curve[step] = judged(model, converted, held)
        model.train()  # a Llama has no dropout; the new layers keep what they gave
        tokens = windows[step * BATCH : (step + 1) * BATCH]
        with teacher(converted):
            theirs = model(tokens, use_cache=False).logits
        ours = model(tokens, use_cache=False).logits
        pairs = [one.pair for one in converted if one.pair is not None]
        parts = distillation_losses(ours, theirs, *zip(*pairs, strict=True))
        return parts["logits"] + parts["layers"]

    seconds = fit(model, loss, steps, lr=1e-3, warmup=20)
    curve[steps] = judged(model, converted, held)
    half = next(curve[step] for step in sorted(curve) if step >= steps / 2)
    return {
        **curve[steps], "kl_at_start": curve[0]["kl"], "kept_at_half": half["kept"],
        "curve": [[step, at["kl"]] for step, at in curve.items()],
        "parameters": count([one.new for one in converted]), "seconds_per_step": seconds,
    }  # fmt: skip


def run(variant: str, seed: int, device: str, steps: int) -> dict[str, Any]:
    from manyheads.evaluate import models, texts

    torch.manual_seed(seed)
    loaded = models.load(device=device, dtype="float32")
    ids = loaded.tokenizer(texts.read().content, add_special_tokens=False, verbose=False).input_ids
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    train, held = windows[:-HELD], windows[-HELD:]
    order = torch.randint(len(train), (steps * BATCH,), generator=torch.Generator().manual_seed(1000 + seed))
    return distilled(loaded.model, train[order].to(device), held.to(device), VARIANTS[variant], steps)


EXPERIMENT = Experiment(
    name="conversion",
    about="SmolLM2-135M-Instruct, of whose 30 layers of attention every fourth becomes a Mamba-2 layer, trained alone "
    f"on {BATCH * LENGTH} tokens a step of Python's documentation to say what the whole model says: KL(teacher || "
    "student) in nats a token, on text held out.",
    metric="kl",
    better="low",
    variants=tuple(VARIANTS),
    baseline="random",
    run=run,
    steps=300,
    also=("kl_at_start", "kept_at_half"),
    claims=(
        Claim("matvlm", "from attention's weights, the student starts nearer to the teacher than at random",
              (lower("from attention", "random", "kl_at_start"),)),
        Claim("matvlm", "so it does if either starts with norms of 0.1",
              (lower("from attention, norms of 0.1", "random, norms of 0.1", "kl_at_start"),)),
        Claim("matvlm", "and it ends nearer to it", (lower("from attention", "random", "kl"),)),
        Claim("matvlm", "and has 95% of the teacher's accuracy after half of the steps",
              (above("from attention", "kept_at_half", 0.95),)),
    ),
)  # fmt: skip
