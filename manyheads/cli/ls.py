"""`manyheads ls` and `manyheads show`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.cli.printing import AsJson, bold, make_console, make_table, print_json

if TYPE_CHECKING:
    from manyheads.cache.policy import Recipe
    from manyheads.core.forms import Form
    from manyheads.core.layer import Layer
    from manyheads.core.mechanism import Mechanism
    from manyheads.core.study import Study


def ls(as_json: AsJson = False) -> None:
    """List the mechanisms, the layers, the cache policies and the studies."""
    rows = [_row(found) for found in _everything()]
    if as_json:
        print_json(rows)
        return
    console = make_console()
    wide = console.width >= 110
    table = make_table("name", "family", "form", "engines", "labels", *(["system"] if wide else []))
    for row in rows:
        labels = row["labels"]
        words = [
            *([row["kind"]] if row["kind"] != "mechanism" else []),
            *([] if row["kind"] in ("policy", "study") else ["causal"] if labels["causal"] else ["sees all"]),
            *(["sees future"] if labels["sees_future"] else []),
            *(["needs training"] if labels["needs_training"] else []),
        ]
        table.add_row(
            row["name"], row["family"], row["form"], " ".join(row["engines"]), ", ".join(words),
            *([row["system"] or "–"] if wide else []),
        )  # fmt: skip
    console.print(table)


def show(
    name: Annotated[str, typer.Argument(help="A mechanism, a layer, a cache policy or a study.")],
    as_json: AsJson = False,
) -> None:
    """Show one mechanism, layer, cache policy or study: equation, citation, settings, laws, engines."""
    found = {one.name: one for one in _everything()}
    if name not in found:
        from manyheads.core.names import unknown

        raise ValueError(unknown("mechanism, layer, cache policy or study", name, found))
    about = _about(found[name])
    if as_json:
        print_json(about)
        return
    console = make_console()
    console.print(bold(about["name"]), f" {about['kind']}, {about['family']}, {about['form']}")
    typer.echo(f"\n{about['text']}\n")  # equations keep their lines
    table = make_table("", "", header=False)
    for word, lines in _facts(about).items():
        table.add_row(word, "\n".join(lines) or "none")
    console.print(table)


def _everything() -> list[Mechanism | Layer | Recipe | Study]:
    from manyheads import layers, mechanisms, studies
    from manyheads.cache import policies

    return [part.get(name) for part in (mechanisms, layers, policies, studies) for name in part.names()]


def _row(found: Mechanism | Layer | Recipe | Study) -> dict[str, Any]:
    from manyheads.core.layer import Layer
    from manyheads.core.mechanism import Mechanism
    from manyheads.core.study import Study

    if isinstance(found, Mechanism):
        return _mechanism_row(found)
    if isinstance(found, Layer):
        return _layer_row(found)
    if isinstance(found, Study):
        return _plain_row(found, "study", found.family)
    return _plain_row(found, "policy", "cache")


def _mechanism_row(mechanism: Mechanism) -> dict[str, Any]:
    form = mechanism(**mechanism.examples[0])
    return {
        "name": mechanism.name,
        "kind": "mechanism",
        "system": mechanism.system,
        "family": mechanism.family,
        "form": type(form).__name__,
        "engines": [name for name, why in _engines(form).items() if why is None],
        "labels": {
            "causal": mechanism.causal,
            "sees_future": mechanism.sees_future,
            "needs_training": mechanism.trained,
        },
        "arxiv": mechanism.arxiv,
        "summary": mechanism.summary,
        "sizes": mechanism.required,
        "settings": mechanism.settings,
    }


def _layer_row(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": "layer",
        "system": layer.system,
        "family": layer.family,
        "form": "Module",
        "engines": [],
        "labels": {"causal": layer.causal, "sees_future": layer.sees_future, "needs_training": True},
        "arxiv": layer.arxiv,
        "summary": layer.summary,
        "sizes": layer.required,
        "settings": layer.settings,
    }


def _plain_row(found: Recipe | Study, kind: str, family: str) -> dict[str, Any]:
    return {
        "name": found.name,
        "kind": kind,
        "system": found.system,
        "family": family,
        "form": kind.title(),
        "engines": [],
        "labels": {"causal": True, "sees_future": "", "needs_training": False},
        "arxiv": found.arxiv,
        "summary": found.summary,
        "sizes": found.required,
        "settings": found.settings,
    }


def _about(found: Mechanism | Layer | Recipe | Study) -> dict[str, Any]:
    """A row of `ls` with all that is known besides."""
    from manyheads.core.layer import Layer
    from manyheads.core.mechanism import Mechanism

    about = {**_row(found), "text": found.text, "operands": {}, "laws": [], "reasons": {}}
    if isinstance(found, Layer):
        about["laws"] = [" ".join((law.__doc__ or "").split()) for law in found.laws]
    if isinstance(found, Mechanism):
        form = found(**found.examples[0])
        about["operands"] = {name: operand.dims for name, operand in form.operands.items()}
        about["laws"] = [
            f"{_call(found.name, law.settings)} equals {_call(law.equals, law.other)}" for law in found.laws
        ]
        about["reasons"] = _engines(form)
    return about


def _facts(about: dict[str, Any]) -> dict[str, list[str]]:
    """What `show` prints below the docstring, in words."""
    labels, kind = about["labels"], about["kind"]
    facts = {"settings": [*about["sizes"], *(f"{name} = {value!r}" for name, value in about["settings"].items())]}
    if kind == "policy":
        facts["use"] = [f'manyheads.apply(model, cache="{about["name"]}", budget=512)']
    elif kind == "study":
        facts["use"] = [f"python -m manyheads.studies.{about['name']}"]
    else:
        if kind == "mechanism":
            facts["operands"] = [f"{name} [{dims}]" for name, dims in about["operands"].items()]
            facts["engines"] = [f"{name}: {why or 'runs it'}" for name, why in about["reasons"].items()]
        facts["laws"] = about["laws"]
        facts["causal"] = ["yes" if labels["causal"] else "no, every query sees every key"]
        if labels["sees_future"]:
            facts["sees future"] = [labels["sees_future"]]
        facts["training"] = ["needed: a model must be trained with it" if labels["needs_training"] else "not needed"]
        use = f'manyheads.attention(q, k, v, "{about["name"]}")'
        if kind == "layer":
            use = f'manyheads.layers.get("{about["name"]}")({", ".join(f"{size}=..." for size in about["sizes"])})'
        facts["use"] = [use if labels["needs_training"] else f'manyheads.apply(model, "{about["name"]}") or {use}']
    facts["system"] = [about["system"] or "–"]
    facts["paper"] = [f"arXiv:{about['arxiv']}" if about["arxiv"] else "–"]
    return facts


def _engines(form: Form) -> dict[str, str | None]:
    """For each engine why it would not run a small float32 input on the CPU, or None."""
    from importlib import import_module

    import torch

    from manyheads.core.checks import build_inputs
    from manyheads.dispatch import ENGINES

    q, k = torch.zeros(1, 4, 32, 16), torch.zeros(1, 2, 32, 16)
    sizes = dict(batch=1, heads=4, kv_heads=2, len=32, head_dim=16, v_head_dim=16)
    operands = {name: o.activation(torch.zeros(o.shape(sizes))) for name, o in form.operands.items()}
    x = build_inputs(form, q, k, k, None, None, None, None, operands)
    return {name: import_module(f"manyheads.engines.{name}").why_not(form, x) for name in ENGINES}


def _call(name: str, settings: Any) -> str:
    inner = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({inner})" if inner else name
