"""Planted wrong solvers and false claims: the contract's check goes red for each, or it checks nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from oracle import assert_certified

from nettrim.core.cases import dense_weight, random_layer
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import FEASIBLE, LayerSolution, Status
from nettrim.core.solvers import Admm, solve_problem
from nettrim.core.solvers.base import Limits, RawAnswer, Start

TOL = 1e-3


class Honest:
    """The solver that the wrong ones are made of."""

    def refuses(self, problem: LayerProblem) -> str | None:
        return None

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        return Admm().run(problem, limits, start)


class Zeros(Honest):
    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        return replace(answer, weight=torch.zeros_like(answer.weight))


@dataclass
class Dense(Honest):
    """Returns the dense weight: feasible, nothing pruned."""

    weight: torch.Tensor

    def run(self, problem, limits, start):
        return replace(super().run(problem, limits, start), weight=self.weight)


class DropsTheBias(Honest):
    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        weight = answer.weight.clone()
        weight[:, -1] = 0
        return replace(answer, weight=weight)


class StopsAtOne(Honest):
    def run(self, problem, limits, start):
        return Admm(max_iter=1).run(problem, limits, start)


class WidensTheRadius(Honest):
    """Solves an easier problem: a lower objective, and infeasible."""

    def run(self, problem, limits, start):
        return super().run(replace(problem, radius=1.2 * problem.radius), limits, start)


class TightensTheRadius(Honest):
    """Solves a harder problem: feasible, and not optimal."""

    def run(self, problem, limits, start):
        return super().run(replace(problem, radius=0.8 * problem.radius), limits, start)


class IgnoresTheInactive(Honest):
    """Fits the active samples alone, as if a ReLU layer were masked least squares."""

    def run(self, problem, limits, start):
        no_ceiling = torch.full_like(problem.targets, 1e3)
        answer = super().run(replace(problem, ceiling=no_ceiling), limits, start)
        return replace(answer, multipliers=None)


class FitsTheInactiveToo(Honest):
    """Treats the layer as linear, with targets of 0 where it does not fire."""

    def run(self, problem, limits, start):
        return super().run(LayerProblem(problem.inputs, problem.targets, "linear", lam=1e3), limits, start)


class SwapsNeurons(Honest):
    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        return replace(answer, weight=answer.weight.flip(0))


class ThresholdsHard(Honest):
    """A hidden threshold after the solve, as research code has it."""

    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        return replace(answer, weight=torch.where(answer.weight.abs() < 0.1, 0.0, answer.weight))


class GivesNoMultipliers(Honest):
    """A right weight without a proof."""

    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        return replace(answer, multipliers=torch.zeros_like(answer.multipliers))


class ClaimsSuccess(Honest):
    """Wrong, and sure of itself: the outcome that it claims is not asked for."""

    def run(self, problem, limits, start):
        answer = super().run(problem, limits, start)
        return replace(answer, weight=0.5 * answer.weight, otherwise=Status.SOLVED)


WRONG = {
    "zeros": ("plain", Zeros(), "violation"),
    "dense weight": ("plain", Dense(dense_weight("plain", 0)), "gap"),
    "no bias": ("constant column", DropsTheBias(), "violation"),
    "no free bias": ("free bias", DropsTheBias(), "violation"),
    "one iteration": ("plain", StopsAtOne(), "violation"),
    "wider radius": ("plain", WidensTheRadius(), "violation"),
    "tighter radius": ("plain", TightensTheRadius(), "gap"),
    "inactive ignored": ("plain", IgnoresTheInactive(), "violation"),
    "inactive fitted": ("plain", FitsTheInactiveToo(), "violation"),
    "neurons swapped": ("plain", SwapsNeurons(), "violation"),
    "hidden threshold": ("plain", ThresholdsHard(), "violation"),
    "no multipliers": ("plain", GivesNoMultipliers(), "gap"),
    "claims success": ("plain", ClaimsSuccess(), "violation"),
}


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in WRONG.values()}))
def test_the_honest_solver_passes(kind):
    assert_certified(solve_problem(random_layer(kind, 0), Honest(), tol=TOL), TOL)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_solver_turns_the_check_red(name):
    kind, solver, message = WRONG[name]
    solution = solve_problem(random_layer(kind, 0), solver, tol=TOL, on_failure="return")
    with pytest.raises(AssertionError, match=message):
        assert_certified(solution, TOL)
    assert solution.status is not Status.SOLVED
    bad = solution.certificate.violation > FEASIBLE if message == "violation" else solution.certificate.gap > TOL
    assert bad


@lru_cache(maxsize=1)
def true_solution() -> LayerSolution:
    return solve_problem(random_layer("plain", 0), "admm", tol=TOL)


def claim(**numbers):
    return lambda s: replace(s, certificate=replace(s.certificate, **{k: f(s) for k, f in numbers.items()}))


def multipliers(change):
    return lambda s: replace(s, multipliers=change(s.multipliers))


def weight(change):
    return lambda s: replace(s, weight=change(s.weight))


FALSE = {
    "objective lowered": claim(objective=lambda s: s.certificate.lower_bound),
    "bound raised": claim(lower_bound=lambda s: s.certificate.lower_bound * 1.0001),
    "bound and gap raised": claim(lower_bound=lambda s: s.certificate.objective, gap=lambda s: 0.0),
    "gap of zero": claim(gap=lambda s: 0.0),
    "violation": claim(violation=lambda s: 1e-7),
    "distance": claim(distance=lambda s: 0.99 * s.certificate.distance),
    "multipliers scaled up": multipliers(lambda g: 1.01 * g),
    "multipliers scaled down": multipliers(lambda g: 0.99 * g),
    "multipliers of the wrong sign": multipliers(lambda g: -g),
    "multipliers of other samples": multipliers(lambda g: g.flip(0)),
    "multipliers positive off the active set": multipliers(lambda g: g + 1e-9 * (g == 0)),
    "no multipliers": multipliers(torch.zeros_like),
    "weight scaled": weight(lambda u: 0.999 * u),
    "weight pruned further": weight(lambda u: torch.where(u.abs() < 0.1, 0.0, u)),
    "weight transposed": weight(lambda u: u.T),
    "another problem": lambda s: replace(s, problem=random_layer("plain", 1)),
    "another radius": lambda s: replace(s, problem=replace(s.problem, radius=0.99 * s.problem.radius)),
}


def test_the_true_claim_passes():
    assert_certified(true_solution(), TOL)


@pytest.mark.parametrize("name", FALSE)
def test_a_false_claim_turns_the_check_red(name):
    with pytest.raises(AssertionError):
        assert_certified(FALSE[name](true_solution()), TOL)
