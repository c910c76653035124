"""The main job: many attentions and cache policies on one model and one text, side by side.

Each row is measured whole, then written; a run that was stopped goes on from the rows it finished.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyheads.evaluate import measure, models, results, texts
from manyheads.evaluate.bench import STEPS, bench
from manyheads.evaluate.specs import DENSE, Spec, defaults, fit, parse_list
from manyheads.mechanisms import get

REST = 256  # tokens that are scored after the prompt
CONTEXT = {"cpu": 2048, "cuda": 8192}
SHORTEST = 256
NEEDLES = (
    ("Paris", "marble"), ("London", "copper"), ("Tokyo", "velvet"), ("Cairo", "orange"),
    ("Lima", "silver"), ("Oslo", "butter"), ("Delhi", "thunder"), ("Rome", "pepper"),
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """Told to whoever watches: the results so far, the row under way, its step, steps done and in all."""

    results: dict[str, Any]
    row: str
    step: str
    done: int
    total: int


Watch = Callable[[Progress], None]


def run(
    text: Sequence[str] | None = None,
    *,
    model: str | None = None,
    mechanisms: str | None = None,
    context: int | None = None,
    out: str | Path = "manyheads-compare",
    repeats: int = 3,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    fresh: bool = False,
    watch: Watch = lambda progress: None,
) -> dict[str, Any]:
    """Compare and write `compare.json` into the folder `out`; returns what it holds.

    text: files, "-" for standard input, or None for the documentation that every Python carries.
    model: a transformers id or folder, or None for SmolLM2-135M-Instruct.
    mechanisms: `name(setting=value, ...)` with commas between, or None for all; dense is always measured.
    context: tokens of the prompt; by default 2048 on a CPU and 8192 on a GPU, or what the text is long enough for.
    repeats: timed runs of each speed. seed: of everything drawn at random. fresh: measure again what is there.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, not {repeats}")
    content = texts.read(text)
    if context is not None and context < SHORTEST:
        raise ValueError(f"context must be {SHORTEST} tokens or more, not {context}")
    asked = parse_list(mechanisms) if mechanisms else None
    folder = _folder(out)
    loaded = models.load(model, device=device, dtype=dtype)
    torch.manual_seed(seed)
    tokens = _tokens(loaded, content.content)
    length = _context(context, loaded, content.name, len(tokens))
    material = _material(loaded, tokens, length)
    specs = [DENSE, *(fit(s, length) for s in asked if s != DENSE)] if asked else defaults(length)
    _check_settings(specs, loaded)
    about = {"name": content.name, "sha256": content.sha256, "tokens": len(tokens)}
    found = results.start(folder, loaded, about, length, REST, seed, repeats, fresh)
    return _run(found, folder, loaded, material, specs, watch)


# ---- what is compared ----


def _folder(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder} cannot be written to; name another folder")
    return folder


def _context(asked: int | None, loaded: models.Loaded, text: str, tokens: int) -> int:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if asked is None:
        fits = min(CONTEXT.get(loaded.model.device.type, 2048), limit - 2 * REST, tokens - REST)
        if fits < SHORTEST:
            raise texts.TextError(
                f"{text} has {tokens} tokens; a comparison needs {SHORTEST + REST} or more: give a longer text"
            )
        return fits // 64 * 64
    if asked + 2 * REST > limit:
        raise ValueError(
            f"context {asked} and what follows it ({2 * REST}) exceed the {limit} positions of {loaded.name}; "
            f"take {limit - 2 * REST} or less"
        )
    if asked + REST > tokens:
        raise texts.TextError(
            f"{text} has {tokens} tokens; context {asked} needs {asked + REST}: "
            f"give a longer text or a context of {max(0, tokens - REST)} or less"
        )
    return asked


def _tokens(loaded: models.Loaded, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _material(loaded: models.Loaded, ids: list[int], context: int) -> measure.Text:
    """The prompt and how it goes on, from the text's start; and the same text's end, with needles in it."""
    device = loaded.model.device
    planted = [_tokens(loaded, f" The secret word of {city} is {word}.") for city, word in NEEDLES]
    hay = ids[-(context - sum(map(len, planted))) :]
    depths = [(n + 0.5) / len(NEEDLES) for n in range(len(NEEDLES))]
    haystack, start = [], 0
    for depth, sentence in zip(depths, planted, strict=True):
        cut = round(depth * len(hay))
        haystack += hay[start:cut] + sentence
        start = cut
    haystack += hay[start:]
    questions = tuple(
        measure.Needle(
            depth,
            torch.tensor([_tokens(loaded, f"\n\nThe secret word of {city} is")], device=device),
            torch.tensor(_tokens(loaded, f" {word}"), device=device),
        )
        for depth, (city, word) in zip(depths, NEEDLES, strict=True)
    )
    return measure.Text(
        torch.tensor([ids[:context]], device=device),
        torch.tensor([ids[context : context + REST]], device=device),
        torch.tensor([haystack], device=device),
        questions,
    )


def _check_settings(specs: Sequence[Spec], loaded: models.Loaded) -> None:
    """Bad settings are found before anything is measured."""
    from manyheads.cache import budgets, policies

    layers = loaded.model.config.get_text_config().num_hidden_layers
    for spec in specs:
        try:
            if spec.kind == "mechanism":
                get(spec.name)(**spec.settings)
            elif spec.kind == "policy":
                rest = {name: value for name, value in spec.settings.items() if name != "budget"}
                least = policies.get(spec.name)(**rest).least
                if "budget" in spec.settings:
                    budgets.per_layer(spec.settings["budget"], layers, least)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{spec}: {error}") from None


def _run(
    found: dict[str, Any], folder: Path, loaded: models.Loaded, material: measure.Text, specs: Sequence[Spec],
    watch: Watch,
) -> dict[str, Any]:  # fmt: skip
    have = {row["spec"] for row in found["rows"] + found["untrained"]}
    missing = [spec for spec in specs if str(spec) not in have]
    wanted = [str(spec) for spec in specs]
    found["asked"] = wanted
    steps = len(STEPS) * len(specs)
    done = steps - len(STEPS) * len(missing)

    def say(spec: str, step: str) -> None:
        nonlocal done
        watch(Progress(found, spec, step, done, steps))
        done += step != ""

    if missing:
        measure_row = bench(found, loaded.model, material, found["repeats"], say)
        for spec in missing:
            row, untrained = measure_row(spec)
            found["untrained" if untrained else "rows"].append(row)
            results.save(found, folder)
    # Rows of an earlier run that were not asked for today stay, behind today's: they were measured alike.
    order = {spec: n for n, spec in enumerate(wanted)}
    for part in ("rows", "untrained"):
        found[part].sort(key=lambda row: order.get(row["spec"], len(order)))
    found["complete"] = True
    results.save(found, folder)
    watch(Progress(found, "", "", steps, steps))
    return found
