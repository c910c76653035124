"""What is measured of a model with a mechanism or a policy in it: quality, speed, memory, and what was looked at."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # tokens a step when a text goes on after the prompt
DECODED = 16  # tokens a timed run of decoding


@dataclass(frozen=True)
class Text:
    """The tokens of a comparison: a prompt of `context` tokens and how it goes on, and a prompt with needles."""

    prompt: Tensor  # [1, context]
    rest: Tensor  # [1, n]
    haystack: Tensor  # [1, context]
    questions: tuple[Needle, ...]


@dataclass(frozen=True)
class Needle:
    depth: float
    question: Tensor  # [1, n]
    answer: Tensor  # [m]


def spread(runs: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": list(runs)}


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    sync(device)
    start = time.perf_counter()
    result = call()
    sync(device)
    return result, time.perf_counter() - start


# ---- running a causal language model ----


@torch.no_grad()
def prefill(model: Any, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Hidden states [1, len, dim] after the last norm, and the cache."""
    out = model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return out.last_hidden_state, out.past_key_values


@torch.no_grad()
def log_probs(model: Any, hidden: Tensor) -> Tensor:
    """Next-token log probabilities [..., vocabulary] in float32 from hidden states."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)


@torch.no_grad()
def read(model: Any, text: Text) -> tuple[Tensor, Any, float]:
    """Hidden states of prompt and rest, the cache after the prompt (a copy), and the prompt's seconds."""
    (hidden, cache), seconds = timed(lambda: prefill(model, text.prompt), text.prompt.device)
    after_prompt = copy.deepcopy(cache)
    parts = [hidden]
    for start in range(0, text.rest.shape[1], CHUNK):
        hidden, cache = prefill(model, text.rest[:, start : start + CHUNK], cache)
        parts.append(hidden)
    return torch.cat(parts, 1), after_prompt, seconds


# ---- quality ----


@torch.no_grad()
def against(model: Any, text: Text, hidden: Tensor, dense: Tensor, pieces: int = 16) -> dict[str, Any]:
    """Perplexity and KL(dense || this) of next-token distributions, by position and over what follows the prompt.

    Only there has a cache policy thrown anything away, so there every method is judged alike.
    """
    tokens = torch.cat([text.prompt, text.rest], 1)[0]
    losses, divergences = [], []
    for start in range(0, len(tokens) - 1, 256):
        cut = slice(start, min(start + 256, len(tokens) - 1))
        ours, theirs = log_probs(model, hidden[0, cut]), log_probs(model, dense[0, cut])
        losses.append(-ours.gather(-1, tokens[cut.start + 1 : cut.stop + 1, None])[:, 0])
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
    loss, kl = torch.cat(losses).double(), torch.cat(divergences).double()
    prompt = text.prompt.shape[1]
    cuts = [round(n * prompt / pieces) for n in range(pieces)] + list(range(prompt, len(tokens), CHUNK)) + [len(loss)]
    spans = [(a, b) for a, b in pairwise(cuts) if b > a]
    return {
        "perplexity": _exp(loss[prompt - 1 :].mean()),
        "by_position": [{"start": a, "end": b, "perplexity": _exp(loss[a:b].mean())} for a, b in spans],
        "kl": max(0.0, float(kl[prompt - 1 :].mean())),
        "kl_by_position": [{"start": a, "end": b, "kl": max(0.0, float(kl[a:b].mean()))} for a, b in spans],
    }


def _exp(loss: Tensor) -> float:
    value = float(loss)
    return math.exp(value) if value < 700 else math.inf


@torch.no_grad()
def needles(model: Any, text: Text) -> tuple[list[dict[str, Any]], float]:
    """For each needle whether greedy decoding would answer with it, and the answer's mean log probability; seconds.

    The questions come after the haystack has been read and cut, one by one, each from a copy of the same cache.
    """
    (_, cache), seconds = timed(lambda: prefill(model, text.haystack), text.haystack.device)
    found = []
    for needle in text.questions:
        asked = torch.cat([needle.question, needle.answer[None, :-1]], 1)
        hidden, _ = prefill(model, asked, copy.deepcopy(cache))
        probs = log_probs(model, hidden[0, -len(needle.answer) :])
        found.append(
            {
                "depth": needle.depth,
                "found": bool((probs.argmax(-1) == needle.answer).all()),
                "log_probability": float(probs.gather(-1, needle.answer[:, None]).mean()),
            }
        )
    return found, seconds


# ---- speed ----


@torch.no_grad()
def decoding(model: Any, cache: Any, last: Tensor, repeats: int) -> list[float]:
    """Tokens a second of greedy decoding after the prompt, in `repeats` runs that go on from each other."""
    token, speeds = last, []
    for _ in range(repeats):

        def run() -> None:
            nonlocal token, cache
            for _ in range(DECODED):
                hidden, cache = prefill(model, token, cache)
                token = log_probs(model, hidden[:, -1]).argmax(-1, keepdim=True)

        _, seconds = timed(run, last.device)
        speeds.append(DECODED / seconds)
    return speeds
