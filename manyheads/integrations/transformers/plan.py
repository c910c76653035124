"""What is done in one layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from manyheads.cache.budgets import Budget
from manyheads.cache.policy import Policy
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
    """One attention module's part. name: the mechanism's. policy and budget are None if all keys stay.

    note: what a user should know about the mechanism, or "".
    """

    index: int
    name: str
    form: Form
    engine: str
    policy: Policy | None = None
    budget: Budget | None = None
    note: str = ""

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

    @cached_property
    def label(self) -> Label:
        if self.recurrent or self.policy is not None:
            return "freed"
        return "dense" if self.reads_all else "masked"

    @cached_property
    def positionless(self) -> bool:
        """Only the order of the keys matters, and not how far apart they stand."""
        return self.reads_all and isinstance(self.form, Scores) and not self.form.program.has_score

    @cached_property
    def reads_all(self) -> bool:
        """Every query reads every key before it."""
        if not isinstance(self.form, Scores):
            return False
        return Scores(mask=self.form.mask, operands=self.form.operands).program.key == _CAUSAL.program.key


_CAUSAL = Scores(mask=lambda b, h, i, j: j <= i)


@dataclass(frozen=True, eq=False)
class Call:
    """What a module's hook finds in its arguments: the cache layer, or None without a cache, and the hidden states
    [batch, q_len, dim], if there are operands to project."""

    layer: Any
    hidden: Tensor | None
