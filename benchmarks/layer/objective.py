"""The judge: every figure of the benchmark is computed here, in float64, from raw weights and multipliers.

What a solver says of itself, its status included, is never read. A weight counts as having reached a tolerance where
its gap is within it *and* it meets the radius (and the ceiling) to `FEASIBLE`: an infeasible weight has a smaller norm
than the optimum, so its gap alone flatters it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import nettrim
from nettrim.core.certificate import measure_fit
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import FEASIBLE


@dataclass(frozen=True)
class Verdict:
    """What one weight is worth: the certificate's figures, and how many weights are not zero."""

    objective: float
    lower_bound: float
    gap: float
    violation: float
    distance: float
    kept: int
    numel: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a record."""
        return asdict(self)


def judge(problem: LayerProblem, weight: Any, multipliers: Any = None) -> Verdict:
    """Return the verdict on any weight ``(M, N)``; without multipliers its own residual gives the bound."""
    certificate = nettrim.certify(problem, weight, multipliers)
    weight = torch.as_tensor(weight)
    return Verdict(
        objective=certificate.objective,
        lower_bound=certificate.lower_bound,
        gap=certificate.gap,
        violation=certificate.violation,
        distance=certificate.distance,
        kept=int((weight != 0).sum()),
        numel=weight.numel(),
    )


def error(row: Any) -> float:
    """Return the worse of gap and violation, which is what the plots show; infinite where nothing came back."""
    if row["gap"] is None or row["violation"] is None:
        return float("inf")
    return max(abs(float(row["gap"])), float(row["violation"]))


def feasible(row: Any) -> bool:
    """Whether the weight meets the radius and the ceiling, by the package's own standard."""
    return row["violation"] is not None and float(row["violation"]) <= FEASIBLE


def reached(row: Any, tolerance: float) -> bool:
    """Whether a record is a certified answer within `tolerance`."""
    return feasible(row) and float(row["gap"]) <= tolerance


def nearly_reached(row: Any, tolerance: float) -> bool:
    """Whether gap and violation are both within `tolerance`: no certified answer, but near one."""
    return error(row) <= tolerance


def shares(problem: LayerProblem, weight: Any) -> Tensor:
    """Return each neuron's share ``‖R_m‖ (M,)`` of the joint distance, in the units of the targets."""
    residual = measure_fit(problem, torch.as_tensor(weight)).residual
    if problem.form == "halfspace":
        assert problem.active is not None
        residual = torch.where(problem.active, residual, 0.0)
    norms: Tensor = torch.linalg.vector_norm(residual, dim=0)
    return norms
