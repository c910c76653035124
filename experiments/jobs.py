"""Jobs in worker processes: torch is imported once a worker, and a job that fails is a row that says so."""

from __future__ import annotations

import multiprocessing
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Job:
    experiment: str
    variant: str
    seed: int


def run(job: Job, device: str, steps: int | None) -> dict[str, Any]:
    """The job's row: its numbers, or the error."""
    import torch

    from experiments.run import experiments

    found = experiments()[job.experiment]
    on, start = found.on or device, time.perf_counter()
    row: dict[str, Any] = {**asdict(job), "steps": steps or found.steps, "device": chip(on), "torch": torch.__version__}
    try:
        row |= found.run(job.variant, job.seed, on, row["steps"])
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return row | {"wall_s": round(time.perf_counter() - start, 2)}


def chip(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({platform.machine()})"


def serve(pipe: Connection, device: str, steps: int | None) -> None:
    """A worker: jobs in, rows out, until None comes. After an error on a GPU it ends, as CUDA may not recover."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    while (job := pipe.recv()) is not None:
        row = run(job, device, steps)
        pipe.send(row)
        if "error" in row and device != "cpu":
            return


def rows(
    jobs: list[Job], workers: int, device: str, steps: int | None, limit: float | None
) -> Iterator[dict[str, Any]]:
    """The rows of the jobs as they finish. No job is started after `limit` seconds; a worker that dies is replaced."""
    context = multiprocessing.get_context("spawn")
    left, busy, end = list(reversed(jobs)), {}, time.monotonic() + (limit or float("inf"))

    def start() -> tuple[Connection, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, device, steps), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(pipe: Connection, process: Any) -> None:
        if left and time.monotonic() < end:
            busy[pipe] = (process, left.pop())
            pipe.send(busy[pipe][1])
        else:
            pipe.send(None)
            process.join()

    for _ in range(min(workers, len(jobs))):
        give(*start())
    while busy:
        for pipe in wait(list(busy)):
            process, job = busy.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                process.join()
                row = {**asdict(job), "error": f"the worker died with exit code {process.exitcode}"}
            yield row
            if "error" in row and (device != "cpu" or not process.is_alive()):
                process.join()
                if left:
                    give(*start())
            else:
                give(pipe, process)
