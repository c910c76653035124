"""What is imported when, and who may import whom."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import manyheads

PACKAGE = Path(manyheads.__file__).parent

# Who may import what besides itself. `mechanisms.*` is a mechanism's own file, `layers.*` a layer's, `engines.*` an
# engine.
MAY_IMPORT = {
    "core": set(),
    "mechanisms": {"core"},
    "engines": {"core"},
    "cache": {"core"},
    "dispatch": {"core", "engines", "mechanisms"},
    "nn": {"core", "dispatch", "mechanisms"},
    "layers": {"core", "dispatch", "mechanisms", "nn"},
    "distributed": {"core", "dispatch", "mechanisms", "nn"},
    "integrations": {"core", "mechanisms", "cache", "dispatch", "nn"},
    "evaluate": {"", "core", "mechanisms", "cache", "dispatch", "nn", "integrations"},
    "inspect": {"", "core", "mechanisms", "cache", "dispatch", "nn", "integrations", "evaluate"},
    "studies": {"", "core", "mechanisms", "cache", "dispatch", "nn", "integrations", "evaluate", "inspect"},
    "cli": {"", "core", "mechanisms", "cache", "dispatch", "nn", "integrations", "evaluate", "inspect", "studies"}
    | {"layers"},
}

# Modules that only these parts of the package may name.
FOREIGN = {
    "transformers": {"integrations", "evaluate"},
    "typer": {"cli"},
    "plotly": {"evaluate", "inspect", "studies"},
    "matplotlib": {"evaluate", "inspect", "studies"},
    "triton": {"engines"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str:
    """manyheads.core.forms -> core; manyheads -> ""."""
    return [*module.split("."), ""][1]


def module_of(file: Path) -> str:
    parts = ["manyheads", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> list[str]:
    """The full names of all modules that a file imports, at its top or later."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module)
            # `from manyheads import core` names a module, too
            if node.module == "manyheads":
                found += [f"manyheads.{a.name}" for a in node.names if (PACKAGE / a.name).exists()]
    return found


def objections(own: str, source: str) -> list[str]:
    """What the module `own` imports and may not."""
    where, wrong = part(own), []
    for name in imports(source):
        top, other = name.split(".")[0], part(name)
        if top in FOREIGN and where not in FOREIGN[top]:
            wrong.append(name)
        elif top == "manyheads" and own != "manyheads":
            siblings = where in ("mechanisms", "layers", "engines") and other == where and unlike(own, name)
            if siblings or (other != where and other not in MAY_IMPORT[where]):
                wrong.append(name)
    return wrong


def unlike(own: str, other: str) -> bool:
    """Two engines, mechanisms or layers. An engine that is a folder may import its own parts."""
    if part(own) in ("mechanisms", "layers"):
        return own != f"manyheads.{part(own)}"
    return own.split(".")[:3] != other.split(".")[:3]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    assert not objections(module_of(file), file.read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core.forms", "import manyheads.dispatch"),
        ("core.forms", "from manyheads import nn"),
        ("core.forms", "import manyheads"),
        ("mechanisms.sparse.moba", "from manyheads.mechanisms.dense import causal"),
        ("mechanisms.sparse.moba", "from manyheads.mechanisms import get"),
        ("mechanisms.sparse.moba", "from manyheads.engines import eager"),
        ("engines.sdpa", "from manyheads.engines.eager import run"),
        ("engines.sdpa", "from manyheads.mechanisms import get"),
        ("layers.heads.moh", "from manyheads.layers.heads import mhe"),
        ("layers.heads.moh", "from manyheads.integrations import capture"),
        ("nn", "from manyheads.layers import get"),
        ("dispatch", "def later():\n    import manyheads.nn"),
        ("nn", "import transformers"),
        ("cache.policy", "from manyheads.dispatch import attention"),
    ],
)
def test_a_planted_import_is_found(module, line):
    assert objections(f"manyheads.{module}", line)


FRESH = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import manyheads
manyheads.names()
seconds = time.process_time() - start  # of this process alone: a busy machine changes little
print(json.dumps({"seconds": seconds, "loaded": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def fresh():
    """Three new processes: what `import manyheads` and a walk over all mechanisms load beyond torch, and how long."""
    runs = [subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True) for _ in range(3)]
    return [json.loads(run.stdout) for run in runs]


def test_import_loads_nothing_that_is_slow_or_optional(fresh):
    loaded = {name.split(".")[0] for name in fresh[0]["loaded"]}
    assert not loaded & {"triton", "transformers", "matplotlib", "plotly", "typer", "jinja2", "rich"}
    assert "torch._dynamo" not in fresh[0]["loaded"]


def test_import_is_quick(fresh):
    assert statistics.median(run["seconds"] for run in fresh) < 0.3


def test_what_is_public_is_there():
    for name in manyheads.__all__:
        assert getattr(manyheads, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = manyheads.attend
