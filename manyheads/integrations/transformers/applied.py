"""apply: put a mechanism, a cache policy or both into a model, and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from manyheads.cache.budgets import Budget
from manyheads.cache.policy import Policy
from manyheads.core.forms import Form
from manyheads.core.mechanism import Mechanism
from manyheads.core.names import unknown
from manyheads.dispatch import ENGINES
from manyheads.integrations.transformers.attend import Implementation, attend, before, mask
from manyheads.integrations.transformers.choose import choose
from manyheads.integrations.transformers.plan import ATTRIBUTE, NAME, OPERANDS, Label, Plan
from manyheads.integrations.transformers.survey import LEFT_ALONE, Found, layer_type, survey
from manyheads.mechanisms import get
from manyheads.nn import OperandSource

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


@dataclass(frozen=True)
class Row:
    """One layer of the report: what it does now, with its label, or that it was left alone; and why, or a note."""

    index: int
    does: str
    label: Label | None = None
    why: str = ""


class Applied:
    """What `apply` did to a model. A context manager: leaving it restores the model, also after an exception.

    model: the model itself, changed in place. report: a Row for each layer, in order; str() sums it up.
    """

    def __init__(self, model: Any, report: tuple[Row, ...]):
        self.model = model
        self.report = report
        self._undo: list[Callable[[], object]] = []

    @property
    def label(self) -> Label:
        """What becomes of memory: see `label`."""
        return _together(row.label for row in self.report)

    def restore(self) -> None:
        """Put the model back as it was: implementation, hooks, modules. Does nothing the second time."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        """A line for each run of layers that do the same."""
        runs: list[tuple[Row, list[int]]] = []
        for row in self.report:
            if runs and (runs[-1][0].does, runs[-1][0].label, runs[-1][0].why) == (row.does, row.label, row.why):
                runs[-1][1].append(row.index)
            else:
                runs.append((row, [row.index]))
        lines = []
        for row, at in runs:
            where = f"layer {at[0]}" if len(at) == 1 else f"layers {at[0]} to {at[-1]}"
            lines.append(f"{where}: {row.does}" + f", {row.label}" * bool(row.label) + f" ({row.why})" * bool(row.why))
        return "\n".join(lines)

    __repr__ = __str__


def apply(
    model: Any,
    mechanism: str | Mechanism | Form | None = None,
    *,
    cache: str | Policy | None = None,
    budget: Budget | Iterable[Budget] | None = None,
    layers: Iterable[int] | Mapping[int, Any] | None = None,
    engine: str = "auto",
    **settings: Any,
) -> Applied:
    """Put a mechanism, a cache policy or both into a causal language model of transformers, in place.

    Then use the model as ever: `generate`, a streamer, a trainer. Layers with full attention are changed; sliding,
    linear and kv-shared ones are left alone, and the report says so.

    mechanism: a name (`manyheads.names()`) or a form; None for the model's own causal attention. If it has settings
        `layer` and `layers`, they are the layer's index and the number of layers, unless given. Operands that it asks
        for become projections of the layer's hidden states, which start at zero and are trained with the model.
    cache: a policy's name (`manyheads.policies.names()`), or a Policy: `manyheads.policies.get("snapkv")(window=16)`.
    budget: how much the policy keeps in each layer: tokens (an integer), a share of each row's own prompt (a float in
        (0, 1]), or a sequence with one of these for each layer that is changed.
    layers: the indices of the layers to change, all if None; or a mapping from index to a mechanism's name, to settings
        of `mechanism`, or to a pair of both. Other layers with full attention stay dense.
    engine: as in `manyheads.attention`.
    settings: of the mechanism and of the policy, by who declares the name.

    Raises TypeError, ValueError or NotImplementedError, in one sentence, and leaves the model as it was.
    """
    if mechanism is None and cache is None and not isinstance(layers, Mapping):
        raise ValueError("apply needs a mechanism, a cache policy or both")
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ("auto", *ENGINES)))
    config, found = survey(model)
    if any(True for _ in _plans(model)):
        raise ValueError("manyheads is applied to this model already: restore it first")
    if all(one.why for one in found):
        raise ValueError(f"{type(model).__name__} has no layer to change: {found[0].why}")
    plans = choose(found, config.num_hidden_layers, mechanism, cache, budget, layers, engine, settings)
    applied = Applied(model, _report(config, found, plans))
    try:
        _change(applied, config, found, plans)
    except BaseException:
        applied.restore()
        raise
    return applied


def label(what: nn.Module | Applied) -> Label:
    """What becomes of the memory of a model's cache.

    "freed": a layer really gives memory back; "masked": a layer leaves keys unread, but none gives memory back;
    "simulated": the numbers are as if; "dense": all keys are kept and read.
    """
    return what.label if isinstance(what, Applied) else _together(plan.label for plan in _plans(what))


def _together(labels: Iterable[Label | None]) -> Label:
    there = set(labels)
    order: tuple[Label, ...] = ("freed", "simulated", "masked", "dense")
    return next(one for one in order if one in there or one == "dense")


def _plans(model: nn.Module) -> Iterator[Plan]:
    return (plan for module in model.modules() if (plan := vars(module).get(ATTRIBUTE)) is not None)


# ---- doing and undoing it ----


def _change(applied: Applied, config: Any, found: list[Found], plans: dict[int, Plan]) -> None:
    """Every step leaves behind how to undo it."""
    undo = applied._undo
    _implement(applied.model, config, undo)
    for one in found:
        if one.why and not one.shared:
            _leave_alone(one.module, config, undo)
        else:
            plan = plans.get(one.index) or Plan(one.index, "causal", get("causal")(), "auto")
            _prepare(one.module, plan, config, undo)


def _implement(model: Any, config: Any, undo: list[Callable[[], object]]) -> None:
    """Make ours the attention implementation of the decoder, and of nothing else in a composite model."""
    original = config._attn_implementation
    for one in {id(one): one for one in (config, *_configs(model))}.values():
        undo.append(_setter(one, "_attn_implementation_internal", one._attn_implementation_internal))
    parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
    model.set_attn_implementation({"": model.config._attn_implementation, parts[0]: NAME} if parts else NAME)
    if config._attn_implementation != NAME:
        name = type(model).__name__
        raise NotImplementedError(f"{name} does not call attention through transformers' AttentionInterface")
    ours = Implementation(NAME)
    ours.original = original
    config._attn_implementation_internal = ours


def _leave_alone(module: nn.Module, config: Any, undo: list[Callable[[], object]]) -> None:
    """A configuration of its own, with the implementation that the model had."""
    undo.append(_setter(module, "config", config))
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = config._attn_implementation.original


def _prepare(module: nn.Module, plan: Plan, config: Any, undo: list[Callable[[], object]]) -> None:
    undo.append(lambda: vars(module).pop(ATTRIBUTE, None))
    setattr(module, ATTRIBUTE, plan)
    undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    if plan.form.operands:
        undo.append(lambda: module._modules.pop(OPERANDS, None))
        module.add_module(OPERANDS, _sources(plan.form, module, config))


def _sources(form: Form, module: nn.Module, config: Any) -> nn.ModuleDict:
    """The projections of a form's operands, where the module's weights are."""
    like = next(p for p in module.parameters() if p.is_floating_point())
    heads = config.num_attention_heads
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", config.hidden_size // heads)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": head_dim}
    sources = {name: OperandSource(operand, config.hidden_size, sizes) for name, operand in form.operands.items()}
    return nn.ModuleDict(sources).to(device=like.device, dtype=like.dtype)


def _configs(model: Any) -> Iterator[Any]:
    """Every configuration in the model, those of its parts included."""
    for module in model.modules():
        one: Any = getattr(module, "config", None)
        if hasattr(one, "_attn_implementation_internal"):
            yield one
            yield from (sub for name in one.sub_configs if (sub := getattr(one, name, None)) is not None)


def _setter(thing: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(thing, name, value)


# ---- saying it ----


def _report(config: Any, found: list[Found], plans: dict[int, Plan]) -> tuple[Row, ...]:
    modules = {one.index: one for one in found}
    rows = []
    for index in range(config.num_hidden_layers):
        plan = plans.get(index)
        if plan is not None:
            kept = f" with {plan.policy.name}, budget {plan.budget}" if plan.policy else ""
            rows.append(Row(index, plan.name + kept, plan.label, plan.note))
        elif index in modules:
            rows.append(Row(index, "left alone", None, modules[index].why or "not asked for"))
        else:
            rows.append(
                Row(index, "left alone", None, LEFT_ALONE.get(layer_type(config, index), "it has no attention"))
            )
    return tuple(rows)
