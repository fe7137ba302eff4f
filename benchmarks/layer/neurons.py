"""Conic solvers on single neurons, since the joint ball of a whole layer is too large a model for them.

At the joint optimum every neuron solves its own problem with a ball of its share ``‖R_m‖`` of the distance. So some
neurons are drawn, each is solved alone with its share at our certified answer, and seconds are taken times ``M / k``:
an extrapolation, and marked as one wherever it appears. Building the model counts, as it does for anyone who calls
such a solver. Gap and violation are the worst of the single-neuron problems.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer.objective import judge, shares
from nettrim.core.problem import LayerProblem
from nettrim.core.solvers import solve_problem
from nettrim.core.solvers.base import Solver, one_neuron
from nettrim.errors import NetTrimError


def reference_shares(problem: LayerProblem, max_seconds: float | None) -> dict[str, Any]:
    """Return every neuron's share at our answer to a gap of 1e-4, and how good that answer is."""
    solution = solve_problem(problem, "auto", tol=1e-4, max_seconds=max_seconds, on_failure="return")
    verdict = judge(problem, solution.weight, solution.multipliers)
    return {
        "gap": verdict.gap,
        "violation": verdict.violation,
        "shares": [float(share) for share in shares(problem, solution.weight)],
    }


def draw(outputs: int, count: int, seed: int) -> list[int]:
    """Return `count` neurons, drawn evenly from all, the dead ones too: their seconds stand for the others'."""
    return sorted(torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def solve_neurons(
    problem: LayerProblem,
    radii: Tensor,
    drawn: list[int],
    solver: Solver,
    tolerance: float,
    max_seconds: float | None,
) -> dict[str, Any]:
    """Solve the drawn neurons, each alone, and return what a record needs; the clock ends the row with its neuron."""
    separate = replace(problem, radius=radii)
    found: list[dict[str, Any]] = []
    iterations, notes = 0, []
    for m in drawn:
        neuron = one_neuron(separate, m)
        refusal = solver.refuses(neuron)
        if refusal is not None:
            raise NetTrimError(refusal)
        solution = solve_problem(neuron, solver, tol=tolerance, max_seconds=max_seconds, on_failure="return")
        verdict = judge(neuron, solution.weight, solution.multipliers)
        found.append({"neuron": m, "seconds": solution.stats.seconds, **verdict.as_dict()})
        iterations += solution.stats.iterations
        notes.append(solution.stats.note)
        if max_seconds is not None and solution.stats.seconds >= max_seconds:
            break
    measured = sum(one["seconds"] for one in found)
    return {
        "solver_repr": repr(solver),
        "measured_seconds": measured,
        "seconds": measured * problem.n_outputs / len(found),
        "extrapolated": True,
        "neurons": found,
        "gap": max(one["gap"] for one in found),
        "violation": max(one["violation"] for one in found),
        "objective": None,
        "lower_bound": None,
        "distance": None,
        "kept": None,
        "numel": problem.n_inputs * problem.n_outputs,
        "iterations": iterations,
        "dtype": "float64",
        "note": " ".join(dict.fromkeys(filter(None, notes))),
        "timed_out": max_seconds is not None and any(one["seconds"] >= max_seconds for one in found),
    }
