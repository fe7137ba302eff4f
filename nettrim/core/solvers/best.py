"""What a run keeps on its way: the best feasible weight and the best bound seen so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from nettrim.core.certificate import feasible_multipliers
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import FEASIBLE
from nettrim.core.solvers.repair import Repair


class Best:
    """The best feasible weight and the best bound seen, which need not come from one iteration.

    `margin` is the fraction by which weights are made to stay below the radius.
    """

    def __init__(
        self, problem: LayerProblem, margin: float = 0.0, anchor: Tensor | None = None, floor: Tensor | None = None
    ) -> None:
        self.problem = problem
        self.repair = Repair(problem, margin, anchor, floor)
        self.objective, self.bound = float("inf"), -float("inf")
        self.violation = float("inf")
        self.weight = problem.inputs.new_zeros(problem.n_inputs, problem.n_outputs)
        self.multipliers = problem.inputs.new_zeros(problem.samples, problem.n_outputs)
        self.broken = False
        # the gap is of the repaired weight, the violation is `Repaired.before`
        self.last_gap = self.last_violation = self.last_objective = float("inf")

    def consider(self, weight: Tensor, multipliers: Tensor) -> None:
        """Evaluate an iterate's ``(N, M)`` weight and ``(P, M)`` multipliers, and keep what is better."""
        found = self.repair(weight)  # first, so that its arrays are gone before the next ones come
        dual = feasible_multipliers(self.problem, multipliers, self.problem.inputs.dtype)
        self.keep(found.weight, found.violation, found.distance, lambda: dual.multipliers, dual.bound)
        self.last_violation = found.before

    def keep(
        self, weight: Tensor, violation: float, distance: float, multipliers: Callable[[], Tensor], bound: float
    ) -> None:
        """Keep what is better of an evaluated weight and of multipliers, which are made only if they are."""
        p = self.problem
        objective = float((p.penalty.T * weight.double().abs()).sum())  # type: ignore[union-attr]
        if p.lam is not None:
            objective += 0.5 * p.lam * distance**2
        if not (math.isfinite(objective) and math.isfinite(distance) and math.isfinite(violation)):
            # where no weight is feasible, multipliers grow without end, and overflow at last
            self.broken = True
            return
        if bound > self.bound:
            self.bound, self.multipliers = bound, multipliers()
        # a feasible weight beats every infeasible one; among the infeasible the nearest is kept
        allowed = 0.5 * FEASIBLE if p.form == "halfspace" else 0.0
        violation = violation if violation > allowed else 0.0
        if (violation, objective) < (self.violation, self.objective):
            self.violation, self.objective, self.weight = violation, objective, weight.clone()
        self.last_violation, self.last_objective = violation, objective
        self.last_gap = _relative(objective - self.bound, objective)

    @property
    def gap(self) -> float:
        """Relative gap of the best pair, infinite while nothing is feasible."""
        return float("inf") if self.violation > 0 else _relative(self.objective - self.bound, self.objective)


def _relative(difference: float, objective: float) -> float:
    return difference / objective if objective > 0 else (0.0 if difference <= 0 else float("inf"))
