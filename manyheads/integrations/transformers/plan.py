"""What is done in one layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from manyheads.cache.budgets import Budget
from manyheads.cache.policy import Policy
from manyheads.core.expressions import Program
from manyheads.core.forms import Form, Recurrence, Scores

# The name under which transformers knows us. It must not hold "flash": transformers would look for that library.
NAME = "manyheads"
# Where an attention module keeps its plan, and the projections of its operands.
ATTRIBUTE = "_manyheads"
OPERANDS = "manyheads_operands"
# The keyword argument in which a module's hook hands the call's cache layer and hidden states to `attend`.
CALL = "manyheads_call"

Label = Literal["freed", "masked", "simulated", "dense"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One attention module's part. policy is None if all keys stay; then budget is None as well.

    swaps: whether the model's cache gets a layer of ours in this place.
    """

    index: int
    name: str
    form: Form
    engine: str
    policy: Policy | None = None
    budget: Budget | None = None

    def __deepcopy__(self, memo: dict) -> Plan:
        return self  # a copied cache or model goes on with the same plan

    @property
    def recurrent(self) -> bool:
        return isinstance(self.form, Recurrence)

    @property
    def stored_operands(self) -> tuple[str, ...]:
        """Operands with a value for each token, which later queries need as they need the keys."""
        if self.recurrent:
            return ()
        return tuple(name for name, operand in self.form.operands.items() if operand.per_token)

    @property
    def label(self) -> Label:
        if self.recurrent or self.policy is not None:
            return "freed"
        return "dense" if isinstance(self.form, Scores) and _sees_all_before(self.form.program) else "masked"


@dataclass(frozen=True, eq=False)
class Call:
    """What a module's hook finds in its arguments: the cache layer, or None without a cache, and the hidden states
    [batch, q_len, dim], if there are operands to project."""

    layer: Any
    hidden: Tensor | None
