"""The rules by which an operation becomes a node: how its operands are typed, and when it needs no node at all.

Only what holds for every number that may be bound later is simplified: constants are known, lifted numbers are not.
As in ops.py, t is the tracer, by which the rules apply other operations.
"""

from __future__ import annotations

from typing import Any

from manyheads.core.expressions.expression import Expression, TraceError
from manyheads.core.expressions.ops import KINDS, OPS

COMMUTE = {"add", "mul", "min", "max", "and", "or", "xor", "eq"}
BAKED = {"floordiv", "mod", "shl", "shr"}  # a number as their second operand becomes a constant


def typed(t: Any, name: str, args: list[Expression]) -> tuple[list[Expression], str]:
    """The operands cast by the operation's type rule, and the kind of its result."""
    rule = OPS[name].rule
    values = args[1:] if rule == "choice" else args
    widest = max((a._kind for a in values), key=KINDS.index)
    if rule in ("bits", "shift") and widest == "f":
        raise TraceError(f"{name} was given a float", "it with booleans or integers")
    if rule == "number":
        kind = max(widest, "i", key=KINDS.index)
        return [t.cast(a, kind) for a in args], kind
    if rule in ("bits", "test"):
        return [t.cast(a, widest) for a in args], widest if rule == "bits" else "b"
    if rule == "shift":
        return [t.cast(a, "i") for a in args], "i"
    if rule == "real":
        return [t.cast(a, "f") for a in args], "f"
    if rule == "choice":
        return [t.cast(args[0], "b"), *(t.cast(a, widest) for a in values)], widest
    return args, rule[0]  # a cast


def is_const(t: Any, x: Expression, value: Any = None) -> bool:
    """Whether x is known for good (with that value); a lifted number is not."""
    return t.nodes[x._index].op == "const" and (value is None or x._value == value)


def simplified(t: Any, name: str, args: list[Expression], kind: str) -> Expression | None:
    """What the operation on typed operands comes to without a node of its own; None if it needs one."""
    x, y = args[0], args[-1]
    if name == "where":
        return _simplified_where(t, x, args[1], y, kind)
    if name in ("add", "sub") and is_const(t, y, 0):
        return x
    if is_const(t, y, 1) and (name in ("mul", "div") or (name == "floordiv" and kind == "i")):
        return x
    if name == "mul" and kind == "i" and is_const(t, y, 0):
        return y
    if name == "sub" and is_const(t, x, 0):
        return t.apply("neg", y)
    if name == "mul" and x is y:
        return t.apply("square", x)
    if name == "sub":
        return _difference(t, x, y)
    if kind == "b" and name in ("and", "or") and is_const(t, y):
        return y if y._value == (name == "or") else x
    node = t.nodes[x._index]
    if name in ("neg", "not") and node.op == name:
        return t.expressions[node.args[0]]
    return None


def _difference(t: Any, x: Expression, y: Expression) -> Expression | None:
    """i - j is an input of its own: what depends on it alone is known exactly in each tile."""
    i, j, d = t.input("i"), t.input("j"), t.input("d")
    if x is i and y is j:
        return d
    return t.apply("neg", d) if x is j and y is i else None


def _simplified_where(t: Any, test: Expression, x: Expression, y: Expression, kind: str) -> Expression | None:
    if x is y:
        return x
    if is_const(t, test):
        return x if test._value else y
    node = t.nodes[test._index]
    if node.op == "lt" and {x._index, y._index} == set(node.args):  # Python's min and max
        return t.apply("min" if node.args[0] == x._index else "max", x, y)
    if kind != "b":
        return None
    if test is y or is_const(t, y, False):
        return t.apply("and", test, x)
    if test is x or is_const(t, x, True):
        return t.apply("or", test, y)
    if is_const(t, y, True):
        return t.apply("or", t.apply("not", test), x)
    if is_const(t, x, False):
        return t.apply("and", t.apply("not", test), y)
    return None
