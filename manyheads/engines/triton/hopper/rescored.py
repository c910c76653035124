"""Forms with another score function in place of their own, which may read numbers of the queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, Signature, signature
from typing import Any

from manyheads.core.forms import Operand, Scores


def own_score(form: Scores) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The form's score as a function of s, b, h, i, j and all operands, and those that it reads."""
    inner = form.score
    taken = signature(inner).parameters if inner is not None else ()
    read = tuple(name for name in form.operands if name in taken)

    def own(s, b, h, i, j, given):
        return s if inner is None else inner(s, b, h, i, j, **{name: given[name] for name in read})

    return own, read


def with_score(form: Scores, function: Callable[..., Any], names: tuple[str, ...], **changes: Any) -> Scores:
    """The form with another score function, which reads these operands as keywords, and without what it replaces."""
    parameters = [Parameter(letter, Parameter.POSITIONAL_ONLY) for letter in "sbhij"]
    parameters += [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  inspect looks there first
    return replace(form, score=function, alpha=None, top_k=None, **{"normaliser": "softmax", **changes})


def of_queries(form: Scores, names: tuple[str, ...]) -> dict[str, Operand]:
    """The form's operands, and these with a number for each query."""
    return {**form.operands, **{name: Operand("batch heads 0") for name in names}}  # 0: as many as there are
