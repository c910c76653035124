"""The Triton engine: in the interpreter against eager in float64, compiled for Hopper without a GPU, and on a GPU.

Triton decides at import whether it interprets, so those cases run in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.core import Form, Operand, Scores
from manyheads.core.checks import build_inputs
from manyheads.engines import eager, triton

ROOT = Path(__file__).parent.parent
NAMES = ("o", "lse", "dq", "dk", "dv")


# ---- cases ----


def alibi(b, h, i, j):
    return j <= i


def distance(s, b, h, i, j):
    return s - 0.05 * (h + 1) * (i - j)


def documents(length: int, device: torch.device) -> Scores:
    """Packed documents, and a bias that a tensor holds."""
    at = (torch.arange(length, device=device) * 7 // length).int()
    bias = torch.linspace(-1, 1, 64, device=device)
    return Scores(
        mask=lambda b, h, i, j: (at[i] == at[j]) & (j <= i),
        score=lambda s, b, h, i, j: s + bias[(i - j).clamp(0, 63)],
    )


def forgetful() -> Scores:
    """With an operand that has a value for each token."""
    return Scores(
        mask=alibi,
        score=lambda s, b, h, i, j, g: s + g[b, h, i] - g[b, h, j],
        operands={"g": Operand("batch heads len")},
    )


@dataclass(frozen=True)
class Case:
    """heads: of queries and of keys. absent: how many tokens in front of each row are padding."""

    mechanism: str
    settings: dict = field(default_factory=dict)
    q_len: int = 70
    kv_len: int = 70
    head_dim: int = 16
    v_head_dim: int = 16
    heads: tuple[int, int] = (2, 2)
    batch: int = 1
    absent: tuple[int, ...] = ()
    scale: float | None = None

    def form(self, device: torch.device) -> Form:
        own = {
            "alibi": lambda: Scores(mask=alibi, score=distance),
            "documents": lambda: documents(self.kv_len, device),
            "forgetful": forgetful,
            "nothing": lambda: Scores(mask=lambda b, h, i, j: i < 0),
        }
        return own[self.mechanism]() if self.mechanism in own else manyheads.get(self.mechanism)(**self.settings)


SMALL = {
    "causal": [
        Case("causal", q_len=100, kv_len=100, head_dim=24),
        Case("causal", q_len=40, kv_len=75),
        Case("causal", q_len=75, kv_len=40),  # the first queries see nothing
        Case("causal", batch=2, absent=(0, 40), heads=(2, 1)),
        Case("causal", q_len=1, kv_len=33, batch=2),
        Case("nothing", q_len=33, kv_len=33),
        Case("causal", q_len=17, kv_len=17, head_dim=6, v_head_dim=5),
    ],
    "scores": [
        Case("gemma2", {"window": 20, "cap": 0.7}, 130, 130, heads=(2, 1)),
        Case("alibi", q_len=50, kv_len=90, head_dim=72, v_head_dim=24),
        Case("documents", q_len=90, kv_len=90),
        Case("forgetful", batch=2, heads=(2, 1), absent=(3, 30)),
        Case("cog_attention", head_dim=40, heads=(4, 2)),
        Case("cog_attention", q_len=40, kv_len=40, scale=-0.3),
    ],
    "masks": [
        Case("full", q_len=33, kv_len=90, heads=(4, 2), v_head_dim=32),
        Case("full", q_len=64, kv_len=64, scale=-0.2),
        Case("full", q_len=20, kv_len=40, scale=0.0),
        Case("sliding_window", {"window": 20, "sinks": 3}, 70, 100),
        Case("power_attention", {"block_size": 8, "window_blocks": 2}, 130, 130),
    ],
}


def computed(case: Case, engine, dtype: torch.dtype, device: torch.device, like: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients in a dtype, of numbers that `like` holds exactly. Views, not whole tensors, go in."""
    g = torch.Generator().manual_seed(0)
    heads, kv_heads = case.heads

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(like).to(device, dtype)

    # Heads behind tokens, as layers have them.
    q = leaf(case.batch, case.q_len, heads, case.head_dim).transpose(1, 2).requires_grad_()
    k = leaf(case.batch, case.kv_len, kv_heads, case.head_dim).transpose(1, 2).requires_grad_()
    v = leaf(case.batch, case.kv_len, kv_heads, case.v_head_dim).transpose(1, 2).requires_grad_()
    form = case.form(device)
    sizes = {"batch": case.batch, "heads": heads, "len": case.kv_len}
    operands = {name: leaf(*operand.shape(sizes)) for name, operand in form.operands.items()}
    q_at = kv_at = None
    if case.absent:
        kv_at = torch.stack([(torch.arange(case.kv_len) - n).clamp(min=-1) for n in case.absent]).to(device)
        q_at = kv_at[:, case.kv_len - case.q_len :]
    x = build_inputs(form, q, k, v, case.scale, q_at, kv_at, None, operands)
    # On a GPU the plain kernels are not offered to anyone, which is no reason not to test them there.
    assert device.type == "cuda" or engine.why_not(form, x, True) is None
    o, lse = engine.run(form, x)
    weigh_o, weigh_lse = leaf(case.batch, case.q_len, heads, case.v_head_dim).transpose(1, 2), leaf(*lse.shape)
    loss = (o * weigh_o).sum() + (torch.where(lse.isneginf(), 0.0, lse) * weigh_lse).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return dict(zip(NAMES, (o.detach(), lse.detach(), *grads), strict=True))


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative to the size of the whole; infinite where one side is -inf or NaN and the other is not."""
    ours = computed(case, triton, dtype, device, dtype)
    truth = computed(case, eager, torch.float64, device, dtype)
    found = {}
    for name in NAMES:
        a, b = ours[name].double(), truth[name]
        inf = b.isneginf()
        if not torch.equal(a.isneginf(), inf):
            found[name] = float("inf")
            continue
        a, b = torch.where(inf, 0.0, a), torch.where(inf, 0.0, b)
        error = ((a - b).norm() / max(float(b.norm()), 1e-3)).item()
        found[name] = error if error == error else float("inf")
    return found


# ---- in the interpreter ----


def interpreted(group: str) -> None:
    """What a process of its own does: prints the errors of a group's cases."""
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    print(json.dumps([errors(case, torch.float32, cpu) for case in SMALL[group]]))


def interpret(call: str, strict: bool = True) -> str:
    """The last line that a call in this file prints, under the interpreter. strict: warnings are errors."""
    code = f"from tests import test_triton; test_triton.{call}"
    if strict:
        code = f"import warnings; warnings.simplefilter('error'); {code}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("group", SMALL)
def test_equals_eager(group):
    found = json.loads(interpret(f"interpreted({group!r})"))
    for case, errors in zip(SMALL[group], found, strict=True):
        # A float32 sum over a hundred products, and exp2 of a rounded multiple of the score.
        assert max(errors.values()) < 5e-6, (case, errors)


def others() -> None:
    """Numbers of a mask may change without another module; lists are kept for what repeats; bfloat16 is near."""
    from manyheads.engines.triton import launch

    cpu = torch.device("cpu")
    case = Case("sliding_window", {"window": 9, "sinks": 2}, 40, 40)
    first = computed(case, triton, torch.float32, cpu, torch.float32)
    entries, lists = len(launch._ENTRIES), len(launch.KEPT.found)
    again = computed(case, triton, torch.float32, cpu, torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in NAMES), "the same every run"
    assert len(launch.KEPT.found) == lists, "the same positions have the same lists"
    computed(Case("sliding_window", {"window": 17, "sinks": 1}, 40, 40), triton, torch.float32, cpu, torch.float32)
    assert len(launch._ENTRIES) == entries and len(launch.KEPT.found) > lists
    # The interpreter cuts bits off where a GPU rounds.
    assert max(errors(case, torch.bfloat16, cpu).values()) < 2e-2
    assert max(errors(case, torch.float16, cpu).values()) < 2e-3
    o = computed(case, triton, torch.bfloat16, cpu, torch.bfloat16)["o"]
    assert o.dtype == torch.bfloat16 and o.transpose(1, 2).is_contiguous(), "laid out as the queries are"
    print("done")


def compiled() -> None:
    """Under torch.compile: outputs and gradients as without."""
    torch.manual_seed(0)
    form = manyheads.get("gemma2")(window=9, cap=2.0)
    leaves = [torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton.run(form, build_inputs(form, 2 * q, k, v, None, None, None, None, {}))[0] + 1

    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        o = function(*leaves)
        found.append([o, *torch.autograd.grad(o.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    print("done")


def test_runs_under_torch_compile():
    assert interpret("compiled()", strict=False) == "done"


def test_repeats_and_keeps():
    assert interpret("others()") == "done"


# ---- without a GPU and without the interpreter ----


def objection(form: Form, dtype=torch.float32, head_dim=16, **operands: Tensor) -> str | None:
    q = torch.zeros(1, 2, 8, head_dim, dtype=dtype)
    return triton.why_not(form, build_inputs(form, q, q, q, None, None, None, None, operands))


def test_says_what_it_cannot_do(monkeypatch):
    causal = manyheads.get("causal")()
    assert "not on cpu" in objection(causal)
    monkeypatch.setattr(triton, "_interprets", lambda: True)
    assert objection(causal) is None
    assert "float64" in objection(causal, torch.float64)
    assert "head_dim up to 256" in objection(causal, head_dim=257)
    assert "not a Recurrence" in objection(manyheads.get("lightning_attention_2")())
    slopes = torch.ones(2, requires_grad=True)
    learned = Scores(score=lambda s, b, h, i, j: s * slopes[h])
    assert "captured" in objection(learned)
    with torch.no_grad():
        assert objection(learned) is None
    assert "operands: g" in objection(forgetful(), g=torch.zeros(1, 2, 8, requires_grad=True))
    q = torch.zeros(1, 2, 8, 16)
    assert "by name" in triton.hesitates(causal, build_inputs(causal, q, q, q, None, None, None, None, {}))


def resources(compiled) -> dict[str, int]:
    """Registers a thread, spilled loads and stores, and matrix instructions of Hopper's and the older kind."""
    import triton as language

    tools = Path(language.__file__).parent / "backends/nvidia/bin"
    path = Path(os.environ["PYTEST_CUBIN"])
    path.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        return subprocess.run(
            [tools / command[0], *command[1:], path], capture_output=True, text=True, check=True
        ).stdout

    usage, text = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    count = {name: len(re.findall(rf"\b{name}\b", text)) for name in ("STL", "LDL", "HGMMA", "HMMA")}
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    return {"registers": int(found[1]), "shared": compiled.metadata.shared, **count}


def compiled_for_hopper(kernel: str, form: Scores, head_dim: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from manyheads.engines.triton import backward, forward, launch

    block = launch.block(kernel, "9", 2, head_dim, form.program.has_score)
    function = {"forward": forward.forward, "keys": backward.keys, "queries": backward.queries}[kernel]
    functions = launch.FUNCTIONS[:2] if kernel == "forward" else launch.FUNCTIONS
    outputs = functions if form.program.has_score else ("mask",)
    source = form.program.source("triton", outputs)
    entry = source.entry(
        f"{function.fn.__module__}:{function.fn.__name__}", launch.parameters(function), functions, launch.FIXED
    )
    constants = dict(
        SIGNED=False, FOLDED=not form.program.has_score, Q_GIVEN=False, KV_GIVEN=False, D=head_dim, DV=head_dim,
        PD=head_dim, PV=head_dim, BM=block.queries, BN=block.keys, SIMULATED=False, group=1,
    )  # fmt: skip
    pointers = {"LSE": "*fp32", "DELTA": "*fp32", "COUNTS": "*i32", "LISTS": "*i32", "Q_AT": "*i64", "KV_AT": "*i64"}
    numbers = {a.name: "fp32" if a.kind in ("fp32", "inverse") else "i32" for a in source.signature} | {"scale": "fp32"}
    types, aligned = {}, {}
    for place, name in enumerate(entry.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.isupper() or name == "DV_":
            types[name] = pointers.get(name, "*bf16")
        else:
            types[name] = numbers.get(name, "i32")
        if types[name][0] == "*" or (name[-2:] in ("_b", "_h", "_n") and name not in launch.FIXED):
            aligned[(place,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in entry.arg_names}
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return compile(ASTSource(entry, types, used, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
def test_compiles_for_hopper_without_spills(kernel, head_dim, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_CUBIN", str(tmp_path / "kernel.cubin"))
    for name in ("causal", "gemma2"):
        form = manyheads.get(name)()
        assert isinstance(form, Scores)
        found = compiled_for_hopper(kernel, form, head_dim)
        assert "wgmma" in found.asm["ptx"]
        used = resources(found)
        assert used["STL"] == used["LDL"] == 0, (name, used)
        assert used["HGMMA"] and not used["HMMA"], (name, used)
        assert used["shared"] <= 227 * 1024, (name, used)


# ---- on a GPU ----

BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
REAL = [
    Case("causal", {}, 1000, 1000, 128, 128, (4, 4), 2),
    Case("causal", {}, 515, 1030, 64, 64, (8, 2), 2),
    Case("causal", {}, 777, 777, 64, 64, (4, 2), 3, (0, 100, 776)),
    Case("causal", {}, 700, 300, 64, 64),
    Case("full", {}, 1024, 999, 80, 80, (4, 4), 1),
    Case("full", {}, 300, 640, 192, 128, (4, 2), 1),
    Case("full", {}, 257, 257, 256, 256),
    Case("gemma2", {"window": 200, "cap": 2.0}, 1024, 1024, 128, 128, (4, 2), 1),
    Case("gemma2", {"window": 100, "cap": 2.0}, 600, 600, 256, 256, (2, 1), 1),
    Case("sliding_window", {"window": 130, "sinks": 4}, 1200, 1200, 64, 64, (4, 4), 1),
    Case("power_attention", {"block_size": 32, "window_blocks": 2}, 1500, 1500, 64, 64),
    Case("cog_attention", {}, 600, 600, 128, 128),
    Case("alibi", {}, 1000, 1000, 128, 128, (4, 4), 1),
    # Reads memory that is no tensor's in float16, which ends the process's use of the GPU: docs/log.md.
    pytest.param(
        Case("alibi", {}, 400, 400, 72, 24, (4, 4), 1), marks=pytest.mark.skip(reason="illegal access, see log")
    ),
    Case("documents", {}, 2000, 2000, 64, 64),
    Case("forgetful", {}, 500, 500, 64, 64, (4, 2), 2, (0, 77)),
    Case("nothing", {}, 100, 100, 64, 64),
    Case("causal", {}, 1, 517, 128, 128, (8, 2), 4),
    Case("causal", {}, 17, 17, 16, 16),
    Case("causal", {}, 129, 129, 32, 32),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_equals_eager_on_a_gpu(case, dtype):
    found = errors(case, dtype, torch.device("cuda"))
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_repeats_bit_by_bit_on_a_gpu():
    case = Case("gemma2", {"window": 300, "cap": 2.0}, 2048, 2048, 128, 128, (8, 2), 2)
    runs = [computed(case, triton, torch.bfloat16, torch.device("cuda"), torch.bfloat16) for _ in range(3)]
    for name in NAMES:
        assert torch.equal(runs[0][name], runs[1][name]) and torch.equal(runs[0][name], runs[2][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_new_numbers_and_lengths_compile_nothing():
    from manyheads.engines.triton import launch

    device = torch.device("cuda")

    def run(window: int, length: int) -> int:
        case = Case("sliding_window", {"window": window, "sinks": 4}, length, length, 64, 64)
        computed(case, triton, torch.bfloat16, device, torch.bfloat16)
        return sum(len(cache[0]) for entry in launch._ENTRIES.values() for cache in entry.device_caches.values())

    first = run(128, 1024)
    assert run(17, 1024) == run(1, 515) == run(64, 1) == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waits_for_nothing_on_a_gpu():
    """No call but the first of a structure and length waits for the device."""
    q = torch.randn(1, 4, 1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    form = manyheads.get("sliding_window")(window=100)
    x = build_inputs(form, q, q, q, None, None, None, None, {})
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            o, _ = triton.run(form, x)
            o.backward(torch.ones_like(o))
        finally:
            torch.cuda.set_sync_debug_mode("default")
