"""The runner: every instance, every solver, every level, each from cold, and a row for each in the records.

A sweep goes from the cheapest level to the dearest, and ends early where the next level cannot add anything: the clock
ran out at this one, or a sweep over iterations is within every tolerance already. Failures and refusals are rows too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.layer.datasets import Built, Instance, facts_of
from benchmarks.layer.neurons import draw, reference_shares, solve_neurons
from benchmarks.layer.objective import judge, reached
from benchmarks.layer.records import Records, Row
from benchmarks.layer.solvers import Entry
from benchmarks.layer.timing import PairClock, Peak, threads
from nettrim.core.problem import LayerProblem
from nettrim.core.solvers import solve_problem

# fields that every row has, whatever became of it
_NOTHING: Row = dict.fromkeys(
    ("seconds", "pairs", "gap", "violation", "objective", "lower_bound", "distance", "kept", "numel", "iterations",
     "dtype", "measured_seconds", "peak_mib")
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run."""

    tolerances: tuple[float, ...]
    max_seconds: float | None
    neurons: int
    threads: int
    seed: int


class Runner:
    """Runs sweeps and writes their rows. `tick` is called once for every level, also for those that are left out."""

    def __init__(self, records: Records, settings: Settings, tick: Callable[[str], None]) -> None:
        self.records, self.settings, self.tick = records, settings, tick

    def run(self, instance: Instance, solvers: dict[str, Entry]) -> None:
        """Run all sweeps on one instance; it is built where a row is missing, and dropped at the end."""
        built: Built | None = None
        clock: PairClock | None = None
        for name, entry in solvers.items():
            levels = entry.levels(self.settings.tolerances)
            for i, level in enumerate(levels):
                key = self._key(instance.name, name, entry, level)
                row = self.records.find(key, self.settings.max_seconds)
                if row is None:
                    if built is None:
                        built = instance.build()
                        clock = PairClock(built.problem)
                        self.records.instances[instance.name] = facts_of(instance, built, self.settings.seed)
                    assert clock is not None
                    row = {**key, "knob": entry.knob, **self._measure(built.problem, clock, entry, key)}
                    self.records.add(row)
                self.tick(f"{instance.name} {name}")
                if self._ends(entry, row):
                    for _ in levels[i + 1 :]:
                        self.tick(f"{instance.name} {name}")
                    break

    def _key(self, instance: str, solver: str, entry: Entry, level: float) -> Row:
        key: Row = {"instance": instance, "solver": solver, "level": level, "seed": self.settings.seed}
        if entry.group == "conic":
            return {**key, "threads": 1, "drawn": self.settings.neurons}
        return {**key, "threads": self.settings.threads}

    def _ends(self, entry: Entry, row: Row) -> bool:
        if row["failure"] or row["timed_out"]:
            return True
        return entry.knob == "iterations" and reached(row, min(self.settings.tolerances))

    def _measure(self, problem: LayerProblem, clock: PairClock, entry: Entry, key: Row) -> Row:
        """Return the figures of one solve, with the GEMM pair timed before and after it in the same threads."""
        with threads(key["threads"]):
            pairs = clock.measure()
            found = self._attempt(problem, entry, key)
            pairs += clock.measure()
        pair = statistics.median(pairs)
        if found["seconds"] is not None:
            found["pairs"] = found["seconds"] / pair
        return {**found, "pair_seconds": pair, "max_seconds": self.settings.max_seconds}

    def _attempt(self, problem: LayerProblem, entry: Entry, key: Row) -> Row:
        nothing = {**_NOTHING, "solver_repr": None, "extrapolated": entry.group == "conic", "note": "", "failure": ""}
        nothing["timed_out"] = False
        peak = Peak()
        try:
            solver = entry.make(key["level"])
            nothing["solver_repr"] = repr(solver)
            refusal = None if entry.group == "conic" else solver.refuses(problem)
            if refusal is not None:
                return {**nothing, "failure": f"refused: {refusal}"}
            if entry.group == "conic":
                radii = self._radii(problem, key["instance"])
                drawn = draw(problem.n_outputs, key["drawn"], self.settings.seed)
                found = solve_neurons(problem, radii, drawn, solver, key["level"], self.settings.max_seconds)
            else:
                found = _solve(problem, solver, entry, key["level"], self.settings.max_seconds)
            return {**nothing, **found, "peak_mib": peak.mib()}
        except Exception as error:  # a solver that raises is a result, and the next one's turn comes
            return {**nothing, "failure": f"{type(error).__name__}: {error}"}

    def _radii(self, problem: LayerProblem, instance: str) -> torch.Tensor:
        """Return the neurons' shares at our answer, kept in the records so that they are found once."""
        kept = self.records.content["shares"]
        name = f"{instance} seed {self.settings.seed}"
        if name not in kept:
            kept[name] = reference_shares(problem, self.settings.max_seconds)
        return torch.tensor(kept[name]["shares"], dtype=torch.float64)


def _solve(problem: LayerProblem, solver: Any, entry: Entry, level: float, max_seconds: float | None) -> Row:
    """Solve the whole layer and judge the answer; only the solve and its own certificate are on the clock."""
    # a solver that knows no tolerance gets one that it will not look at
    tolerance = level if entry.knob == "tolerance" else 1e-3
    solution = solve_problem(problem, solver, tol=tolerance, max_seconds=max_seconds, on_failure="return")
    stats = solution.stats
    return {
        **judge(problem, solution.weight, solution.multipliers).as_dict(),
        "seconds": stats.seconds,
        "measured_seconds": stats.seconds,
        "iterations": stats.iterations,
        "dtype": stats.dtype,
        "note": stats.note,
        "solver_repr": stats.solver,
        "timed_out": max_seconds is not None and stats.seconds >= max_seconds,
    }


def total(solvers: dict[str, Entry], tolerances: Sequence[float], instances: int) -> int:
    """Return the number of levels in all, for a progress bar."""
    return instances * sum(len(entry.levels(tolerances)) for entry in solvers.values())
