"""What tracing leaves behind: the nodes of a mask and a score, in an order and under a key of their own.

A graph holds neither the numbers nor the tensors it was traced with, and how the functions came to their results does
not show in it: nodes stand in the order in which the results need them, and the key is a digest of their text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """One value. args are indices of earlier nodes; depends are the letters of the inputs behind it, "d" for i - j.

    op is a row of OPS, or: "input" (payload: its letter), "const" (payload: a Python number), "number" (payload: its
    place among the lifted numbers), "load" (a tensor read at args; payload: the captured tensor's place, or the
    operand's name).
    """

    op: str
    args: tuple[int, ...]
    kind: str
    payload: Any
    depends: frozenset[str]


class Gradient(NamedTuple):
    """A number that a score reads from a float tensor, and the derivative of the score by it.

    source: the captured tensor's place, or the operand's name. index: the nodes it is read at, not yet wrapped and
    clamped. factor: the node of the derivative.
    """

    source: int | str
    index: tuple[int, ...]
    factor: int


Schedule = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """What tracing leaves behind: immutable, in canonical order, free of the numbers and tensors it was traced with.

    mask, score: index of the result, or None. operands: the declared (ndim, kind) of each operand.
    numbers, tensors: kind of each lifted number, (ndim, kind) of each captured tensor. key: see Program.key.
    dscore, gradients: the score's derivatives, behind all other nodes, if they were asked for: see derive.
    """

    nodes: tuple[Node, ...]
    mask: int | None
    score: int | None
    operands: dict[str, tuple[int, str]]
    numbers: tuple[str, ...]
    tensors: tuple[tuple[int, str], ...]
    key: str
    schedules: dict[int, Schedule]
    dscore: int | None = None
    gradients: tuple[Gradient, ...] = ()


def schedule(nodes: tuple[Node, ...], root: int, leaves: frozenset[int] = frozenset()) -> Schedule:
    """What to compute for root, in order: (node, nodes that nobody needs after it). Stops at leaves."""
    reached, stack = set(), [root]
    while stack:
        index = stack.pop()
        if index not in reached:
            reached.add(index)
            stack.extend(() if index in leaves else nodes[index].args)
    last_use = {root: -1}
    dead: dict[int, list[int]] = {index: [] for index in reached}
    for index in sorted(reached, reverse=True):
        for arg in () if index in leaves else nodes[index].args:
            if arg not in last_use:
                last_use[arg] = index
                dead[index].append(arg)
    return tuple((index, tuple(dead[index])) for index in sorted(reached))


def canonical(
    nodes: Sequence[Node],
    ends: tuple[int | None, int | None],
    operands: Mapping[str, tuple[int, str]],
    numbers: Sequence[int | float],
    tensors: Sequence[Tensor],
) -> tuple[Graph, tuple[int | float, ...], tuple[Tensor, ...]]:
    """The graph of a mask and a score that end at those nodes, and its numbers and tensors.

    It has what both need, numbered in the order they need it.
    """
    order = {old: new for new, old in enumerate(_needed_first(nodes, [end for end in ends if end is not None]))}
    slots: dict[str, dict[Any, int]] = {"number": {}, "load": {}}
    renumbered = []
    for old in order:
        node = nodes[old]
        payload = node.payload
        if node.op in slots and not isinstance(payload, str):
            payload = slots[node.op].setdefault(payload, len(slots[node.op]))
        renumbered.append(node._replace(args=tuple(order[a] for a in node.args), payload=payload))
    numbers = tuple(numbers[slot] for slot in slots["number"])
    tensors = tuple(tensors[slot] for slot in slots["load"])
    mask, score = (None if end is None else order[end] for end in ends)
    graph = Graph(
        nodes=tuple(renumbered),
        mask=mask,
        score=score,
        operands=dict(operands),
        numbers=tuple("f" if isinstance(n, float) else "i" for n in numbers),
        tensors=tuple((t.ndim, kind_of(t)) for t in tensors),
        key=_key(renumbered, [mask, score]),
        schedules={end: schedule(tuple(renumbered), end) for end in (mask, score) if end is not None},
    )
    return graph, numbers, tensors


def _key(nodes: Sequence[Node], ends: list[int | None]) -> str:
    lines = [f"{n.op} {n.args} {n.kind} {n.payload!r}" for n in nodes]
    return hashlib.sha256("\n".join([*lines, str(ends)]).encode()).hexdigest()[:16]


def _needed_first(nodes: Sequence[Node], roots: list[int]) -> list[int]:
    """What roots need, each node behind its arguments: the same order however the function came to its result."""
    order: dict[int, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        index, ready = stack.pop()
        if ready:
            order[index] = None
        elif index not in order:
            stack.append((index, True))
            stack.extend((arg, False) for arg in reversed(nodes[index].args))
    return list(order)


def kind_of(tensor: Tensor) -> str:
    return "b" if tensor.dtype == torch.bool else "f" if tensor.is_floating_point() else "i"
