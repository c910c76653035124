"""Compile every kernel without a GPU, and read from the machine code what it takes.

    python benchmarks/compiled.py                               with the Triton that is installed
    python benchmarks/compiled.py --tritons 3.7.1 3.8.0 3.9.0   and with these, side by side (pip fetches them)
    python benchmarks/compiled.py --only plain                  the plain kernels alone

Hopper's kernels for sm_90a: registers, bytes of shared memory, spilled words, matrix instructions of the right kind
(HGMMA). The plain ones for Hopper, Blackwell (sm_100) and an AMD MI300 (gfx942): that they compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCORES = ("full", "causal", "softcap", "alibi", "dropout")
ALPHAS = {"entmax": 1.5, "sparsemax": 2.0, "alphas": "alpha"}
LIMIT = 227 * 1024  # bytes of shared memory of one program on Hopper


class Found(NamedTuple):
    registers: int
    shared: int
    spilled: int
    hgmma: int


def form_of(name: str):
    """A form, made from new functions."""
    import torch

    from manyheads.core.forms import Operand, Scores

    slopes = torch.rand(16)

    def causal(b, h, i, j):
        return j <= i

    if name in ALPHAS:
        return Scores(mask=causal, normaliser="entmax", alpha=ALPHAS[name], operands={"alpha": Operand("heads")})
    return {
        "full": lambda: Scores(),
        "causal": lambda: Scores(mask=causal),
        "dropout": lambda: Scores(mask=causal),
        "top-k": lambda: Scores(mask=causal, normaliser="top_k", top_k=64),
        "softcap": lambda: Scores(mask=causal, score=lambda s, b, h, i, j: 50.0 * torch.tanh(s / 50.0)),
        "alibi": lambda: Scores(mask=causal, score=lambda s, b, h, i, j: s - slopes[h] * (i - j)),
    }[name]()


# ---- Hopper's kernels ----


def hopper_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    from manyheads.engines.triton.hopper import backward, forward, given_levels, launching, looks, top_k

    for name in (*ALPHAS, "top-k"):
        known = given_levels.power_of(form_of(name)).known if name in ALPHAS else 0
        form = given_levels.scaled(form_of(name)) if name in ALPHAS else top_k.found_in(form_of(name))
        for width in forward.TILINGS:
            keys, stages, _ = forward.tiling_for(form, width)
            boxes = {"q_desc": 64, "k_desc": keys}
            constants = {"KIND": 1, "MASKED": 2, "POSITIONS": False, "q_at": None, "kv_at": None, "STAGES": stages}
            constants |= {"FIRST": False, "POWER": known} | ({"ends": None, "count": None} if name in ALPHAS else {})
            constants |= {} if name in ALPHAS and not known else {"powers": None}
            yield f"levels {name} {width}", partial(compiled, looks.LEVELS, form, boxes, width, constants)
    for name in (*SCORES, *ALPHAS, "top-k"):
        form = form_of(name)
        if name in ALPHAS:
            form = given_levels.given_levels(form, given_levels.weights, 0)
        elif name == "top-k":
            form = top_k.above_level(form, 0)
        masked, kind = form.program.has_mask, 1 if form.program.has_mask else 0
        common = {"KIND": kind, "MASKED": 2 * masked, "POSITIONS": False, "q_at": None, "kv_at": None}
        common["NORMALISER"] = launching.NORMALISERS[form.normaliser]
        common |= {} if name == "dropout" else dict.fromkeys(launching.DROPOUT)
        common |= {"bits": None, "QUERY_BLOCK": 0, "KEY_BLOCK": 0}
        for width in forward.TILINGS:
            keys, stages, deep = forward.tiling_for(form, width)
            boxes = {"q_desc": 64, "k_desc": keys, "v_desc": keys, "o_desc": 64}
            constants = {**common, "STAGES": stages, "sink": None, "DEEP": deep, "Q_STAGES": 1, "PARTS": 1}
            yield f"attend {name} {width}", lambda a=(forward.ATTEND, form, boxes, width, constants): compiled(*a)
            scored = form.program.has_score or name == "dropout"
            halves = [backward.HALVES_TILINGS[width, False]] if name == "causal" else []  # over blocks of 64 keys
            for tiling in (backward.KEYS_TILINGS[width, scored], *halves):
                boxes = {"q_desc": tiling.queries, "do_desc": tiling.queries, "top_desc": -tiling.queries}
                boxes |= {"delta_desc": -tiling.queries, "k_desc": 64, "v_desc": 64, "dk_desc": 64, "dv_desc": 64}
                for dk, dv in ((True, False), (False, True)) if tiling.apart else ((True, True),):
                    constants = {**common, "Q_STAGES": tiling.q, "DO_STAGES": tiling.do, "LATE": tiling.late}
                    constants |= {"DK": dk, "DV": dv, "HALVES": tiling.halves} | ({"KIND": 3} if tiling.halves else {})
                    label = f"{'halves' if tiling.halves else 'keys'} {name} {width}"
                    label += "" if dk and dv else " dK" if dk else " dV"
                    yield label, lambda a=(backward.KEYS, form, boxes, width, constants): compiled(*a)
            keys, k_stages, v_stages, held = backward.QUERIES_TILINGS[width]
            boxes = {"q_desc": 64, "do_desc": 64, "k_desc": keys, "v_desc": keys, "dq_desc": 64}
            constants = {**common, "Q_STAGES": 1, "K_STAGES": k_stages, "V_STAGES": v_stages, "HELD": held, "PARTS": 1}
            yield f"queries {name} {width}", lambda a=(backward.QUERIES, form, boxes, width, constants): compiled(*a)


SMALL = ((1, 128), (64, 32), (32, 2))


def small_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Hopper's over lists of such blocks, for a causal mask."""
    from manyheads.engines.triton.hopper import backward, forward, launching

    form = form_of("causal")
    common = {"MASKED": 2, "POSITIONS": False, "q_at": None, "kv_at": None, "NORMALISER": 0, "KIND": 2}
    common |= dict.fromkeys(launching.DROPOUT)
    for (query_block, key_block), width in product(SMALL, forward.TILINGS):
        label, halves = f"of {query_block} and {key_block}, {width}", key_block < 128
        sizes = {**common, "QUERY_BLOCK": query_block, "KEY_BLOCK": key_block}
        keys, stages, deep = forward.HALVES if halves and width < 256 else forward.TILINGS[width]
        boxes = {"q_desc": 64, "k_desc": keys, "v_desc": keys, "o_desc": 64}
        constants = {**sizes, "STAGES": stages, "sink": None, "DEEP": deep, "Q_STAGES": 1, "PARTS": 1}
        yield f"attend {label}", partial(compiled, forward.ATTEND, form, boxes, width, constants)
        tiling = (backward.HALVES_TILINGS if halves else backward.KEYS_TILINGS)[width, True]
        boxes = {"q_desc": tiling.queries, "do_desc": tiling.queries, "top_desc": -tiling.queries}
        boxes |= {"delta_desc": -tiling.queries, "k_desc": 64, "v_desc": 64, "dk_desc": 64, "dv_desc": 64}
        constants = {**sizes, "Q_STAGES": tiling.q, "DO_STAGES": tiling.do, "LATE": tiling.late}
        constants |= {"DK": True, "DV": not tiling.apart, "HALVES": tiling.halves}
        yield f"keys {label}", partial(compiled, backward.KEYS, form, boxes, width, constants)
        keys, k_stages, v_stages, held = backward.QUERIES_TILINGS[width]
        boxes = {"q_desc": 64, "do_desc": 64, "k_desc": keys, "v_desc": keys, "dq_desc": 64}
        constants = {**sizes, "Q_STAGES": 1, "K_STAGES": k_stages, "V_STAGES": v_stages, "HELD": held, "PARTS": 1}
        yield f"queries {label}", partial(compiled, backward.QUERIES, form, boxes, width, constants)


def gathered_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Hopper's whose tiles of keys are several blocks, for a causal mask."""
    from manyheads.engines.triton.hopper import backward, forward, launching

    form = form_of("causal")
    common = {"MASKED": 2, "POSITIONS": False, "q_at": None, "kv_at": None, "NORMALISER": 0, "KIND": 2, "bits": None}
    common |= {"QUERY_BLOCK": 0, "KEY_BLOCK": 0} | dict.fromkeys(launching.DROPOUT)
    for key_block, width in product((64, 32), forward.TILINGS):
        keys, stages, deep = forward.TILINGS[width]
        if keys > key_block:
            boxes: dict[str, Any] = {"q_desc": 64, "o_desc": 64} | dict.fromkeys(("k_desc", "v_desc"), (key_block, 64))
            constants = {**common, "STAGES": stages, "sink": None, "DEEP": deep, "PARTS": keys // key_block}
            constants["Q_STAGES"] = 1 if width > 128 else 2
            yield (
                f"attend of blocks of {key_block}, {width}",
                partial(compiled, forward.ATTEND, form, boxes, width, constants),
            )
        keys, k_stages, v_stages, held = backward.QUERIES_TILINGS[width]
        if keys > key_block:
            boxes = dict.fromkeys(("q_desc", "do_desc", "dq_desc"), 64)
            boxes |= dict.fromkeys(("k_desc", "v_desc"), (key_block, 64))
            constants = {**common, "K_STAGES": k_stages, "V_STAGES": v_stages, "HELD": held}
            constants |= {"Q_STAGES": 1 if width > 128 else 2, "PARTS": keys // key_block}
            yield (
                f"queries of blocks of {key_block}, {width}",
                partial(compiled, backward.QUERIES, form, boxes, width, constants),
            )


def list_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What makes tables of lists of blocks: plain Triton."""
    from manyheads.engines.triton.hopper import selected
    from manyheads.engines.triton.hopper.kernels import listing, turning, uniting

    marked = dict(zip(("SLOTS", "ZEROS"), selected.MARKED, strict=True))
    for along in (False, True):
        yield f"mark{' along' if along else ''}", partial(tables, uniting.mark, {**marked, "ALONG": along}, 4)
    yield "tiles of lists", partial(tables, listing.listing, {"SLOTS": 128, "STEP": selected.STEP})
    own: dict[str, Any] = dict(zip(("WORDS", "SLOTS"), selected.TURNED, strict=True))
    yield "tiles of lists turned", partial(tables, turning.turning, own)
    for turned in (False, True):
        for query_block, key_block in SMALL:
            sizes = {"QUERY_BLOCK": query_block, "KEY_BLOCK": key_block, "QUERIES": 128, "KEYS": 64}
            constants = {**sizes, "SLOTS": 128, "ALONG": key_block <= selected.FEW, "TURNED": turned}
            label = f"uniting{' turned' if turned else ''} {query_block} {key_block}"
            yield label, partial(tables, uniting.uniting, constants)


def round_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What brings queries to the blocks that they chose, and back: plain Triton."""
    from manyheads.engines.triton.hopper.kernels import moving, ordering

    sizes: dict[str, Any] = {"QUERY_BLOCK": 1, "KEY_BLOCK": 512, "SLOTS": 512}
    yield "bits of rows", partial(rounds, ordering.mark, sizes)
    yield "number of rows", partial(rounds, ordering.count, {"SLOTS": 512})
    yield "place rows", partial(rounds, ordering.place, {**sizes, "PAST": True})
    for width in (64, 128, 256):
        sizes = {"dim": width, "DIM": width, "ROWS": 16}
        yield f"gather rows {width}", partial(rounds, moving.gather, {**sizes, "TILE": 128})
        yield f"merge rows {width}", partial(rounds, moving.merge, {**sizes, "sink": None})
        yield f"add rows {width}", partial(rounds, moving.add, sizes)


def token_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Over the blocks that tokens chose, for a group of 16 heads and blocks of 64 keys: plain Triton."""
    from manyheads.engines.triton.hopper import tokens

    for width, tilings in tokens.TILINGS.items():
        for name, tiling in zip(("attend", "queries", "keys"), tilings, strict=True):
            sizes: dict[str, Any] = {"dim": width, "v_dim": width, "DIM": width, "V_DIM": width, "CAUSAL": True}
            sizes |= {"KEY_BLOCK": 64, "KEYS": tiling.keys}
            here = {"HEADS": 16, "TOKENS": tiling.rows // 16, "SHARES": 4, "FAR": False}
            sizes |= here if name == "keys" else {"ROWS": tiling.rows}
            options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
            yield f"{name} of tokens {width}", partial(rounds, getattr(tokens.tokens, name), sizes, **options)


def rounds(kernel: Any, constants: dict[str, Any], **options: int) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    narrow = ("out", "x", "o", "own_o", "part_o", "parts") + (("own",) if kernel.__name__ == "add" else ())
    narrow += ("q", "k", "v", "do", "dq")
    whole = ("rows", "slots", "words", "sums", "numbers", "shifts", "indices", "counts", "listed", "begins")
    types = dict.fromkeys(narrow, "*bf16") | dict.fromkeys(whole, "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("lse", "own_lse", "part_lse", "top", "delta", "dk", "dv"), "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*u8" if name == "own" else "i32") for name in kernel.arg_names}
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    even = [n for n, kind in signature.items() if kind[0] == "*" or (kind == "i32" and n not in free)]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    made = ASTSource(kernel, signature, given, aligned)
    return compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})


def map_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What makes tables of masks: plain Triton."""
    import torch

    from manyheads.engines.triton.hopper.kernels import listing

    of, block = torch.zeros(9, dtype=torch.int32), torch.zeros(4, 9, 9, dtype=torch.bool)
    rate = torch.zeros(4)
    yield "tiles of a map", partial(tables, listing.tiles_needed, {"SLOTS": 128})
    masks: dict[str, Callable[..., Any] | None] = {
        "documents": lambda b, h, i, j: (of[i] == of[j]) & (j <= i),
        "blocks": lambda b, h, i, j: block[h, i // 64, j // 64] & (j <= i),
        "dilation": lambda b, h, i, j: (0 <= i - j < 99) & ((i - j) % 8 == 0),
        "distance": lambda b, h, i, j: torch.log2((i - j).clamp(min=0) + 1.0) * rate[h] < 0.1 * torch.exp(i * -0.1),
        "none": None,
    }
    for name, mask in masks.items():
        for given in (False, True) if mask else (True,):
            yield f"map {name}{' of positions' if given else ''}", partial(mapped, mask, given)


def mapped(mask: Callable[..., Any] | None, given: bool) -> Any:
    """given: positions are tensors."""
    import torch
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from manyheads.core.expressions import trace
    from manyheads.engines.triton.hopper import maps

    constants: dict[str, Any] = {"QUERIES": 128, "KEYS": 128, "BLOCK": maps.BLOCK}
    constants |= {} if given else {"q_at": None, "kv_at": None}
    types = {"out": "*u8", "q_at": "*i64", "kv_at": "*i64"}
    if mask is None:
        entry, constants = maps.mapping.mapping, {**constants, "A": None, "BOUNDS": None}
    else:
        program = trace(mask)
        source = program.source(outputs=("bounds",))
        entry = maps.MAPPING.entry(source)
        kinds = {torch.int32: "*i32", torch.bool: "*i1", torch.float32: "*fp32"}
        types |= {a.name: kinds[program.tensors[int(a.of)].dtype] for a in source.signature if a.kind in POINTERS}
        types |= {a.name: "fp32" for a in source.signature if a.kind in ("fp32", "inverse")}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in entry.arg_names}
    places = {name: (k,) for k, name in enumerate(entry.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    made = ASTSource(entry, signature, {places[name]: value for name, value in constants.items()}, aligned)
    return compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


POINTERS = ("pointer", "least", "greatest")


def tables(kernel: Any, constants: dict[str, Any], warps: int = 1) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"out": "*i32", "bits": "*i32", "listed": "*i32", "indices": "*i32", "counts": "*i32", "states": "*u8"}
    types |= {"free": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def compiled(kernel: Any, form: Any, boxes: dict[str, Any], width: int, constants: dict[str, Any]) -> Any:
    """boxes: rows of each descriptor's box, or rows and columns; less than 0 for numbers of that many queries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    def descriptor(box: int | tuple[int, int]) -> str:
        rows, columns = box if isinstance(box, tuple) else (box, width)
        numbers = [1, -rows], gl.float32, "fp32"
        block, kind, name = ([1, 1, rows, columns], gl.bfloat16, "bf16") if rows > 0 else numbers
        return f"tensordesc<{name}{block},{gl.NVMMASharedLayout.get_default_for(block, kind)!r}>".replace("'", "")

    source = form.program.source("gluon", kernel.functions)
    entry = kernel.entry(source)
    numbers = {"fp32": "fp32", "inverse": "fp32", "i64": "i64", "pointer": "*fp32"}
    types = {a.name: numbers.get(a.kind, "i32") for a in source.signature}
    types |= {"lse": "*fp32", "top": "*fp32", "delta": "*fp32", "table": "*i32", "scale": "fp32", "seed": "*i64"}
    types |= {"inflation": "fp32", "level": "*fp32", "powers": "*fp32", "ahead": "*i32", "bits": "*i32"}
    types |= {"ends": "*fp32"}
    types |= {name: descriptor(rows) for name, rows in boxes.items()} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in entry.arg_names}
    places = {name: (k,) for k, name in enumerate(entry.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    given = {places[name]: value for name, value in constants.items()}
    made = GluonASTSource(entry, signature, constexprs=given, attrs=aligned)
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def read(kernel: Any) -> Found:
    """What the machine code says."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(name: str, option: str) -> str:
            return subprocess.run([tools / name, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, text = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    count = {name: len(re.findall(rf"\b{name}\b", text)) for name in ("STL", "HGMMA")}
    return Found(int(found[1]), kernel.metadata.shared, count["STL"], count["HGMMA"])


# ---- recurrences ----

WRITES = {
    "add": (), "channels": ("A", "K_OUT"), "delta": ("T", "BETA"), "delta channels": ("A", "B", "T", "BETA", "K_OUT"),
}  # fmt: skip
LEFT_OUT = {  # what nobody asks for in a launch
    "walk": ("U", "TRANSITION", "TOTALS", "STATES"), "walk segments": ("Q", "O", "START", "U", "STATES"),
    "walk states": ("O", "TRANSITION", "TOTALS", "END"), "back": ("TRANSITION", "TOTALS"),
    "back segments": ("START", "Z", "DV_", "STATES"),
}  # fmt: skip


def recurrence_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    for writes in WRITES:
        launches = [*LEFT_OUT, "gradients", *(["solve"] if "delta" in writes else [])]
        launches += ["inner", "inner blocks", "pairs"] if "channels" in writes else []
        for launch in launches:
            for width in (64, 128, 256):
                if not ("segments" in launch and "delta" in writes and width > 128):
                    yield f"{launch} {writes} {width}", partial(recurrence, launch, writes, width)


def recurrence(launch: str, writes: str, width: int) -> Any:
    from importlib import import_module

    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from manyheads.engines.triton.chunked import tables

    name = launch.split()[0]
    kernel = getattr(import_module(f"manyheads.engines.triton.chunked.kernels.{name}"), name)
    # As call.py has them.
    blocks = launch == "inner blocks"
    tile = tables.tile(launch if blocks else name, 2, width, width, "channels" in writes)
    constants: dict[str, Any] = {"D": width, "DV": width, "PD": width, "BV": tile.columns, "BK": tile.columns}
    constants |= {"C": tables.CHUNK[2], "CHANNELS": "channels" in writes, "KEEP": True, "EVEN": True, "UNIT": 1}
    constants |= {"MODERATE": not blocks, "SIMULATED": False}
    read = {"A", "B", "T", "BETA", "K_OUT"}
    read |= set(() if "delta" in writes else ("U", "Z", "TRANSITION", "DBETA", "DB", "K_IN"))
    read |= set(() if "channels" in writes else ("DA", "DB"))
    read |= {"K"} if name == "walk" and writes == "channels" else set()
    absent = {*LEFT_OUT.get(launch, ()), *(read - set(WRITES[writes]))}
    if launch == "walk states" and "delta" in writes:
        absent.discard("U")
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names} | {
        n: None for n in kernel.arg_names if n in absent
    }
    wide = {"START", "END", "TRANSITION", "TOTALS", "SUMS", "ENDS", "FADES", "STRENGTHS", "G", "BETA", "DG", "DBETA"}
    wide |= {"DQ_PART", "DK_PART", "DG_PART"}
    types = {n: "*fp32" if n in wide else "*bf16" if n.isupper() or n == "DV_" else "i32" for n in kernel.arg_names}
    types |= {"scale": "fp32"} if "scale" in types else {}
    types |= dict.fromkeys(constants, "constexpr")
    free = {p.name for p in kernel.params if p.do_not_specialize}
    even = [n for n in kernel.arg_names if types[n][0] == "*" or (types[n] == "i32" and "_" in n and n not in free)]
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    return compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32), options=tile.options)


STATES = dict.fromkeys(("START", "END", "TRANSITION", "TOTALS", "FADES", "DG", "DBETA"), "*fp32") | {"scale": "fp32"}
STATES |= {"A": "*bf16"} | dict.fromkeys(("G", "ENDS", "SUMS", "BETA"), "*fp32")


def walk_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of recurrences on Hopper, in Gluon."""
    for writes, (decays, corrects) in {"add": (True, False), "delta": (False, True), "gated": (True, True)}.items():
        for width in (64, 128):
            own = {"DECAYS": decays, "CORRECTS": corrects, "ends_desc": None, "A": None, "ENDS": None}
            yield from walks_of("", f"{writes} {width}", width, own)


def channel_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same where channels decay by themselves."""
    for writes, width in (("add", 64), ("add", 128), ("delta", 128)):
        own = {"DECAYS": True, "CORRECTS": writes == "delta", "ENDS": None}
        yield from walks_of("channels ", f"{writes} {width}", width, own)
        if writes == "add":  # walks that find last sums; the one for outputs leaves them behind
            for launch, ends in (("walk {}segments", {"ENDS": None}), ("walk {}outputs", {})):
                found = {"DECAYS": True, "CORRECTS": False, "ends_desc": None, "A": None} | ends
                yield from walks_of("channels ", f"{writes} {width} found", width, found, only=launch)
        given = {"CORRECTS": writes == "delta", "DIM": width, "V_DIM": 128, "g_n": width}
        given |= {} if writes == "delta" else dict.fromkeys(("BETA", "DBETA"))
        yield f"gradients channels {writes} {width}", partial(walked, "gradients_channels", width, given)


def walks_of(
    kind: str, name: str, width: int, own: dict[str, Any], only: str | None = None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    whole, corrects = dict.fromkeys(("TRANSITION", "TOTALS", "FADES")), own["CORRECTS"]
    local = {"START": None} | ({} if own["DECAYS"] else {"FADES": None}) | ({} if corrects else {"TRANSITION": None})
    own |= {"OUTPUTS": False, "STATES": False, "BACKWARDS": False}
    launches = {
        "walk {}outputs": whole | {"OUTPUTS": True}, "walk {}states": whole | {"STATES": True, "END": None},
        "walk {}segments": local, "back {}": whole, "back {}segments": local,
    }  # fmt: skip
    for launch, constants in launches.items():
        if only not in (None, launch):
            continue
        adds = launch == "back {}segments" and not corrects
        kernel = "walk" if adds else launch.split()[0]
        made = partial(walked, kernel, width, own | constants | {"BACKWARDS": adds}, channels=bool(kind))
        yield f"{launch.format(kind)} {name}".replace("  ", " "), made


def walked(name: str, width: int, constants: dict[str, Any], channels: bool = False) -> Any:
    """width: of keys; there are 128 values."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from manyheads.engines.triton.chunked import hopper

    def descriptor(name: str, *block: int) -> str:
        kind, text = (gl.float32, "fp32") if name in ("g", "ends", "beta") else (gl.bfloat16, "bf16")
        layout = gl.NVMMASharedLayout.get_default_for(list(block), kind)
        return f"tensordesc<{text}{list(block)},{layout!r}>".replace("'", "")

    entry = getattr(import_module(f"manyheads.engines.triton.chunked.hopper.kernels.{name}"), name)
    half = dict.fromkeys(("v", "out", "do", "z", "dv", "u"), (1, 1, 64, hopper.HALF))
    blocks = half | dict.fromkeys(("q", "k", "dq", "dk"), (1, 1, 64, width)) | dict.fromkeys(("g", "beta"), (1, 64))
    blocks |= {"t": (64, 64), "states": (1, width, hopper.HALF), "ends": (1, width)}
    stages = hopper.STAGES if name == "walk" else hopper.BACK_STAGES
    if name == "gradients_channels":
        blocks = dict.fromkeys(("s", "d", "do", "u", "z", "q", "k", "dq", "dk"), (1, 1, 64, 64))
    if channels:
        blocks |= {"g": (1, 1, 64, width)}
        stages = hopper.BACK_STAGES
    constants = {n: v for n, v in ({"DV": 128, "STAGES": stages} | constants).items() if n in entry.arg_names}
    types = dict.fromkeys(entry.arg_names, "i32") | {f"{n}_desc": descriptor(n, *b) for n, b in blocks.items()}
    types |= STATES | dict.fromkeys(constants, "constexpr")
    types = {n: types[n] for n in entry.arg_names}
    places = {n: (k,) for k, n in enumerate(entry.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n, kind in types.items() if kind[0] == "*"}
    made = GluonASTSource(entry, types, constexprs={places[n]: v for n, v in constants.items()}, attrs=aligned)
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options=hopper.OPTIONS)


def fused_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    for writes, (decays, corrects) in {"add": (True, False), "delta": (False, True), "gated": (True, True)}.items():
        constants = {"GATED": decays, "CORRECTS": corrects}
        constants |= ({} if decays else {"DG": None}) | ({} if corrects else {"DBETA": None})
        yield f"fused {writes}", partial(walked, "fused", 128, constants)


def gradient_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those in Gluon."""
    for writes in ("add", "delta"):
        for width in (64, 128):
            yield f"Hopper gradients {writes} {width}", partial(gradients, writes == "delta", width)


def gradients(corrects: bool, width: int) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from manyheads.engines.triton.chunked import tables
    from manyheads.engines.triton.chunked.hopper.gradients import STAGES, kernels

    kernel = kernels.gradients

    def descriptor(rows: int) -> str:
        block = [1, 1, rows, width]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return f"tensordesc<bf16{block},{layout!r}>".replace("'", "")

    types = {f"{name}_desc": descriptor(tables.CHUNK[2]) for name in ("z", "v", "u", "do", "q", "k", "dq", "dk")}
    types |= {f"{name}_desc": descriptor(width) for name in ("s", "d")}
    constants: dict[str, Any] = {"HEAD_DIM": width, "CORRECTS": corrects, "DECAYS": True, "STAGES": STAGES}
    constants |= {"DK": None} | ({} if corrects else dict.fromkeys(("BETA", "DBETA")))
    types |= {"DQ": "*bf16", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32" if name.isupper() else "i32") for name in kernel.arg_names}
    places = {name: (k,) for k, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    given = {places[name]: value for name, value in constants.items()}
    made = GluonASTSource(kernel, signature, constexprs=given, attrs=aligned)
    return compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


# ---- choosing blocks ----

BLOCKS = (64, 256, 1024, 2048, 8192)  # of keys


def choosing_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    from manyheads.engines.triton.choosing import crossing, estimating, launches, sorting, weighing

    absent: dict[str, Any] = {"indices": None, "counts": None}
    own: dict[str, Any]
    for width in (64, 128):
        own = {"ROWS": launches.TILE // width, "D": width, "PD": width}
        yield f"means {width}", partial(choosing, "means", "means", own)
    for blocks in BLOCKS:
        rows = launches.held(blocks, launches.warps(blocks))
        own = {"ROWS": rows, "COLUMNS": blocks, "LINE": launches.line_of(blocks), "FIRST": False}
        best, fewest = {**own, "share": None, "kept": None}, {**own, **absent}
        yield f"best of {blocks}", partial(choosing, "rows", "heaviest_of_rows", best)
        yield f"fewest of {blocks}", partial(choosing, "rows", "heaviest_of_rows", fewest)
        for name, shared in (("best", False), ("fewest", True)):
            own = {"SHARE": shared, "COUNTED": not shared, "D": 128, "PRECISION": "tf32x3"}
            own |= launches.tile_of(blocks, 128)
            yield f"{name} past of {blocks}", partial(choosing, "past", "past", own)
        tile = {"TOGETHER": 4, **weighing.window_tile_of(blocks, 4, 1, 4, 128, 4), "PRECISION": "tf32x3"}
        yield f"windows of {blocks}", partial(choosing, "windows", "windows", tile)
    own = {"D": 128, "PD": 128, "ROWS": weighing.ROWS, "PART": weighing.KEYS, "PRECISION": "tf32x3"}
    yield "parts", partial(choosing, "stripes", "parts", own)
    yield "stripes", partial(choosing, "stripes", "stripes", {"ROWS": weighing.ROWS, "PART": weighing.KEYS})
    own = {"FIRST": False, "LINE": launches.MEASURED, "PART": launches.TOGETHER}
    yield "measure", partial(choosing, "long", "measure", own)
    yield "keep", partial(choosing, "long", "keep", {"FIRST": False, "LINE": launches.KEPT})
    yield "halved", partial(choosing, "scores", "halved", {"N": weighing.HALVED})
    yield "divisors", partial(choosing, "stripes", "divisors", {"TILES": weighing.TILES, "ROWS": weighing.SOME})
    yield "listing", partial(choosing, "listing", "listing", {"ROWS": 4, "COLUMNS": 512})
    own = {"D": 128, "PD": 128, "ROWS": crossing.ROWS, "PART": launches.PART, "PRECISION": "tf32x3"}
    yield "masses", partial(choosing, "cells", "masses", own)
    for blocks in BLOCKS:
        own = dict(zip(("D", "PD", "PART", "COLUMNS", "LINE"), crossing.stripes_tile_of(blocks, 128), strict=True))
        yield f"heaviest stripes of {blocks}", partial(choosing, "cells", "stripes", own)
    yield "crossed", partial(choosing, "cells", "crossed", {"ROWS": 4, "COLUMNS": 512})
    own = {"SIGNS": 7, "PS": 16, "D": 128, "PD": 128, "ROWS": sorting.ROWS, "PRECISION": "tf32x3"}
    yield "ranks", partial(choosing, "hashing", "ranks", own)
    for name in ("to_blocks", "from_blocks"):
        yield name, partial(choosing, "hashing", name, {"D": 128, "PD": 128, "ROWS": 32})
    for name in ("count", "place"):
        yield name, partial(choosing, "turning", name, {"COLUMNS": 32})
    tile = {**estimating.tournament_tile_of(256, 1, 1, 32, 2, 128), "PRECISION": "tf32x3"}
    yield "tournaments", partial(choosing, "tournaments", "tournaments", tile)
    own = {"D": 128, "PD": 128, "ROWS": estimating.ROUNDED, "KEYS": 32}
    yield "rounded", partial(choosing, "rounding", "rounded", own)
    own = {"D": 128, "PD": 128, "ROWS": estimating.ROWS, "PART": estimating.ROWS, "PRECISION": "tf32x3"}
    yield "limits", partial(choosing, "rounding", "limits", own)
    own = {"PD": 128, **estimating.low_bits_tile_of(64, 32, torch.float8_e4m3fn)}
    yield "outweighing", partial(choosing, "low_bits", "outweighing", own)


def choosing(module: str, name: str, constants: dict[str, Any]) -> Any:
    from importlib import import_module

    import torch
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from manyheads.engines.triton.choosing import crossing, estimating, launches, weighing

    kernel = getattr(import_module(f"manyheads.engines.triton.choosing.kernels.{module}"), name)
    types = dict.fromkeys(kernel.arg_names, "i32") | {"x": "*bf16", "q": "*bf16", "kept": "*u8", "keep": "*u8"}
    types |= dict.fromkeys(("indices", "counts", "words", "begins", "numbers"), "*i32")
    types |= dict.fromkeys(("k", "space", "mass"), "*fp32") | {"out": "*i32" if module == "turning" else "*fp32"}
    types |= {
        "scores": {"high": "*fp16", "low": "*fp16", "sizes": "*fp32", "largest": "*fp32"},
        "windows": {"k": "*fp16", "low": "*fp16", "halves": "*fp16", "sizes": "*fp32"},
        "stripes": {"k": "*bf16"} | dict.fromkeys(("divisor", "tops", "totals", "sums"), "*fp32"),
        "long": {"limits": "*u32"} | dict.fromkeys(("ended", "number_above", "before"), "*i32"),
        "cells": {"q": "*fp32", "columns": "*u8", "diagonals": "*u8", "cells": "*u8"},
        "hashing": {"k": "*bf16", "g": "*fp32", "out": "*bf16"}
        | dict.fromkeys(("q_out", "k_out", "order", "places"), "*i32"),
        "tournaments": {"k": "*bf16", "chunks": "*i32", "likes": "*fp32"},
        "rounding": {"k": "*bf16", "least": "fp32", "out": "*fp8e4nv" if name == "rounded" else "*fp32"}
        | dict.fromkeys(("mean", "middle", "sizes", "shared"), "*fp32"),
        "low_bits": {"q": "*fp8e4nv", "k": "*fp8e4nv"}
        | dict.fromkeys(("q_sizes", "k_sizes", "shared", "least"), "*fp32"),
    }.get(module, {})  # fmt: skip
    types |= dict.fromkeys(("masses", "mass_above"), "*fp32")
    types |= {"scale": "fp32", "share": "fp32" if module == "past" else "*fp32"} | dict.fromkeys(constants, "constexpr")
    types = {n: types[n] for n in kernel.arg_names}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    even = [n for n in kernel.arg_names if types[n][0] == "*" or (types[n] == "i32" and n not in free)]
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    options = {"num_warps": 8 if module == "long" else launches.warps(constants.get("COLUMNS", 1))}
    options |= {"masses": {"num_warps": crossing.WARPS}, "means": {"num_warps": 2}, "measure": {"num_warps": 4}}.get(
        name, {}
    )
    if module in weighing.OPTIONS:
        options = weighing.OPTIONS[module]
    if (module, name) == ("cells", "stripes"):
        options = {"num_warps": launches.warps(2 * constants["COLUMNS"])}
    if module == "rows":
        options = launches.rows_options(constants["COLUMNS"], "share" not in constants)
    if module == "past":
        options = launches.past_options(constants["COLUMNS"])
    if module == "low_bits":
        options = estimating.low_bits_options(torch.float8_e4m3fn)
    if module == "tournaments":
        options = estimating.tournament_options(constants)
    return compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)


# ---- the plain kernels ----


def plain_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    from triton.backends.compiler import GPUTarget

    targets = {
        "Hopper": GPUTarget("cuda", 90, 32), "Blackwell": GPUTarget("cuda", 100, 32),
        "MI300": GPUTarget("hip", "gfx942", 64),
    }  # fmt: skip
    for chip, target in targets.items():
        for name in SCORES:
            for kernel in ("forward", "keys", "queries"):
                yield f"{kernel} {name} {chip}", partial(plain, kernel, form_of(name), 128, target)


def plain(kernel: str, form: Any, head_dim: int, target: Any) -> Any:
    """With the tiles of chips that have none of their own."""
    import torch
    from triton import compile
    from triton.compiler import ASTSource

    from manyheads.engines.triton import backward, call, forward

    line, sizes = range(400), (1, 2, 2, 400, 400, head_dim, head_dim)
    of = call.Call(form.program, {}, "softmax", None, 0.1, line, line, *sizes, torch.device("cpu"), 2)
    block = of.block(kernel)
    function = getattr(forward if kernel == "forward" else backward, kernel)
    functions = ("mask", "score") if kernel == "forward" else ("mask", "score", "dscore")
    source = form.program.source("triton", functions if form.program.has_score else ("mask",))
    entry = source.entry(f"{function.fn.__module__}:{kernel}", call.parameters(function), functions, call.FIXED)
    constants = {
        "NORMALISER": "softmax", "FOLDED": not form.program.has_score, "Q_GIVEN": False, "KV_GIVEN": False,
        "D": head_dim, "DV": head_dim, "PD": head_dim, "PV": head_dim, "BM": block.queries, "BN": block.keys,
        "SIMULATED": False, "group": 1, "SINK": None, "UNIT": 1,
    }  # fmt: skip
    numbers = {"pointer": "*fp32", "fp32": "fp32", "inverse": "fp32", "i64": "i64"}
    types = {a.name: numbers.get(a.kind, "i32") for a in source.signature}
    types |= dict.fromkeys(("LSE", "DELTA"), "*fp32") | dict.fromkeys(("COUNTS", "LISTS"), "*i32")
    types |= dict.fromkeys(("Q_AT", "KV_AT"), "*i64") | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "*bf16" if n.isupper() or n == "DV_" else "i32") for n in entry.arg_names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(entry.arg_names) if signature[n][0] == "*"}
    used = {name: value for name, value in constants.items() if name in entry.arg_names}
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return compile(ASTSource(entry, signature, used, aligned), target=target, options=options)


# ---- one Triton, or several side by side ----


def check(only: str) -> dict[str, Any]:
    """By kernel: what it takes, or why it does not compile. Of plain ones the shared memory."""
    import triton

    rows: dict[str, Any] = {"triton": triton.__version__}
    tables = *list_kernels(), *map_kernels(), *round_kernels(), *token_kernels()
    hopper = [*hopper_kernels(), *small_kernels(), *tables] if only in ("hopper", "all") else []
    recurrences = *recurrence_kernels(), *walk_kernels(), *channel_kernels(), *fused_kernels(), *gradient_kernels()
    hopper += recurrences if only in ("recurrences", "all") else []
    hopper += list(choosing_kernels()) if only in ("choosing", "all") else []
    for name, make in [*hopper, *(plain_kernels() if only in ("plain", "all") else [])]:
        start = time.perf_counter()
        try:
            kernel = make()
            found = read(kernel) if (name, make) in hopper else [kernel.metadata.shared]
            rows[name] = [*found, round(time.perf_counter() - start, 1)]
        except Exception as error:
            rows[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"{name:24} {rows[name]}", file=sys.stderr, flush=True)
    return rows


def another(version: str, folder: Path, only: str) -> dict[str, Any]:
    """The same with another Triton, in a process of its own."""
    place = folder / version
    if not place.is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(place),
            f"triton=={version}",
        ]
        subprocess.run(command, check=True)
    paths = f"{place}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, __file__, "--json", "--only", only], env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout) if done.returncode == 0 else {"triton": version, "failed": done.returncode}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tritons", nargs="*", default=[], help="versions to check beside the one that is installed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tritons", help="where they go")
    parser.add_argument(
        "--only", choices=("hopper", "recurrences", "choosing", "plain", "all"), default="all", help="which kernels"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the rows of the installed one")
    given = parser.parse_args()
    found = check(given.only)
    if given.json:
        print(json.dumps(found))
        return 0
    every = [found, *(another(version, given.folder, given.only) for version in given.tritons)]
    print("registers, bytes of shared memory, spilled words, HGMMA, seconds; of plain kernels bytes and seconds")
    print(f"{'kernel':24}" + "".join(f"{rows['triton']:>34}" for rows in every))
    for name in found:
        if name != "triton":
            print(f"{name:24}" + "".join(f"{rows.get(name, 'not run')!s:>34.33}" for rows in every))
    return int(any(isinstance(v, str) for rows in every for k, v in rows.items() if k != "triton"))


if __name__ == "__main__":
    sys.exit(main())
