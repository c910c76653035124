"""What a mechanism is made of: forms, operands, expressions, positions. Imports torch alone."""

from manyheads.core.forms import (
    Blocks,
    Form,
    Function,
    Operand,
    Projections,
    Recurrence,
    Scores,
    Selection,
    Sum,
    as_linear,
    one,
    unit,
)
from manyheads.core.mechanism import Law, Mechanism, mechanism
from manyheads.core.merge import merge

__all__ = [
    "Blocks",
    "Form",
    "Function",
    "Law",
    "Mechanism",
    "Operand",
    "Projections",
    "Recurrence",
    "Scores",
    "Selection",
    "Sum",
    "as_linear",
    "mechanism",
    "merge",
    "one",
    "unit",
]
