"""The results of a comparison: what they hold, how they are kept, and when an earlier run's may be gone on from."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import manyheads
from manyheads.evaluate.answer import answer
from manyheads.evaluate.files import write_whole
from manyheads.evaluate.models import Loaded


def start(
    folder: Path, loaded: Loaded, text: dict[str, Any], context: int, rest: int, seed: int, repeats: int, fresh: bool
) -> dict[str, Any]:
    """Empty results, or those of an earlier run of the same comparison."""
    model, config = loaded.model, loaded.model.config.get_text_config()
    results: dict[str, Any] = {
        "manyheads": manyheads.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(["manyheads", *sys.argv[1:]]) if sys.argv[0].endswith("manyheads") else "",
        "complete": False,
        "answer": "",
        "machine": machine(model.device),
        "model": {
            "name": loaded.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "text": text,
        "context": context,
        "rest": rest,
        "seed": seed,
        "repeats": repeats,
        "rows": [],
        "untrained": [],
    }
    results["fingerprint"] = _fingerprint(results)
    earlier = None if fresh else _earlier(folder)
    if earlier and earlier.get("fingerprint") == results["fingerprint"]:
        results["rows"], results["untrained"] = earlier["rows"], earlier["untrained"]
    return results


def machine(device: torch.device) -> dict[str, Any]:
    import transformers

    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _fingerprint(results: dict[str, Any]) -> str:
    """What must be equal for a row measured earlier to stand beside one measured now."""
    same = {name: results[name] for name in ("manyheads", "machine", "model", "context", "rest", "seed", "repeats")}
    same["text"] = results["text"]["sha256"]
    same["code"] = _own_code()
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def _own_code() -> str:
    """Rows measured by other code than today's are measured again."""
    package = Path(manyheads.__file__).parent
    total = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if not {"report", "cli"} & set(file.relative_to(package).parts):  # they only show what was measured
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _earlier(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "compare.json").read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(
            f"{folder / 'compare.json'} is not a comparison's; name another --out, or start over with --fresh"
        ) from None


def save(results: dict[str, Any], folder: Path) -> None:
    results["answer"] = answer(results)
    write_whole(folder / "compare.json", json.dumps(results, indent=1))
