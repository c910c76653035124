"""Finds where a Gluon kernel's scratch, or another of its allocations, lies over shared memory that a product or a copy
in flight still reads. Triton gives room away behind the last operation that names it, though what that began reads on.

Without a GPU, from a compiled kernel's TTGIR; line by line, so that of a loop its first turn is seen.
"""

from __future__ import annotations

import re
import tempfile
from math import prod
from pathlib import Path

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
Span = tuple[int, int]  # of bytes: from, to


def allocated(ttgir: str) -> str:
    """The same with `allocation.offset`."""
    from triton._C.libtriton import ir, nvidia, passes

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir, encoding="utf-8")
        context = ir.context()
        ir.load_dialects(context)
        nvidia.load_dialects(context)
        module = ir.parse_mlir_module(str(path), context)
        module.context = context
        manager = ir.pass_manager(context)
        passes.convert.add_scf_to_cf(manager)
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, 90, 84)
        manager.run(module, "allocation")
        return str(module)


def overlaps(ttgir: str) -> list[str]:
    """Lines that write where something in flight reads."""
    spans: dict[str, Span] = {}
    products: list[list[Span]] = []
    copies: list[list[Span]] = []
    captured: list[str] = []
    found = []
    for line in map(str.strip, allocated(ttgir).splitlines()):
        if call := re.match(r"ttg\.warp_specialize\(([^)]*)\)", line):
            captured = [name.strip() for name in call[1].split(",")]
        elif group := re.match(r"partition\d+\((.*)\) num_warps", line):
            names = re.findall(r"(%\w+):", group[1])
            spans |= {own: spans[given] for own, given in zip(names, captured, strict=True) if given in spans}
            products, copies = [], []
        elif view := re.match(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)(?:\[%c(\d+)_i32)?", line):
            if view[2] in spans:
                spans[view[1]] = part(spans[view[2]], line, view[3])
        elif "warp_group_dot_wait" in line:
            products = left(products, line)
        elif "async_tma_store_wait" in line:
            copies = left(copies, line)
        elif (dot := re.search(r"ttng\.warp_group_dot (%\w+), (%\w+)", line)) and "isAsync = true" in line:
            products.append([spans[name] for name in dot.groups() if name in spans])
        elif copy := re.match(r"ttng\.async_tma_copy_local_to_global %\w+\[.*?\] (%\w+)", line):
            copies.append([spans[copy[1]]])
        elif "module" not in line and (place := re.search(r"allocation\.offset = (\d+)", line)):
            begin = int(place[1])
            own = begin, begin + (size(line) if "ttg.local_alloc" in line else 1)  # of scratch the size is not said
            if name := re.match(r"(%\w+) = ttg\.local_alloc", line):
                spans[name[1]] = own
            if any(first < own[1] and begin < last for each in products + copies for first, last in each):
                found.append(line)
    return found


def left(begun: list[list[Span]], line: str) -> list[list[Span]]:
    """Of what is in flight, what a wait leaves there."""
    pending = re.search(r"pendings = (\d+)", line)
    assert pending, line
    return begun[len(begun) - int(pending[1]) :]


def size(line: str) -> int:
    """Bytes of the last type of a line."""
    shape, kind = re.findall(r"!ttg\.memdesc<((?:\d+x)+)(\w+)", line)[-1]
    return prod(map(int, shape.rstrip("x").split("x"))) * BYTES[kind]


def part(whole: Span, line: str, index: str | None) -> Span:
    """What a view shows: all of it, unless an index is known."""
    if index is None or "memdesc_index" not in line:
        return whole
    begin = whole[0] + int(index) * size(line)
    return begin, begin + size(line)
