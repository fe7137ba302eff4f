"""Where the work of a wave runs: in this process, or in several by joblib. Nothing else knows the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import joblib
import torch

from nettrim.errors import ProblemError

Task = TypeVar("Task")
Result = TypeVar("Result")


def check_executor(executor: int | None) -> int:
    """Return the number of worker processes that `executor` asks for: None means 1, in this process.

    Raises
    ------
    ProblemError
        `executor` is not a whole number ≥ 1.
    """
    if executor is None:
        return 1
    if isinstance(executor, bool) or not isinstance(executor, int) or executor < 1:
        raise ProblemError(f"executor={executor!r} is unknown: give a number of worker processes ≥ 1, or None.")
    return executor


def run_all(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield ``work(task)`` for every task, in their order, as soon as each is done."""
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield work(task)
        return
    # the cores are shared out: each worker alone would take all of them
    threads = max(1, torch.get_num_threads() // min(workers, len(tasks)))
    parallel = joblib.Parallel(n_jobs=min(workers, len(tasks)), return_as="generator")
    yield from parallel(joblib.delayed(_with_threads)(work, task, threads) for task in tasks)


def _with_threads(work: Callable[[Task], Result], task: Task, threads: int) -> Result:
    torch.set_num_threads(threads)
    return work(task)
