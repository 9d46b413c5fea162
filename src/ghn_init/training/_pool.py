"""Runs many small jobs, such as measuring a network, side by side, each in a process with one core.

Processes, because two Python threads wait for each other; one core each, because the networks are small.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ghn_init._errors import TrainingError
from ghn_init.training._output import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.synchronize import Event

_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""glibc gives large activations back to the system and asks for them again in every layer, which costs
some networks a third of their time; with these it keeps them, in huge pages. Other systems ignore them."""

J = TypeVar("J")
R = TypeVar("R")

_function: Callable[[Any], Any]
"""What a process of the pool was started with; no other process has it."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R]]:
    """Every job with what `function` makes of it, as they come; with one worker in this process.

    Function, jobs and results are pickled for the processes.

    Raises:
        TrainingError: A process died.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, function(job)
        return
    context = multiprocessing.get_context("spawn")
    all_started = context.Event()
    # In a file: tensors handed to processes would need shared memory, which containers have little of, and
    # bytes go through a pipe, which a process that dies before it has read them would leave full for ever.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "function.pickle"
        with writing(file):
            file.write_bytes(pickle.dumps(function))
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (file, all_started))
        yield from _results(pool, jobs, all_started)


def _results(pool: ProcessPoolExecutor, jobs: Sequence[J], all_started: Event) -> Iterator[tuple[J, Any]]:
    """Every job with its result, as they come; the pool is over then."""
    try:
        futures = _submit(pool, jobs, all_started)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process that measures networks died, perhaps for want of memory; take fewer workers"
        ) from error
    finally:
        # Waiting, because Python's end would close what the pool's own thread is still writing to.
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, jobs: Sequence[J], all_started: Event) -> dict[Future[Any], J]:
    """Gives the pool all jobs, for which it starts its processes, and then lets these begin.

    A process that dies while the pool starts others makes `submit` fail with whatever the half
    dismantled pool happens to run into.
    """
    try:
        with _environment(_ALLOCATOR):
            return {pool.submit(_run, job): job for job in jobs}
    finally:
        all_started.set()


def _start(file: Path, all_started: Event) -> None:
    global _function
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    all_started.wait()
    _function = pickle.loads(file.read_bytes())


def _end_with_parent() -> None:
    """A killed parent would leave this process waiting for work."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run(job: Any) -> Any:
    return _function(job)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that start meanwhile; those that are set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
