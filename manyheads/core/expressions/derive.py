"""Derivatives of a score: by s, and by each number that it reads from a float tensor.

They are nodes behind those of the score, made by the same rules and simplified as they are made, so that whatever reads
a graph reads its derivatives too. The derivatives of each node follow from those of its operands, from the score's
leaves upwards: then a branch that is not taken contributes nothing, where the other direction would multiply its
infinite slope by zero. At a tie the left operand of a minimum or maximum takes the whole derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from manyheads.core.expressions.expression import Expression
from manyheads.core.expressions.graph import Gradient, Graph, Node, schedule
from manyheads.core.expressions.ops import OPS
from manyheads.core.expressions.trace import Tracer


def derive(graph: Graph, tensors: Sequence[Tensor]) -> Graph:
    """The graph with `dscore`, and with one of `gradients` for each place where the score reads floats."""
    tracer, expressions = _reopened(graph, tensors)
    if graph.score is None:
        dscore, gradients = tracer.const(1.0), ()
    else:
        steps = [index for index, _ in schedule(graph.nodes, graph.score)]
        s = next((k for k in steps if graph.nodes[k].op == "input" and graph.nodes[k].payload == "s"), None)
        dscore = _derivative(tracer, expressions, steps, s)
        reads = (k for k in steps if graph.nodes[k].op == "load" and graph.nodes[k].kind == "f")
        gradients = tuple(
            Gradient(graph.nodes[k].payload, graph.nodes[k].args, _derivative(tracer, expressions, steps, k)._index)
            for k in reads
        )
    nodes = tuple(tracer.nodes)
    ends = (dscore._index, *(g.factor for g in gradients))
    schedules = {**graph.schedules, **{end: schedule(nodes, end) for end in ends}}
    return replace(graph, nodes=nodes, schedules=schedules, dscore=dscore._index, gradients=gradients)


def _reopened(graph: Graph, tensors: Sequence[Tensor]) -> tuple[Tracer, list[Expression]]:
    """A tracer that goes on behind a graph's nodes, and the expressions of those."""
    tracer, expressions = Tracer(graph.operands), []
    tracer.tensors = list(tensors)
    for node in graph.nodes:
        args = [expressions[a] for a in node.args]
        value = node.payload if node.op == "const" else None
        expressions.append(tracer.node(node.op, args, node.kind, node.payload, value))
    assert len(tracer.nodes) == len(graph.nodes), "no node of a graph is there twice"
    return tracer, expressions


def _derivative(tracer: Tracer, expressions: list[Expression], steps: list[int], leaf: int | None) -> Expression:
    """Of the last step by a leaf."""
    found: dict[int, Expression] = {}  # those that are not zero
    for index in steps:
        node = tracer.nodes[index]
        if index == leaf:
            found[index] = tracer.const(1.0)
        elif node.op in OPS and node.kind == "f":
            terms = _terms(tracer, node, expressions[index], [expressions[a] for a in node.args], found)
            if terms:
                found[index] = _sum(tracer, terms)
    return tracer.cast(found.get(steps[-1], tracer.const(0.0)), "f")


def _terms(
    tracer: Tracer, node: Node, result: Expression, operands: list[Expression], found: dict[int, Expression]
) -> list[tuple[Expression, Expression]]:
    """(slope, derivative) of each operand that has both. A boolean slope is what the derivative counts under."""
    slopes = zip(node.args, OPS[node.op].slopes, strict=False)
    return [
        (tracer.wrap(slope(result, *operands)), found[arg])
        for arg, slope in slopes
        if slope is not None and arg in found
    ]


def _sum(tracer: Tracer, terms: list[tuple[Expression, Expression]]) -> Expression:
    (first, value), *rest = terms
    if first._kind == "b":
        return tracer.apply("where", first, value, rest[0][1] if rest else 0.0)
    total = _scaled(tracer, first, value)
    for slope, value in rest:
        total = tracer.apply("add", total, _scaled(tracer, slope, value))
    return total


def _scaled(tracer: Tracer, slope: Expression, value: Expression) -> Expression:
    if slope._value == -1:
        return tracer.apply("neg", value)
    return tracer.apply("mul", slope, value)
