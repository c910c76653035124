"""What to compare: `moba(block_size=64, top_k=4)` as text, checked before anything long starts."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any, Literal

from manyheads.core.forms import Function
from manyheads.core.names import unknown
from manyheads.mechanisms import get, names

Kind = Literal["dense", "mechanism", "policy"]


@dataclass(frozen=True)
class Spec:
    """One row of a comparison: a mechanism or a cache policy, with its settings."""

    name: str
    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.name}({inner})" if inner else self.name

    @property
    def use(self) -> list[str]:
        """How to put it into a model, in Python."""
        if self.kind == "dense":
            return ["model.generate(...)  # the model as it is"]
        given = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        what = f'cache="{self.name}"' if self.kind == "policy" else f'"{self.name}"'
        return ["import manyheads", f"manyheads.apply(model, {what}{given})", "model.generate(...)"]


DENSE = Spec("dense", "dense")


def parse(text: str) -> Spec:
    """A spec from `name` or `name(setting=value, ...)`. Raises ValueError in one sentence."""
    form = "write it as name or name(setting=value, ...), e.g. moba(block_size=64, top_k=4)"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text!r} cannot be read; {form}") from None
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{text!r} cannot be read; {form}")
    try:
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except ValueError:
        raise ValueError(f"a setting in {text!r} is not a plain number or string; {form}") from None
    return _check(call.func.id, settings)


def parse_list(text: str) -> list[Spec]:
    """Several specs with commas between them; commas inside brackets belong to a spec."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text + ","):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
    if depth > 0:
        parts.append(text[start:])
    found = [parse(part) for part in parts if part.strip()]
    if not found:
        raise ValueError(f"{text!r} names nothing to compare; `manyheads ls` shows the names")
    return found


def _check(name: str, settings: dict[str, Any]) -> Spec:
    from manyheads.cache import policies

    if name == "dense":
        return DENSE
    if name in policies.names():
        allowed = {"budget", *policies.get(name).settings}
        kind: Kind = "policy"
    elif name in names():
        allowed, kind = set(get(name).settings), "mechanism"
    else:
        raise ValueError(unknown("mechanism or cache policy", name, ("dense", *names(), *policies.names())))
    for given in settings:
        if given not in allowed:
            raise ValueError(unknown(f"setting of {name}", given, allowed))
    return Spec(name, kind, settings)


def fit(spec: Spec, context: int) -> Spec:
    """A spec without settings gets those for a context of that many tokens: papers' defaults are for longer ones."""
    if spec.kind == "policy" and "budget" not in spec.settings and spec.name != "keep_all":
        return Spec(spec.name, spec.kind, {**spec.settings, "budget": context // 4})
    if spec.kind == "mechanism" and not spec.settings and (at := get(spec.name).at):
        return Spec(spec.name, spec.kind, dict(at(context)))
    return spec


def defaults(context: int) -> list[Spec]:
    """Dense, every mechanism that a trained model can take, every policy at a half and a quarter, then those that need
    training. Functions hold the whole map of scores, and operands want a model that has them: only if named."""
    from manyheads.cache import policies

    forms = {name: get(name)() for name in names()}
    whole = [name for name, form in forms.items() if not isinstance(form, Function)]
    found = [Spec(name, "mechanism") for name in whole if get(name).trained or not forms[name].operands]
    able = [s for s in found if not get(s.name).trained and get(s.name).causal and s.name != "causal"]
    untrained = [s for s in found if get(s.name).trained]
    evicting = [name for name in policies.names() if name != "keep_all"]
    kept = [Spec(name, "policy", {"budget": context // part}) for name in evicting for part in (2, 4)]
    return [DENSE, *(fit(spec, context) for spec in (*able, *kept, *untrained))]
