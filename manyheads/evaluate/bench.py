"""One row of a comparison, measured whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import manyheads
from manyheads.core.forms import Recurrence
from manyheads.evaluate import measure
from manyheads.evaluate.looked import looked
from manyheads.evaluate.specs import Spec
from manyheads.mechanisms import get

STEPS = ("reading", "needles", "timing", "decoding", "looking")


def bench(
    results: dict[str, Any], model: Any, material: measure.Text, repeats: int, say: Callable[[str, str], None]
) -> Callable[[Spec], tuple[dict[str, Any], bool]]:
    """A function that measures one row; what all rows share is measured once."""
    from manyheads.integrations.capture import queries_and_keys

    measure.prefill(model, material.prompt[:, :256])  # the first call of a process is slow: keep it out
    dense_hidden, dense_cache, _ = measure.read(model, material)
    dense = {"hidden": dense_hidden, "bytes": manyheads.cache_bytes(dense_cache)}
    del dense_cache
    middle = model.config.get_text_config().num_hidden_layers // 2
    tensors = queries_and_keys(model, material.prompt, (middle, middle + 1))

    def measure_row(spec: Spec) -> tuple[dict[str, Any], bool]:
        untrained = spec.kind == "mechanism" and get(spec.name).trained
        row = _row(spec)
        if untrained:
            _measure_untrained(row, spec, model, material, tensors, repeats, say)
            return row, True
        row["error"] = _refusal(model, spec)
        if row["error"]:
            return row, False
        with _applied(model, spec) as applied:
            row["label"] = applied.label if applied else "dense"
            row["engine"] = _engine(spec, model, tensors)
            _measure(row, spec, model, material, dense, repeats, say)
        say(str(spec), "looking")
        _look(row, spec, tensors)
        _relate(row, results)
        return row, False

    return measure_row


def _row(spec: Spec) -> dict[str, Any]:
    from manyheads.cache import policies

    known = {"mechanism": get, "policy": policies.get}.get(spec.kind)
    found = known(spec.name) if known else None
    return {
        "id": hashlib.sha256(str(spec).encode()).hexdigest()[:8],
        "name": spec.name,
        "spec": str(spec),
        "kind": spec.kind,
        "settings": spec.settings,
        "system": found.system if found else "",
        "summary": found.summary if found else "The model as it is: softmax attention over all earlier tokens.",
        "use": spec.use,
        "notes": [],
        "error": None,
    }


def _refusal(model: Any, spec: Spec) -> str | None:
    """Why a mechanism or policy cannot be put into this model, in a sentence; None if it can."""
    try:
        with _applied(model, spec):
            return None
    except (NotImplementedError, ValueError) as error:
        return str(error)


@contextmanager
def _applied(model: Any, spec: Spec) -> Iterator[Any]:
    """The model with a mechanism or policy in it, and as it was afterwards."""
    if spec.kind == "dense":
        yield None
        return
    given = {"cache": spec.name} if spec.kind == "policy" else {"mechanism": spec.name}
    with manyheads.apply(model, **given, **spec.settings) as applied:
        yield applied


def _measure(
    row: dict[str, Any], spec: Spec, model: Any, material: measure.Text, dense: dict[str, Any], repeats: int,
    say: Callable[[str, str], None],
) -> None:  # fmt: skip
    name = str(spec)
    say(name, "reading")
    hidden, cache, seconds = measure.read(model, material)
    row["quality"] = measure.against(model, material, hidden, dense["hidden"])
    row["memory"] = {
        "cache_bytes": manyheads.cache_bytes(cache), "dense_bytes": dense["bytes"], "label": row["label"],
    }  # fmt: skip
    say(name, "needles")
    found, more = measure.needles(model, material)
    row["quality"]["needle"] = found
    row["quality"]["needle_accuracy"] = sum(n["found"] for n in found) / len(found)
    _speed(row, name, model, material, cache, [seconds, more], repeats, say)


def _speed(
    row: dict[str, Any], name: str, model: Any, material: measure.Text, cache: Any, prefills: list[float],
    repeats: int, say: Callable[[str, str], None],
) -> None:  # fmt: skip
    say(name, "timing")
    while len(prefills) < repeats:
        prefills.append(measure.timed(lambda: measure.prefill(model, material.prompt), model.device)[1])
    say(name, "decoding")
    speeds = measure.decoding(model, cache, material.rest[:, :1], repeats)
    row["speed"] = {
        "prefill_s": measure.spread(prefills[:repeats] if repeats > 1 else prefills[:1]),
        "decode_tokens_per_s": measure.spread(speeds),
    }


def _engine(spec: Spec, model: Any, tensors: dict[int, tuple[Tensor, Tensor]]) -> str:
    """Which engine the prompt runs on."""
    if spec.kind == "dense":
        return str(model.config._attn_implementation)
    q, k = next(iter(tensors.values()))
    form = get(spec.name)(**spec.settings) if spec.kind == "mechanism" else get("causal")()
    return manyheads.explain(q, k, k, form).engine


def _look(row: dict[str, Any], spec: Spec, tensors: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Density, mass and tile map on the dense model's own q and k, of two layers since some mechanisms alternate."""
    row["density"] = row["mass"] = None
    if spec.kind == "policy":
        return
    mechanism = get("causal" if spec.kind == "dense" else spec.name)
    maps = []
    for layer, (q, k) in tensors.items():
        own = {"layer": layer} if "layer" in mechanism.settings else {}
        maps.append(looked(mechanism(**{**own, **spec.settings}), q.float(), k.float()))
    seen = [m for m in maps if m is not None]
    if seen:
        row["density"] = sum(m.density for m in seen) / len(seen)
        row["mass"] = sum(m.mass for m in seen) / len(seen)
        row["tiles"] = torch.tensor([m.cells for m in seen]).mean(0).tolist()


def _relate(row: dict[str, Any], results: dict[str, Any]) -> None:
    """Ratios to dense, which is always the first row."""
    dense = results["rows"][0] if results["rows"] else row
    row["quality"]["perplexity_ratio"] = row["quality"]["perplexity"] / dense["quality"]["perplexity"]


def _measure_untrained(
    row: dict[str, Any], spec: Spec, model: Any, material: measure.Text,
    tensors: dict[int, tuple[Tensor, Tensor]], repeats: int, say: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Speed of one layer's attention at the model's shape; speed and memory of the model, where it can be put in."""
    mechanism = get(spec.name)
    form = mechanism(**spec.settings)
    q, k = next(iter(tensors.values()))
    generator = torch.Generator(device=q.device).manual_seed(0)
    heads = max(1, round(q.shape[1] * form.projections.query_share))
    kv_heads = next(n for n in range(min(heads, k.shape[1]), 0, -1) if heads % n == 0)
    q, k = q[:, :heads], k[:, :kv_heads]
    sizes = dict(batch=1, heads=heads, kv_heads=kv_heads, len=k.shape[2], head_dim=q.shape[3], v_head_dim=q.shape[3])
    operands: dict[str, Any] = {
        name: operand.activation(torch.randn(operand.shape(sizes), generator=generator, device=q.device)).to(q.dtype)
        for name, operand in form.operands.items()
    }
    row["engine"] = manyheads.explain(q, k, k, form, **operands).engine
    say(str(spec), "reading")
    call = lambda: manyheads.attention(q, k, k, form, **operands)  # noqa: E731  named for the timing below
    with torch.no_grad():
        call()
        row["layer_ms"] = measure.spread([1000 * measure.timed(call, q.device)[1] for _ in range(repeats)])
    row["speed"] = row["memory"] = None
    why = _refusal(model, spec) if isinstance(form, Recurrence) else "it is measured as one layer's attention"
    if why:
        row["notes"].append(why)
        say(str(spec), "timing")
        return
    with _applied(model, spec) as applied:
        say(str(spec), "timing")
        (_, cache), seconds = measure.timed(lambda: measure.prefill(model, material.prompt), model.device)
        row["label"] = applied.label
        row["memory"] = {"cache_bytes": manyheads.cache_bytes(cache), "label": applied.label}
        _speed(row, str(spec), model, material, cache, [seconds], repeats, say)
