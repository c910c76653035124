"""Triton's interpreter, which reads its environment when it is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def interpret(file: str, call: str, strict: bool = True) -> str:
    """The last line that a call in tests/<file>.py prints under the interpreter. strict: warnings are errors."""
    code = f"from tests import {file}; {file}.{call}"
    if strict:
        code = f"import warnings; warnings.simplefilter('error'); {code}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""
