"""What was asked of `apply`, as a plan for each layer; what cannot be done is refused here, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from manyheads.cache import policies
from manyheads.cache.budgets import Budget, per_layer
from manyheads.cache.policy import Policy, Recipe
from manyheads.core.forms import Form, Function, Projections, Recurrence, Scores
from manyheads.core.mechanism import Mechanism
from manyheads.core.names import unknown
from manyheads.integrations.transformers.plan import Plan
from manyheads.integrations.transformers.survey import Found
from manyheads.mechanisms import get

Asked = tuple[Mechanism | Form, dict[str, Any]]


def choose(
    found: list[Found], total: int, mechanism: Any, cache: Any, budget: Any, layers: Any, engine: str,
    settings: dict[str, Any],
) -> dict[int, Plan]:  # fmt: skip
    """The plans of the layers to change, by index. total: the model's number of layers."""
    policy, own = _split(mechanism, cache, settings)
    asked = _asked((_named(mechanism), own), layers, [one.index for one in found if not one.why])
    budgets = _budgets(policy, budget, len(asked))
    evicting = None if policy is None or policy.when == "never" else policy
    plans = {}
    for (index, (one, given)), kept in zip(asked.items(), budgets, strict=True):
        plans[index] = _plan(index, total, one, given, engine, evicting, kept)
    if any(one.shared for one in found):
        for plan in plans.values():
            if plan.label == "freed":
                what = plan.policy.name if plan.policy else plan.name
                raise NotImplementedError(f"{what} gives up keys, but in this model other layers read them too")
    return plans


def _named(mechanism: Any) -> Mechanism | Form:
    if mechanism is None:
        return get("causal")
    found = get(mechanism) if isinstance(mechanism, str) else mechanism
    if not isinstance(found, Mechanism | Form):
        raise TypeError(f"mechanism must be a name or a form, not {type(mechanism).__name__}")
    return found


def _split(mechanism: Any, cache: Any, settings: dict[str, Any]) -> tuple[Policy | None, dict[str, Any]]:
    """The policy, with its settings, and the mechanism's settings."""
    named = _named(mechanism)
    if isinstance(cache, str):
        cache = policies.get(cache)
    elif isinstance(cache, Recipe) or not isinstance(cache, Policy | None):
        hint = f"; call it, as in policies.get({cache.name!r})()" if isinstance(cache, Recipe) else ""
        raise TypeError(f"cache must be a policy's name or a Policy, not a {type(cache).__name__}{hint}")
    mine = named.settings if isinstance(named, Mechanism) else {}
    theirs = cache.settings if isinstance(cache, Recipe) else {}
    for name in settings:
        if isinstance(named, Mechanism) and isinstance(cache, Recipe) and name in mine and name in theirs:
            raise ValueError(
                f"{name} is a setting of both {named.name} and {cache.name}: give the policy's own as "
                f"cache=manyheads.policies.get({cache.name!r})({name}=...)"
            )
        if name not in mine and name not in theirs:
            raise TypeError(unknown("setting of the mechanism or the policy", name, (*mine, *theirs)))
    if isinstance(cache, Recipe):
        cache = cache(**{name: value for name, value in settings.items() if name in theirs})
    return cache, {name: value for name, value in settings.items() if name in mine}


def _asked(base: Asked, layers: Any, able: list[int]) -> dict[int, Asked]:
    """For each layer to change, in order: its mechanism and settings."""
    if layers is None:
        return dict.fromkeys(able, base)
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers must be indices, or a mapping from them, not {layers!r}")
    wanted = dict(layers) if isinstance(layers, Mapping) else {index: {} for index in layers}
    if not wanted:
        raise ValueError("layers names no layer; leave it out to change all")
    for index in wanted:
        if isinstance(index, bool) or index not in able:
            raise ValueError(f"layer {index!r} cannot be changed; layers with full attention: {_list(able)}")
    return {index: _one(base, wanted[index]) for index in sorted(wanted)}


def _one(base: Asked, wanted: Any) -> Asked:
    """settings on top of the base's; a name, with its defaults; or (name, settings)."""
    if isinstance(wanted, Mapping):
        return base[0], {**base[1], **wanted}
    return (_named(wanted[0]), dict(wanted[1])) if isinstance(wanted, tuple) else (_named(wanted), {})


def _list(indices: list[int]) -> str:
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices))


def _budgets(policy: Policy | None, budget: Any, layers: int) -> tuple[Budget | None, ...]:
    if policy is None:
        if budget is not None:
            raise ValueError(f"budget={budget!r} needs a cache policy: {', '.join(policies.names())}")
        return (None,) * layers
    if policy.when == "never":
        if budget not in (None, 1.0) or isinstance(budget, int):
            raise ValueError(f"{policy.name} evicts nothing, so its budget is None or all, 1.0, not {budget!r}")
        return (None,) * layers
    if budget is None:
        raise ValueError(f"{policy.name} needs a budget: tokens, or a share of each row's prompt")
    return per_layer(budget, layers, policy.least)


def _plan(
    index: int, total: int, mechanism: Mechanism | Form, settings: dict[str, Any], engine: str,
    policy: Policy | None, budget: Budget | None,
) -> Plan:  # fmt: skip
    if isinstance(mechanism, Mechanism):
        name, causal = mechanism.name, mechanism.causal
        note = "a model must be trained with it" if mechanism.trained else mechanism.sees_future
        place = {"layer": index, "layers": total}
        form = mechanism(**{n: value for n, value in place.items() if n in mechanism.settings} | settings)
    else:
        if settings:
            raise TypeError(f"a form has no settings, but was given {', '.join(settings)}")
        name, causal, note, form = f"a {type(mechanism).__name__}", True, "", mechanism
    if not causal or (isinstance(form, Recurrence) and not form.causal):
        raise NotImplementedError(f"{name} is not causal: in a language model a token must not see later ones")
    if form.projections != Projections():
        raise NotImplementedError(f"{name} changes the projections of queries and keys, which are the model's own here")
    if isinstance(form, Function) and form.query_context:
        raise NotImplementedError(f"{name} needs the {form.query_context} queries before each one; a cache keeps none")
    if policy is not None:
        _refuse_eviction(name, form, policy)
    return Plan(index, name, form, engine, policy, budget, note)


def _refuse_eviction(name: str, form: Form, policy: Policy) -> None:
    if isinstance(form, Recurrence):
        raise NotImplementedError(f"{name} keeps a state and no keys, so {policy.name} has nothing to evict")
    if not isinstance(form, Scores):
        kind = type(form).__name__
        raise NotImplementedError(f"{name} is a {kind}, which needs every key of a row, but {policy.name} evicts some")
    if any(operand.per_token for operand in form.operands.values()):
        raise NotImplementedError(f"{name} has operands for each token, which {policy.name} does not evict")
    read = (form.program.mask_depends | form.program.score_depends) & {"b", "h"}
    if policy.per_head and (read or form.operands):
        raise NotImplementedError(
            f"{name} tells heads or rows apart, but {policy.name} makes rows of the heads, to keep other tokens in each"
        )
