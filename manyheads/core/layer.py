"""A layer: a module x -> x, with the facts about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from manyheads.core.published import Published

Made = TypeVar("Made", bound=nn.Module)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(Published):
    """One published layer. Call it with sizes and settings for the module, whose forward(x, *, present=None) takes
    x [batch, len, dim] and a bool [batch, len] that is False where a row is padding, and returns [batch, len, dim].

    reference: the equation, token by token, (module, x) -> y, from the module's parameters.
    losses: the reference of what is added to a training loss, (module, x) -> {name: value}; None if nothing is. The
        module has a method `losses` then, of the same arguments as forward. It computes them again rather than keep
        them from the last call, so that they are right under torch.compile and when activations are recomputed.
    examples: sizes and settings to test with, small enough for a dozen tokens.
    laws: functions that return two modules, which must agree on any x of the first example's dim; their docstring is
        the law in words.
    weights: how many numbers are trained, where the paper has a formula: (**example) -> int.
    causal: no output depends on a later position. A setting of this name says otherwise for its module.
    sees_future: why an output may depend on later positions although a setting asks for causal attention; or "".
    tolerance: a factor on the tests' bounds, with `tolerance_reason`.
    """

    family: str
    reference: Callable[[Any, Tensor], Tensor]
    losses: Callable[[Any, Tensor], Mapping[str, Tensor]] | None
    examples: tuple[Mapping[str, Any], ...]
    laws: tuple[Callable[[], tuple[nn.Module, nn.Module]], ...]
    weights: Callable[..., int] | None
    causal: bool
    sees_future: str
    tolerance: float
    tolerance_reason: str

    def __call__(self, **given: Any) -> nn.Module:
        """The module. Raises TypeError or ValueError, in one sentence, for what does not fit."""
        self.check(given)
        return self.factory(**given)


def layer(
    *,
    reference: Callable[[Any, Tensor], Tensor],
    arxiv: str,
    system: str = "",
    losses: Callable[[Any, Tensor], Mapping[str, Tensor]] | None = None,
    examples: tuple[Mapping[str, Any], ...],
    laws: tuple[Callable[[], tuple[nn.Module, nn.Module]], ...] = (),
    weights: Callable[..., int] | None = None,
    causal: bool = True,
    sees_future: str = "",
    ranges: Mapping[str, tuple[float, float]] | None = None,
    tolerance: float = 1.0,
    tolerance_reason: str = "",
) -> Callable[[type[Made]], type[Made]]:
    """Publish a class of modules under its file's name, as the attribute `published`; the class stays what it is."""

    def declare(made: type[Made]) -> type[Made]:
        family, name = made.__module__.split(".")[-2:]
        made.published = Layer(  # pyright: ignore[reportAttributeAccessIssue]  nn.Module knows no such attribute
            name=name, family=family, factory=made, reference=reference, arxiv=arxiv, system=system, losses=losses,
            examples=examples, laws=laws, weights=weights, causal=causal, sees_future=sees_future,
            ranges=ranges or {}, tolerance=tolerance, tolerance_reason=tolerance_reason,
        )  # fmt: skip
        return made

    return declare
