"""A radius for solvers that know only the regularised problem, by a root in ``λ``.

The solutions of ``min Σ c|U| + (λ/2) dist²`` are those of the ball whose radius is their ``dist``, and ``dist(λ)``
falls from ``λ = 0`` to the smallest distance that any weight reaches. While support, signs and active samples stay
the same, ``dist² = A + B / λ²`` holds exactly (the residual of the least-squares fit on the support is orthogonal to
what the ``ℓ1`` term adds to it), so a secant in those two quantities ends in a few steps; it is kept inside a bracket
by bisection of ``log λ``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from nettrim.core.certificate import measure_fit
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import Status
from nettrim.core.solvers.base import (
    Limits,
    RawAnswer,
    Solver,
    Start,
    hair,
    join_neurons,
    one_neuron,
    zero_answer,
    zero_fits,
)
from nettrim.errors import ProblemError

# the factors by which λ moves until there is a bracket; beyond their product it means nothing in float64
_STEPS = (10.0, 100.0, 1e4, 1e4, 1e4, 1e4)
# the cosine between the multipliers and every column of the inputs at which no weight brings the outputs nearer
_ORTHOGONAL = 1e-7


@dataclass(frozen=True)
class Radius:
    """Root-finding on ``λ`` around `inner`, a solver that takes problems with `lam`; one root per ball.

    Parameters
    ----------
    inner : Solver
        Solves the regularised problems, such as ``Osqp()``.
    max_solves : int
        Regularised problems that are solved for one root, at the most.

    Raises
    ------
    ProblemError
        ``max_solves < 2``: a root needs a bracket.
    """

    inner: Solver
    max_solves: int = 80

    def __post_init__(self) -> None:
        """Refuse a limit that allows no bracket."""
        if self.max_solves < 2:
            raise ProblemError(f"Radius needs max_solves ≥ 2: {self.max_solves} was given.")

    def refuses(self, problem: LayerProblem) -> str | None:
        """Refuse what the inner solver refuses of the regularised problem."""
        return self.inner.refuses(problem if problem.lam is not None else replace(problem, radius=None, lam=1.0))

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Find the ``λ`` whose distance is the radius, from below; a problem with `lam` is the inner solver's own."""
        if problem.lam is not None:
            return self.inner.run(problem, limits, start)
        if not problem.per_neuron:
            return _Root(self, problem, limits).find(_first_lam(problem, start))
        answers = []
        for m in range(problem.n_outputs):
            neuron = one_neuron(problem, m)
            own = None if start is None else Start(start.weight[m : m + 1], start.multipliers[:, m : m + 1])
            answer = _Root(self, neuron, limits).find(_first_lam(neuron, own))
            # one λ is worth a note, one per neuron is not
            answers.append(replace(answer, note="") if answer.otherwise is Status.MAX_ITER else answer)
        return join_neurons(answers)


@dataclass(frozen=True)
class _Point:
    """One regularised solution: its ``λ``, distance, and whether the radius and the ceiling are met."""

    lam: float
    distance: float
    answer: RawAnswer


class _Root:
    """The search for one ball's ``λ``."""

    def __init__(self, settings: Radius, problem: LayerProblem, limits: Limits) -> None:
        assert isinstance(problem.radius, float)
        self.settings, self.problem = settings, problem
        # the inner bound must not use up the tolerance of the outer one
        self.limits = Limits(0.3 * limits.tol, limits.deadline)
        margin = hair(problem, limits.tol)
        self.wanted = problem.radius * (1 - margin)
        self.low, self.high = problem.radius * (1 - 2 * margin), problem.radius * (1 - 0.2 * margin)
        self.near: _Point | None = None  # distance above what is wanted: λ too small
        self.fits: _Point | None = None  # distance below: λ too large
        self.solves = self.iterations = 0
        self.trouble: RawAnswer | None = None

    def find(self, lam: float) -> RawAnswer:
        """Bracket, then close in; return the feasible end, or the nearest there is."""
        if zero_fits(self.problem):
            return zero_answer(self.problem, Status.MAX_ITER)
        if self._bracket(lam):
            self._close_in()
        best = self.fits or self.near
        if best is None:
            assert self.trouble is not None
            return replace(self.trouble, iterations=self.iterations)
        otherwise = Status.MAX_ITER
        note = f"λ = {best.lam:.6g} after {self.solves} regularised problems."
        if self.trouble is not None:
            otherwise = self.trouble.otherwise
            note = " ".join(filter(None, (note, self.trouble.note)))
        elif self.fits is None:
            otherwise = Status.NOT_FEASIBLE
            note += f" The distance stays at {best.distance:.6g} however large λ is."
        return replace(best.answer, iterations=self.iterations, otherwise=otherwise, note=note)

    def _bracket(self, lam: float) -> bool:
        """Move ``λ`` until the wanted distance lies between two points; return whether there are two."""
        for step in _STEPS:
            point = self._solve(lam)
            if point is None or self._good(point):
                return False
            if self.near is not None and self.fits is not None:
                return True
            if point is self.near:
                if self._nearest(point):
                    return False
                lam *= self._reach(point, step)
            else:
                lam /= self._reach(point, step)
        # nothing but the feasible side: the radius does not bind, and at so small a λ it costs nothing
        return False

    def _reach(self, point: _Point, step: float) -> float:
        """Return the factor for the next ``λ``: small where the first one came near, as that of a start does."""
        if self.solves > 1 or point.distance == 0:
            return step
        ratio = point.distance / self.wanted
        return min(step, max(ratio, 1 / ratio) ** 4)

    def _close_in(self) -> None:
        """Shrink the bracket until a distance lies within a hair below the radius."""
        assert self.near is not None
        assert self.fits is not None
        width = math.inf
        while self.solves < self.settings.max_solves:
            ratio = self.fits.lam / self.near.lam
            if ratio <= 1 + 1e-13:
                return
            # a bracket that the secant did not halve is bisected
            bisect = math.log(ratio) > 0.5 * width
            width = math.log(ratio)
            lam = math.sqrt(self.near.lam * self.fits.lam)
            if not bisect:
                lam = self._secant(self.near, self.fits)
            point = self._solve(lam)
            if point is None or self._good(point):
                return

    def _secant(self, near: _Point, fits: _Point) -> float:
        """Return where the line through ``(λ⁻², dist²)`` meets the wanted distance, strictly between the points."""
        top = fits.lam**-2
        slope = (near.lam**-2 - top) / (near.distance**2 - fits.distance**2)
        square = top + slope * (self.wanted**2 - fits.distance**2)
        inside = math.pow(fits.lam / near.lam, 1e-3)
        lam = 1 / math.sqrt(square) if square > 0 else fits.lam
        return min(max(lam, near.lam * inside), fits.lam / inside)

    def _nearest(self, point: _Point) -> bool:
        """Whether the outputs are as near as they come: the gradient of ``dist²`` vanishes against its factors."""
        gamma = point.answer.multipliers
        if gamma is None:
            return False
        x = self.problem.inputs.double()
        gamma = gamma.to(x)
        sizes = torch.linalg.vector_norm(x, dim=0)[:, None] * torch.linalg.vector_norm(gamma, dim=0)
        return bool(((x.T @ gamma).abs() <= _ORTHOGONAL * sizes).all())

    def _good(self, point: _Point) -> bool:
        return self.low <= point.distance <= self.high

    def _solve(self, lam: float) -> _Point | None:
        """Solve at `lam` and file the point; None where the inner solver gave nothing or the clock has run out."""
        self.solves += 1
        answer = self.settings.inner.run(replace(self.problem, radius=None, lam=lam), self.limits, None)
        self.iterations += answer.iterations
        if answer.otherwise is not Status.MAX_ITER:
            self.trouble = answer
            return None
        # as it will be returned, rounded to the dtype of the problem
        distance = measure_fit(self.problem, answer.weight.to(self.problem.inputs)).distance
        point = _Point(lam, distance, answer)
        if distance > self.high:
            self.near = point
        else:
            self.fits = point
        if self.limits.out_of_time():
            self.trouble = replace(answer, otherwise=Status.TIME_LIMIT)
            return None
        return point


def _first_lam(problem: LayerProblem, start: Start | None) -> float:
    """Return ``‖Γ‖/r`` of the start, or else where the first weight leaves zero, over ``epsilon²``."""
    assert isinstance(problem.radius, float)
    assert problem.penalty is not None
    if start is not None:
        norm = float(torch.linalg.vector_norm(start.multipliers.double()))
        if norm > 0:
            return norm / problem.radius
    anchor = problem.anchor.double()
    pull = (problem.inputs.double().T @ anchor).abs()
    leaves = torch.where((pull > 0) & (problem.penalty.T > 0), problem.penalty.T / pull, torch.inf).min()
    size = float(torch.linalg.vector_norm(anchor))
    epsilon = min(1.0, problem.radius / size) if size > 0 else 1.0
    return float(leaves) / epsilon**2 if bool(torch.isfinite(leaves)) else 1.0
