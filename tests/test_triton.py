"""The Triton engine: in the interpreter against eager in float64, compiled for Hopper without a GPU, and on a GPU.

Triton decides at import whether it interprets, so those cases run in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.core import Form, Operand, Scores
from manyheads.core.checks import build_inputs
from manyheads.engines import eager, triton
from manyheads.layers.linear.mega import form_of
from tests.interpreter import interpret

NAMES = ("o", "lse", "dq", "dk", "dv")


# ---- cases ----


def alibi(b, h, i, j):
    return j <= i


def distance(s, b, h, i, j):
    return s - 0.05 * (h + 1) * (i - j)


def documents(length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Scores:
    """Packed documents, and a bias that a tensor holds."""
    at = (torch.arange(length, device=device) * 7 // length).int()
    bias = torch.linspace(-1, 1, 64, device=device, dtype=dtype).requires_grad_()
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


def slopes(heads: int, device: torch.device, dtype: torch.dtype, normaliser: str = "softmax") -> Scores:
    """Learned slopes; their derivative is i - j, and places depend on the head alone."""
    slope = torch.linspace(0.02, 0.1, heads, device=device, dtype=dtype).requires_grad_()
    return Scores(mask=alibi, score=lambda s, b, h, i, j: s - slope[h] * (i - j), normaliser=normaliser)


def relative(heads: int, device: torch.device, dtype: torch.dtype) -> Scores:
    """A learned bias for each head and distance, and a temperature: derivatives that depend on the score."""
    bias = torch.linspace(-1, 1, heads * 21, device=device, dtype=dtype).view(heads, 21).requires_grad_()
    temperature = torch.tensor(1.5, device=device, dtype=dtype, requires_grad=True)
    return Scores(score=lambda s, b, h, i, j: s / temperature + bias[h, (i - j).clamp(-10, 10) + 10])


def roots(last: int, device: torch.device, dtype: torch.dtype) -> Scores:
    """A learned number for each distance, whose root has an infinite derivative at the first. last: the least distance
    that anybody sees."""
    g = torch.arange(50, device=device, dtype=dtype).requires_grad_()
    return Scores(mask=lambda b, h, i, j: i - j >= last, score=lambda s, b, h, i, j: s - 0.1 * torch.sqrt(g[i - j]))


def sigmoid(heads: int, device: torch.device, dtype: torch.dtype) -> Scores:
    """Weights that are not normalised, with a learned bias for each head."""
    bias = torch.linspace(-2, -1, heads, device=device, dtype=dtype).requires_grad_()
    return Scores(
        mask=lambda b, h, i, j: (j <= i) & (i - j < 50),
        score=lambda s, b, h, i, j: torch.sigmoid(s + bias[h]),
        normaliser="none",
    )


def sinking(window: int) -> Scores:
    return Scores(
        mask=lambda b, h, i, j: (j <= i) & (i - j < window) & (i > 5),
        operands={"sink": Operand("heads")},
        sink="sink",
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

    def form(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Form:
        """dtype: of the captured tensors, which hold what float32 has exactly."""
        own = {
            "alibi": lambda: Scores(mask=alibi, score=distance),
            "documents": lambda: documents(self.kv_len, device, dtype),
            "forgetful": forgetful,
            "nothing": lambda: Scores(mask=lambda b, h, i, j: i < 0),
            "slopes": lambda: slopes(self.heads[0], device, dtype, **self.settings),
            "relative": lambda: relative(self.heads[0], device, dtype),
            "roots": lambda: roots(device=device, dtype=dtype, **self.settings),
            "sigmoid": lambda: sigmoid(self.heads[0], device, dtype),
            "linear": lambda: Scores(mask=alibi, normaliser="none"),
            "laplace": lambda: form_of("laplace", **self.settings),
            "sinking": lambda: sinking(**self.settings),
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
    "learned": [
        Case("slopes", heads=(4, 2), q_len=50, kv_len=90),
        Case("slopes", {"normaliser": "signed"}, q_len=40, kv_len=40, scale=-0.3),
        Case("relative", batch=2, q_len=40, kv_len=60),
    ],
    "normalisers": [
        Case("sigmoid", heads=(4, 2), q_len=70, kv_len=100, v_head_dim=24),
        Case("sigmoid", batch=2, absent=(3, 30)),
        Case("linear", scale=-0.1),
        Case("laplace", {"chunk": 20, "causal": True}, v_head_dim=24),
        Case("laplace", {"chunk": None, "causal": False}, batch=2, absent=(3, 30)),
        Case("sinking", {"window": 30}, 100, 100, heads=(4, 2)),
        Case("sinking", {"window": 30}, batch=2, absent=(3, 30)),
        Case("sinking", {"window": 0}, 20, 20),
    ],
}


def computed(case: Case, engine, dtype: torch.dtype, device: torch.device, like: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients in a dtype, of numbers that `like` holds exactly. Views, not whole tensors, go in.

    Captured tensors are float32 for the kernels, whatever the dtype, and have the same numbers in float64.
    """
    g = torch.Generator().manual_seed(0)
    heads, kv_heads = case.heads

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(like).to(device, dtype)

    # Heads behind tokens, as layers have them.
    q = leaf(case.batch, case.q_len, heads, case.head_dim).transpose(1, 2).requires_grad_()
    k = leaf(case.batch, case.kv_len, kv_heads, case.head_dim).transpose(1, 2).requires_grad_()
    v = leaf(case.batch, case.kv_len, kv_heads, case.v_head_dim).transpose(1, 2).requires_grad_()
    form = case.form(device, torch.promote_types(dtype, torch.float32))
    sizes = {"batch": case.batch, "heads": heads, "len": case.kv_len}
    operands = {name: leaf(*o.shape(sizes)).requires_grad_() for name, o in form.operands.items()}
    assert isinstance(form, Scores)
    learned = {f"tensor {n}": t for n, t in enumerate(form.program.tensors) if t.requires_grad} | operands
    q_at = kv_at = None
    if case.absent:
        kv_at = torch.stack([(torch.arange(case.kv_len) - n).clamp(min=-1) for n in case.absent], 1).to(device).mT
        q_at = kv_at[:, case.kv_len - case.q_len :]
    x = build_inputs(form, q, k, v, case.scale, q_at, kv_at, None, operands)
    # On a GPU the plain kernels are not offered to anyone, which is no reason not to test them there.
    assert device.type == "cuda" or engine.why_not(form, x, True) is None
    o, lse = engine.run(form, x)
    weigh_o, weigh_lse = leaf(case.batch, case.q_len, heads, case.v_head_dim).transpose(1, 2), leaf(*lse.shape)
    loss = (o * weigh_o).sum() + (torch.where(lse.isneginf(), 0.0, lse) * weigh_lse).sum()
    grads = torch.autograd.grad(loss, (q, k, v, *learned.values()))
    assert all(g.dtype == t.dtype for g, t in zip(grads[3:], learned.values(), strict=True))
    return dict(zip((*NAMES, *learned), (o.detach(), lse.detach(), *grads), strict=True))


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative to the size of the whole; infinite where one side is -inf or NaN and the other is not."""
    ours = computed(case, triton, dtype, device, dtype)
    truth = computed(case, eager, torch.float64, device, dtype)
    found = {}
    for name in truth:
        a, b = ours[name].double(), truth[name].double()
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


@pytest.mark.parametrize("group", SMALL)
def test_equals_eager(group):
    found = json.loads(interpret("test_triton", f"interpreted({group!r})"))
    for case, errors in zip(SMALL[group], found, strict=True):
        # A float32 sum over a hundred products, and exp2 of a rounded multiple of the score.
        assert max(errors.values()) < 5e-6, (case, errors)


def others() -> None:
    """Numbers of a mask may change without another module; lists are kept for what repeats; bfloat16 is near."""
    from manyheads.engines.triton import call

    cpu = torch.device("cpu")
    case = Case("sliding_window", {"window": 9, "sinks": 2}, 40, 40)
    first = computed(case, triton, torch.float32, cpu, torch.float32)
    entries, lists = len(call._ENTRIES), len(call.KEPT.found)
    again = computed(case, triton, torch.float32, cpu, torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in NAMES), "the same every run"
    assert len(call.KEPT.found) == lists, "the same positions have the same lists"
    computed(Case("sliding_window", {"window": 17, "sinks": 1}, 40, 40), triton, torch.float32, cpu, torch.float32)
    assert len(call._ENTRIES) == entries and len(call.KEPT.found) > lists
    # The interpreter cuts bits off where a GPU rounds.
    assert max(errors(case, torch.bfloat16, cpu).values()) < 2e-2
    assert max(errors(case, torch.float16, cpu).values()) < 2e-3
    o = computed(case, triton, torch.bfloat16, cpu, torch.bfloat16)["o"]
    assert o.dtype == torch.bfloat16 and o.transpose(1, 2).is_contiguous(), "laid out as the queries are"
    print("done")


def infinite() -> None:
    """A derivative that is infinite counts where somebody sees it. Autograd multiplies it by 0 elsewhere too."""
    cpu = torch.device("cpu")
    unseen = Case("roots", {"last": 1}, 31, 32, heads=(1, 1))
    ours = computed(unseen, triton, torch.float32, cpu, torch.float32)["tensor 0"]
    truth = computed(unseen, eager, torch.float64, cpu, torch.float32)["tensor 0"]
    assert truth[0].isnan() and ours[0] == 0
    assert (ours - truth)[1:].norm() < 5e-6 * truth[1:].norm()
    seen = Case("roots", {"last": 0}, 31, 32, heads=(1, 1))
    assert computed(seen, triton, torch.float32, cpu, torch.float32)["tensor 0"].isnan().all()
    print("done")


def orders() -> None:
    """The order in which tiles are added up does not show in what the score reads."""
    from manyheads.engines.triton import call as calls
    from manyheads.engines.triton import launch

    torch.manual_seed(0)
    form = relative(2, torch.device("cpu"), torch.float32)
    q, k, v, do = (torch.randn(1, 2, 64, 16) for _ in range(4))
    lse, delta = torch.zeros(1, 2, 64), torch.randn(1, 2, 64)
    found = []
    for turned in (False, True):
        call = calls.Call(
            form.program, {}, "softmax", None, 0.3, range(64), range(64), 1, 2, 2, 64, 64, 16, 16, q.device, 4
        )
        lists = call.lists(block := call.block("queries"))
        assert (lists.tiles.shape[-1] > 1) and lists.counts.sum(-1).eq(lists.tiles.shape[-1]).all()
        if turned:
            call.own[(block.queries, block.keys), False] = lists._replace(tiles=lists.tiles.flip(-1).contiguous())
        found.append(launch.run_gradients(q, k, v, do, lse, delta, call, (0, 1)))
    assert all(torch.equal(found[0][source], found[1][source]) for source in (0, 1))
    assert found[0].keys() == {0, 1} and all(x.isfinite().all() and x.any() for x in found[0].values())
    print("done")


def bounds() -> None:
    """A sum as large as its bound is kept whole: all scores have the same gradient, |do| |v|."""
    bias = torch.zeros((), requires_grad=True)
    form = Scores(score=lambda s, b, h, i, j: s + bias, normaliser="none")
    x = [torch.ones(1, 1, 32, 16) for _ in range(3)]
    o, _ = triton.run(form, build_inputs(form, *x, None, None, None, None, {}))
    (found,) = torch.autograd.grad(o.sum(), bias)
    assert found == 32 * 32 * 16
    print("done")


def alone() -> None:
    """Gradients of sinks, or of what a score reads, with no others asked for."""
    cpu = torch.device("cpu")
    for name in ("sink", "tensor 0"):
        found = []
        for engine, dtype in ((triton, torch.float32), (eager, torch.float64)):
            torch.manual_seed(0)
            form = sinking(9) if name == "sink" else slopes(2, cpu, dtype)
            x = [torch.randn(1, 2, 40, 16).to(dtype) for _ in range(3)]
            operands = {"sink": torch.ones(2, dtype=dtype, requires_grad=True)} if name == "sink" else {}
            o, _ = engine.run(form, build_inputs(form, *x, None, None, None, None, operands))
            found += torch.autograd.grad(o.square().sum(), operands.get("sink", *form.program.tensors))
        assert (found[0] - found[1]).norm() < 5e-6 * found[1].norm()
    print("done")


def padding() -> None:
    """What absent tokens hold does not show in what the score reads, large as it may be."""
    found = []
    for huge in (0.0, 1e15):
        torch.manual_seed(0)
        form = slopes(2, torch.device("cpu"), torch.float32)
        q, k, v, do = (torch.randn(2, 2, 40, 16) for _ in range(4))
        for t in (v, do):
            t[0, :, :7] = huge
        at = torch.stack([(torch.arange(40) - n).clamp(min=-1) for n in (7, 0)])
        o, _ = triton.run(form, build_inputs(form, q, k, v, None, at, at, None, {}))
        found += torch.autograd.grad((o * do).sum(), form.program.tensors)
    assert torch.equal(*found) and found[0].any()
    print("done")


def no_sink() -> None:
    """A sink of -inf is none: as where another part of the keys has it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    results = []
    for form, sink in ((sinking(9), torch.tensor([-torch.inf, 0.5])), (Scores(mask=sinking(9).mask), None)):
        sink = None if sink is None else sink.requires_grad_()
        operands = {} if sink is None else {"sink": sink}
        o, lse = triton.run(form, build_inputs(form, q, k, v, None, None, None, None, operands))
        results.append((o[:, 0], lse[:, 0]))
        if sink is not None:
            (found,) = torch.autograd.grad(o.sum() + lse[:, :, 9:].sum(), sink)
            assert found[0] == 0 and found[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
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
    assert interpret("test_triton", "compiled()", strict=False) == "done"


def test_repeats_and_keeps():
    assert interpret("test_triton", "others()") == "done"


def test_gradients_do_not_depend_on_the_order_of_tiles():
    assert interpret("test_triton", "orders()") == "done"


def test_gradients_of_what_is_read_alone():
    assert interpret("test_triton", "alone()") == "done"


def test_gradients_ignore_padding():
    assert interpret("test_triton", "padding()") == "done"


def test_a_gradient_as_large_as_its_bound():
    assert interpret("test_triton", "bounds()") == "done"


def test_infinite_derivatives_count_where_they_are_seen():
    assert interpret("test_triton", "infinite()", strict=False) == "done"  # numpy warns of them


def test_a_sink_of_minus_infinity_is_none():
    assert interpret("test_triton", "no_sink()") == "done"


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
    assert "not a Function" in objection(manyheads.get("agent_attention")())
    assert objection(slopes(2, torch.device("cpu"), torch.float32)) is None
    assert objection(forgetful(), g=torch.zeros(1, 2, 8, requires_grad=True)) is None
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


SHARED = 227 * 1024  # bytes that a block has on Hopper
KERNELS = {
    "forward": ("mask", "score"),
    "keys": ("mask", "score", "dscore"),
    "queries": ("mask", "score", "dscore"),
    "gradients": ("mask", "score", "gradients", "places"),
}


def compiled_for_hopper(kernel: str, form: Scores, head_dim: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from manyheads.engines.triton import backward, call, forward, gradients

    line, sizes = range(400), (1, 2, 2, 400, 400, head_dim, head_dim)
    of = call.Call(form.program, {}, "softmax", None, 0.1, line, line, *sizes, torch.device("cpu"), 2)
    block = of.block("queries" if kernel == "gradients" else kernel)
    function = getattr({"forward": forward, "gradients": gradients}.get(kernel, backward), kernel)
    functions = KERNELS[kernel]
    source = form.program.source("triton", functions[:3] if form.program.has_score else ("mask",))
    entry = source.entry(f"{function.fn.__module__}:{kernel}", call.parameters(function), functions, call.FIXED)
    constants = dict(
        NORMALISER="softmax", FOLDED=not form.program.has_score, Q_GIVEN=False, KV_GIVEN=False, D=head_dim, DV=head_dim,
        PD=head_dim, PV=head_dim, BM=block.queries, BN=block.keys, SIMULATED=False, group=1, SINK=None, LARGEST=None,
        UNIT=1,
    )  # fmt: skip
    pointers = {
        "LSE": "*fp32", "DELTA": "*fp32", "SCALES": "*fp32", "COUNTS": "*i32", "LISTS": "*i32", "Q_AT": "*i64",
        "KV_AT": "*i64", "TABLES": ("*i64",) * len(source.program.gradients),
    }  # fmt: skip
    numbers = {a.name: "fp32" if a.kind in ("fp32", "inverse") else "i32" for a in source.signature} | {"scale": "fp32"}
    numbers |= {a.name: "*fp32" for a in source.signature if a.kind == "pointer"}
    types, aligned = {}, {}
    for place, name in enumerate(entry.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.isupper() or name == "DV_":
            types[name] = pointers.get(name, "*bf16")
        else:
            types[name] = numbers.get(name, "i32")
        if types[name][0] == "*" or (name[-2:] in ("_b", "_h", "_n") and name not in call.FIXED):
            aligned[(place,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in entry.arg_names}
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return compile(ASTSource(entry, types, used, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    from manyheads.engines.triton import call

    monkeypatch.setenv("PYTEST_CUBIN", str(tmp_path / "kernel.cubin"))
    monkeypatch.setattr(call, "chip_of", lambda device: "9")


LEARNED = slopes(2, torch.device("cpu"), torch.float32), relative(2, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_hopper_without_spills(kernel, head_dim, hopper):
    for form in LEARNED if kernel == "gradients" else (manyheads.get("causal")(), manyheads.get("gemma2")()):
        assert isinstance(form, Scores)
        found = compiled_for_hopper(kernel, form, head_dim)
        assert "wgmma" in found.asm["ptx"]
        used = resources(found)
        assert used["STL"] == used["LDL"] == 0, (form, used)
        assert used["HGMMA"] and not used["HMMA"], (form, used)
        assert used["shared"] <= SHARED, (form, used)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_table_read_for_each_pair_fits_shared_memory(kernel, head_dim, hopper):
    assert compiled_for_hopper(kernel, LEARNED[1], head_dim).metadata.shared <= SHARED


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
    Case("alibi", {}, 400, 400, 72, 24, (4, 4), 1),
    Case("documents", {}, 2000, 2000, 64, 64),
    Case("slopes", {}, 1000, 1000, 128, 128, (4, 2), 2),
    Case("slopes", {"normaliser": "signed"}, 600, 600, 64, 64),
    Case("relative", {}, 700, 900, 64, 64, (4, 4), 2),
    Case("sigmoid", {}, 1000, 1000, 64, 64, (4, 2), 2),
    Case("linear", {}, 500, 500, 128, 128),
    Case("sinking", {"window": 100}, 1000, 1000, 64, 64, (4, 2), 2),
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
    # What the score reads sums up rounded gradients of all pairs, which nearly cancel.
    wrong = {name: e for name, e in found.items() if e >= BOUNDS[dtype] * (1 if name in NAMES[:5] else 2)}
    assert not wrong, found


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
    from manyheads.engines.triton import call

    device = torch.device("cuda")

    def run(window: int, length: int) -> int:
        case = Case("sliding_window", {"window": window, "sinks": 4}, length, length, 64, 64)
        computed(case, triton, torch.bfloat16, device, torch.bfloat16)
        return sum(len(cache[0]) for entry in call._ENTRIES.values() for cache in entry.device_caches.values())

    first = run(128, 1024)
    assert run(17, 1024) == run(1, 515) == run(64, 1) == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
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
