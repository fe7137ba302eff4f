"""What every solver is: a frozen value with its settings, that refuses by name or returns raw numbers.

Quality is none of its business: `nettrim.core.solvers.solve_problem` recomputes it from the raw weight. Below the
contract stands what several solvers share: one neuron at a time, the zero weight, and how much smaller a radius to
aim at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem
from nettrim.core.solution import FEASIBLE, Status


@dataclass(frozen=True)
class Limits:
    """When a solver must stop: the relative gap that is wanted, and the clock."""

    tol: float
    deadline: float | None = None

    def out_of_time(self) -> bool:
        """Whether the clock has run out."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, eq=False)
class Start:
    """A point to start from: the weight and multipliers of a nearby problem, both in the problem's own units.

    `carry` is what the solver left in its `RawAnswer`, where the nearby problem differs in the radius alone.
    """

    weight: Tensor
    multipliers: Tensor
    carry: object = None


@dataclass(frozen=True, eq=False)
class RawAnswer:
    """Unjudged numbers.

    `otherwise` is the status that holds where the certificate does not say SOLVED. `carry` is what the same solver can
    go on from at another radius.
    """

    weight: Tensor
    multipliers: Tensor | None
    iterations: int
    otherwise: Status
    dtype: torch.dtype
    damping: float = 0.0
    note: str = ""
    carry: object = None


class Solver(Protocol):
    """The contract. `run` may assume that `refuses` returned None."""

    def refuses(self, problem: LayerProblem) -> str | None:
        """Return why this solver cannot take `problem` and what can, or None."""

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Solve, and return whatever was reached."""


def one_neuron(problem: LayerProblem, m: int) -> LayerProblem:
    """Return the problem of output neuron `m` alone, for problems that do not couple the neurons.

    A radius of 0 becomes a hair: half of what still counts as feasible, measured as `measure_fit` does.
    """
    assert problem.penalty is not None
    assert problem.active is not None
    column = slice(m, m + 1)
    radius = problem.radius
    if isinstance(radius, Tensor):
        radius = float(radius[m]) or 0.5 * FEASIBLE * float(radius.mean())
    return replace(
        problem,
        targets=problem.targets[:, column],
        radius=radius,
        ceiling=None if problem.ceiling is None else problem.ceiling[:, column],
        penalty=problem.penalty[column],
        active=problem.active[:, column],
    )


def join_neurons(answers: list[RawAnswer]) -> RawAnswer:
    """Return one answer for the layer from one per neuron; what went wrong with any of them is what went wrong."""
    troubles = [answer.otherwise for answer in answers if answer.otherwise is not Status.MAX_ITER]
    notes = dict.fromkeys(answer.note for answer in answers if answer.note)
    return RawAnswer(
        weight=torch.cat([answer.weight for answer in answers]),
        multipliers=torch.cat([answer.multipliers for answer in answers if answer.multipliers is not None], dim=1),
        iterations=sum(answer.iterations for answer in answers),
        otherwise=troubles[0] if troubles else Status.MAX_ITER,
        dtype=answers[0].dtype,
        note=" ".join(notes),
    )


def zero_answer(problem: LayerProblem, otherwise: Status, note: str = "") -> RawAnswer:
    """Return the zero weight and zero multipliers, which are what is left where nothing was reached."""
    weight = torch.zeros(problem.n_outputs, problem.n_inputs, dtype=torch.float64, device=problem.inputs.device)
    gamma = torch.zeros(problem.samples, problem.n_outputs, dtype=torch.float64, device=problem.inputs.device)
    return RawAnswer(weight, gamma, 0, otherwise, torch.float64, note=note)


def zero_fits(problem: LayerProblem) -> bool:
    """Whether the zero weight meets the radius and the ceiling: no norm is smaller."""
    if problem.radius is None:
        return False
    residual = problem.residual(torch.zeros_like(problem.targets)).double()
    if problem.form == "halfspace":
        assert problem.active is not None
        if bool((residual[~problem.active] > 0).any()):
            return False
    norm = torch.linalg.vector_norm(residual, dim=0 if problem.per_neuron else None)
    return bool((norm <= torch.as_tensor(problem.radius, dtype=torch.float64)).all())


def hair(problem: LayerProblem, tol: float) -> float:
    """Return the fraction by which to shrink the radius, so that what a solver meets nearly is met in the end.

    A fiftieth of the tolerance, which the bound notices little, plus what rounding the weight to float32 moves.
    """
    margin = min(0.02 * tol, 1e-4)
    if problem.inputs.dtype == torch.float32 and problem.radius is not None:
        size = float(torch.linalg.vector_norm(problem.targets.double()))
        margin += 3e-8 * size / float(torch.linalg.vector_norm(torch.as_tensor(problem.radius).double()))
    return min(margin, 0.1)


def constant_column(problem: LayerProblem) -> int | None:
    """Return the index of a column that is constant and positive, such as a bias column, or None."""
    x = problem.inputs
    constant = ((x == x[0]).all(0) & (x[0] > 0)).nonzero().flatten()
    return int(constant[-1]) if constant.numel() else None
