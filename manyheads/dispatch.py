"""attention: one function for every mechanism. The first engine with no objection runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from manyheads.core.alike import alike, keep_latest
from manyheads.core.checks import build_inputs
from manyheads.core.forms import Form, Function, Recurrence, Scores, Selection, Sum
from manyheads.core.inputs import Inputs
from manyheads.core.mechanism import Mechanism
from manyheads.core.names import unknown
from manyheads.core.rows import run_rows, whole_rows_only
from manyheads.core.sums import parts_of, summed
from manyheads.engines import eager, flex, sdpa, triton
from manyheads.mechanisms import get

ENGINES = ("triton", "sdpa", "flex", "eager")
_MODULES: dict[str, ModuleType] = {"triton": triton, "sdpa": sdpa, "flex": flex, "eager": eager}


@dataclass(frozen=True)
class Explanation:
    """Which engine would run, and why the others would not; of a Sum those of its parts, "sdpa + eager"."""

    engine: str
    objections: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.engine} runs it"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.objections.items()])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Form = "causal",
    *,
    engine: str = "auto",
    scale: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    state: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_state: bool = False,
    **settings_and_operands: Any,
) -> Any:
    """Attention by any mechanism.

    q: [batch, heads, q_len, head_dim]; k: [batch, kv_heads, kv_len, head_dim]; v: [batch, kv_heads, kv_len,
        v_head_dim]; one floating dtype, one device; kv_heads divides heads, and shared heads are not repeated.
    mechanism: a name (`manyheads.names()`) or a form. Its settings and operands are keyword arguments here.
    engine: "auto" takes the first engine with no objection (`explain` says which); a named one never falls back.
    scale: multiplies q.k; 1 / sqrt(head_dim) unless the mechanism says otherwise.
    q_positions, kv_positions: int64 [batch, len] (or [len]), where each token stands; -1 marks one that is absent
        (padding, a free slot). Without them queries and keys end at the same position. Absent queries give 0.
    state: what an earlier call of a recurrent mechanism returned.
    dropout, seed: the rate, 0 <= dropout < 1, at which weights become 0 after the normaliser; the others are divided by
        1 - dropout. Which ones hangs on the seed, batch row, head and the positions of query and key, and on nothing
        else. The seed is an int or one int64 on q's device, which nobody waits for. There is no seed of its own: the
        same call is to give the same result. The lse is that without dropout.

    Returns o [batch, heads, q_len, v_head_dim] in q's dtype; with return_lse (o, lse [batch, heads, q_len]), the
    natural logarithm of the sum over the keys of exp(score), a sink included; with return_state (o, state). A query
    that sees no key has o = 0 and lse = -inf, or the sink.

    Raises TypeError or ValueError, in one sentence, for what does not fit.
    """
    key, tensors = None, [q, k, v]
    if q_positions is kv_positions is seed is None and not dropout:
        given = settings_and_operands if state is None else {**settings_and_operands, "state": state}
        key = _key(tensors, mechanism, engine, scale, (return_lse, return_state), given)
    if key is not None and (again := _KNOWN.get(key)) is not None and (made := again(tensors)) is not None:
        return made if return_lse or return_state else made[0]
    form, operands = _form(mechanism, settings_and_operands)
    x = build_inputs(form, q, k, v, scale, q_positions, kv_positions, state, operands, dropout, seed)
    if return_lse and return_state:
        raise ValueError("return_lse and return_state exclude each other: scores have an lse, recurrences a state")
    if return_state and not isinstance(form, Recurrence):
        raise ValueError(f"return_state is for recurrent mechanisms; this one is a {type(form).__name__}")
    if return_lse and isinstance(form, Recurrence | Function | Sum):
        raise ValueError(f"return_lse is for mechanisms with a softmax; this one is a {type(form).__name__}")
    inner = form.scores if isinstance(form, Selection) else form
    if return_lse and isinstance(inner, Scores) and not inner.has_lse:
        raise ValueError(f"return_lse is for weights exp(score - lse); the normaliser {inner.normaliser!r} has no lse")
    if isinstance(form, Sum):  # whose parts choose
        run, repeat = partial(_run_parts, engine=engine), None
    else:
        chosen = _choose(form, x, engine, return_lse).engine
        run, repeat = _load(chosen).run, REPEAT.get(chosen)
    o, second = run_rows(run, form, x) if x.ragged and whole_rows_only(form) else run(form, x)
    if key is not None and repeat is not None and (again := repeat(form, x)) is not None:
        keep_latest(_KNOWN, key, again)
    return (o, second) if return_lse or return_state else o


def explain(
    q: Tensor, k: Tensor, v: Tensor, mechanism: str | Form = "causal", *, engine: str = "auto",
    return_lse: bool = False, scale: float | None = None, q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None, state: Tensor | None = None, dropout: float = 0.0,
    seed: int | Tensor | None = None, **settings_and_operands: Any,
) -> Explanation:  # fmt: skip
    """Which engine `attention` would take for these arguments, and why the others would not run."""
    form, operands = _form(mechanism, settings_and_operands)
    x = build_inputs(form, q, k, v, scale, q_positions, kv_positions, state, operands, dropout, seed)
    return _choose(form, x, engine, return_lse)


def _choose(form: Form, x: Inputs, engine: str, return_lse: bool) -> Explanation:
    if isinstance(form, Sum):  # each part for itself
        found = [_choose(part, own, engine, False) for part, own in parts_of(form, x)]
        objections = {f"{name}, part {n}": why for n, of in enumerate(found, 1) for name, why in of.objections.items()}
        return Explanation(" + ".join(of.engine for of in found), objections)
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ("auto", *ENGINES)))
    objections: dict[str, str] = {}
    for name in ENGINES if engine == "auto" else (engine,):
        module = _load(name)
        why = module.why_not(form, x, return_lse)
        if why is None and engine == "auto":
            why = module.hesitates(form, x)
        if why is None:
            return Explanation(name, objections)
        objections[name] = why
    reasons = "; ".join(f"{name}: {why}" for name, why in objections.items())
    raise ValueError(f"no engine runs this: {reasons}. Take engine='auto' to let another one run.")


def _run_parts(form: Form, x: Inputs, engine: str) -> tuple[Tensor, None]:
    assert isinstance(form, Sum)
    return summed(form, x, lambda part, own: _load(_choose(part, own, engine, False).engine).run(part, own))


def _load(name: str) -> ModuleType:
    return _MODULES[name]


def _form(mechanism: str | Form | Mechanism, given: dict[str, Any]) -> tuple[Form, dict[str, Tensor]]:
    """Split keyword arguments into a mechanism's settings and its form's operands."""
    if isinstance(mechanism, Form):
        form, rest, label = mechanism, given, "this form"
        settings: dict[str, Any] = {}
    elif torch.compiler.is_compiling():
        settings = {name: value for name, value in given.items() if name in _settings_of(mechanism)}
        form = getattr(_NAMED, _named(mechanism, tuple(settings.items())))
        label = mechanism if isinstance(mechanism, str) else mechanism.name
        rest = {name: value for name, value in given.items() if name not in settings}
    else:
        found = _mechanism(mechanism)
        settings = {name: value for name, value in given.items() if name in found.settings}
        form, label = found(**settings), found.name
        rest = {name: value for name, value in given.items() if name not in settings}
    for name in rest:
        if name not in form.operands:
            allowed = (*form.operands, *(() if isinstance(mechanism, Form) else get(label).settings))
            raise TypeError(unknown(f"setting or operand of {label}", name, allowed))
    missing = [f"{name} [{operand.dims}]" for name, operand in form.operands.items() if name not in rest]
    if missing:
        raise TypeError(f"{label} also needs {', '.join(missing)}, as keyword arguments")
    return form, rest


def _mechanism(mechanism: str | Mechanism) -> Mechanism:
    found = get(mechanism) if isinstance(mechanism, str) else mechanism
    if not isinstance(found, Mechanism):
        raise TypeError(f"mechanism must be a name or a form, not {type(mechanism).__name__}")
    return found


# ---- for torch.compile, which cannot look into the making of a form ----

_NAMED = SimpleNamespace()  # not a dict, of which torch.compile sees what was in it when it first looked


def _settings_of(mechanism: str | Mechanism) -> tuple[str, ...]:
    return tuple(_mechanism(mechanism).settings)


def _named(mechanism: str | Mechanism, settings: tuple[tuple[str, Any], ...]) -> str:
    """Where in _NAMED the form is."""
    found = _mechanism(mechanism)
    key = f"{found.name} {settings}".encode().hex()  # torch.compile takes no name with a point, as 0.5 has
    setattr(_NAMED, key, found(**dict(settings)))
    return key


for _constant in (_settings_of, _named):  # torch.compiler.assume_constant_result, without a second for its import
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  a mark of torch's


# ---- calls once more: what is checked and chosen once holds for all calls of a kind ----

# Of q, k, v, the operands in the order in which they were given, and the state; None: not this time.
Again = Callable[[Sequence[Tensor]], tuple[Tensor | None, ...] | None]
REPEAT: dict[str, Callable[[Form, Inputs], Again | None]] = {"triton": triton.again, "sdpa": sdpa.again}
_KNOWN: dict[Any, Again] = {}
_PLAIN = (Tensor, torch.nn.Parameter)  # not what is derived from them
_NAMES = (int, float, bool, str, type(None))


def _key(
    tensors: list[Any], mechanism: Any, engine: Any, scale: Any, returned: tuple[bool, bool], given: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """What a call depends on besides the numbers in q, k, v, and in operands and state, which are put behind them; None
    if that is more than can be told from names, or if somebody watches what torch does."""
    if torch.compiler.is_compiling() or not isinstance(mechanism, (str, Form, Mechanism)) or type(engine) is not str:
        return None
    names: list[Any] = []
    for name, value in given.items():
        names.append(name)
        if isinstance(value, Tensor):
            tensors.append(value)
        else:
            names += (type(value), value)
            if type(value) not in _NAMES:
                return None
    for t in tensors:
        if type(t) not in _PLAIN or not _fast(t):
            return None
    facts = None if type(scale) not in _NAMES or _watched() else alike(tensors)
    if facts is None:
        return None
    learned = tuple([t.requires_grad for t in tensors]) if torch.is_grad_enabled() else ()
    return mechanism, engine, scale, *returned, learned, *names, *facts


def _fast(t: Tensor) -> bool:
    """Whether it lies where a call's own time is seen beside the kernel's."""
    return t.is_cuda


def _watched() -> bool:
    inside: Any = torch._C
    modes = inside._len_torch_function_stack() or inside._len_torch_dispatch_stack()
    return bool(modes) or inside._functorch.peek_interpreter_stack() is not None
