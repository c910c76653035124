"""Run the experiments, each variant with each seed, and append a row for each to a file of JSON lines.

    python -m experiments.run --device cuda --workers 14               all of them, from the top of the repository
    python -m experiments.run subtraction rank --seeds 1               some of them
    python -m experiments.run --quick                                  a few steps each, to see that they run

Jobs that have a row without an error are skipped, so that a run which was cut off goes on. `python docs/generate.py`
writes docs/experiments.md from all files in experiments/results.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
import time
from functools import cache
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

from experiments.core import Experiment
from experiments.jobs import Job, rows

RESULTS = Path(__file__).parent / "results"
QUICK = 3  # steps


@cache
def experiments() -> dict[str, Experiment]:
    """All experiments, by name: what the files beside and below this one call EXPERIMENT, in the files' order."""
    files = pkgutil.walk_packages([str(Path(__file__).parent)], "experiments.")
    modules = [import_module(file.name) for file in files]
    return {m.EXPERIMENT.name: m.EXPERIMENT for m in modules if hasattr(m, "EXPERIMENT")}


def jobs(chosen: list[Experiment], seeds: int) -> list[Job]:
    """Seed by seed, and in each seed the experiments side by side: a run that is cut off has something of everything,
    and work for CPUs keeps company with work for the GPU."""
    found = []
    for seed in range(seeds):
        columns = [[Job(e.name, variant, seed) for variant in e.variants] for e in chosen]
        found += [job for row in zip_longest(*columns) for job in row if job is not None]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def done(path: Path, steps: int | None) -> set[Job]:
    """The jobs that have a result of so many steps in a file; None: of as many as the experiment has."""
    return {
        Job(row["experiment"], row["variant"], row["seed"])
        for row in read(path)
        if "error" not in row and row["steps"] == (steps or experiments()[row["experiment"]].steps)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(experiments())}; all if none is given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; what is small stays on the CPU")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "experiments.jsonl")
    parser.add_argument("--limit", type=float, help="seconds after which no job is started")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} steps each")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in experiments()]:
        parser.error(f"no experiment is called {unknown[0]!r}: there are {', '.join(experiments())}")
    chosen = [e for e in experiments().values() if e.name in given.names or not given.names]
    steps = QUICK if given.quick else None
    had = done(given.results, steps)
    wanted = jobs(chosen, given.seeds)
    left = [job for job in wanted if job not in had]
    given.results.parent.mkdir(parents=True, exist_ok=True)
    failed, count, start = 0, 0, time.monotonic()
    with given.results.open("a", encoding="utf-8") as file:
        for count, row in enumerate(rows(left, given.workers, given.device, steps, given.limit), 1):
            print(json.dumps(row), file=file, flush=True)
            failed += "error" in row
            passed = time.monotonic() - start
            told = row.get("error") or f"{row[experiments()[row['experiment']].metric]:.4g} in {row['wall_s']:.0f} s"
            about = f"{row['experiment']}, {row['variant']}, seed {row['seed']}: {told}"
            print(
                f"[{count}/{len(left)}, {passed:.0f} s, {passed / count * (len(left) - count):.0f} s left] {about}",
                flush=True,
            )
    print(f"{count} jobs run, {failed} failed, {len(wanted) - len(left)} had results, {len(left) - count} not started.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
