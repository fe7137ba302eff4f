"""The unit of cost, measured beside every solve: one dense float64 GEMM pair ``X @ U.T`` and ``R.T @ X``.

Also here: threads for a while, compilation before the clock, and the peak of the memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solvers import Admm, Newton, solve_problem
from nettrim.core.solvers.base import Solver


class PairClock:
    """Times the GEMM pair of one problem, in the threads of the moment."""

    def __init__(self, problem: LayerProblem) -> None:
        p, n, m = problem.samples, problem.n_inputs, problem.n_outputs
        generator = torch.Generator().manual_seed(0)
        self.x = problem.inputs.double()
        self.u = torch.randn(m, n, generator=generator, dtype=torch.float64)
        self.r = torch.randn(p, m, generator=generator, dtype=torch.float64)
        self.z, self.g = torch.empty_like(self.r), torch.empty_like(self.u)
        self.measure()  # the first is slower: pages, threads

    def measure(self, count: int = 3, budget: float = 3.0) -> list[float]:
        """Return the seconds of up to `count` pairs, fewer where they take more than `budget` seconds together."""
        seconds: list[float] = []
        while not seconds or (len(seconds) < count and sum(seconds) < budget):
            began = time.perf_counter()
            torch.mm(self.x, self.u.T, out=self.z)
            torch.mm(self.r.T, self.x, out=self.g)
            seconds.append(time.perf_counter() - began)
        return seconds


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads in torch and in every BLAS, and put torch's back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        if importlib.util.find_spec("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            with threadpool_limits(count):
                yield
        else:
            yield
    finally:
        torch.set_num_threads(before)


def warm_up(solvers: Iterable[Solver], forms: Iterable[str]) -> None:
    """Solve small problems with every solver, so that imports and compilation are over before anything is timed.

    Compiled loops are compiled for each dtype: the second shape is one for which "auto" takes float32.
    """
    generator = torch.Generator().manual_seed(0)
    for form in forms:
        for p, n, m in ((64, 8, 4), (4000, 100, 50)):
            x = torch.randn(p, n, generator=generator, dtype=torch.float64)
            y = (x @ torch.randn(n, m, generator=generator, dtype=torch.float64)).clamp(min=0)
            problem = build_problem(x, y, epsilon=0.3, form=form)
            for solver in solvers:
                if p == 64 or not _by_cvxpy(solver):
                    solve_problem(problem, solver, tol=1e-2, max_seconds=20.0, on_failure="return")
                if isinstance(solver, Newton):
                    single = Newton(start=Admm(dtype="float32"))
                    solve_problem(problem, single, tol=1e-2, max_seconds=20.0, on_failure="return")


def _by_cvxpy(solver: Solver) -> bool:
    return "conic" in type(getattr(solver, "inner", solver)).__module__


class Peak:
    """The peak of the resident memory since construction, where Linux tells it."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            # 5 sets the high-water mark back to what is resident now
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float | None:
        """Return it in MiB, or None."""
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            return None
        return round(int(found.group(1)) / 1024, 1) if found else None
