"""A second-order finish: from a first-order start to a sharp certificate in a few steps, for the ball and linear forms.

The one-sided loss is piecewise quadratic. On a neuron's support ``S`` its Hessian is ``X_SᵀX_S`` over the active
samples ``A = Ω ∪ {Z > T}``, so once signs and active samples are right, one step is exact. A step of all neurons:

1. residual ``R`` and gradient ``G = XᵀR`` (one GEMM);
2. for each neuron a working set (support, free columns, and what presses against the penalty), the Hessian over its
   active samples, the quadratic program with the ``ℓ1`` term by coordinate descent, then its exact solution on the
   support;
3. with a radius, ``λ``: the step's own model says ``dist² = A + B/λ²`` on a fixed support, so the ``λ`` that meets the
   radius and the weights that go with it are found together;
4. a line search for each neuron (one GEMM).

The start is ADMM's. Where there are many more samples than inputs, it runs on a quarter of them first, since signs are
mostly right long before numbers are. Where the steps do not certify, ADMM goes on: nothing is lost by trying. The loops
over neurons are compiled by numba: gathering rows and coordinate descent are what torch is slowest at.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nettrim.core.certificate import best_bound
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import Status
from nettrim.core.solvers.admm import Admm, Best, Iteration
from nettrim.core.solvers.base import Limits, RawAnswer, Start
from nettrim.core.solvers.scaling import Scaled, relative_radius
from nettrim.errors import MissingExtraError, ProblemError


@dataclass(frozen=True)
class Newton:
    """ADMM to a rough solution, working-set Newton steps to a sharp one.

    All forms; ``halfspace``, and tensors on a GPU, get ADMM alone.

    Parameters
    ----------
    first : int
        Iterations of ADMM before the first try; three times as many in all before each later one.
    steps : int
        Newton steps of one try, at the most.
    start : Admm
        Settings of ADMM, its `max_iter` included.

    Raises
    ------
    ProblemError
        `first` or `steps` below 1.
    MissingExtraError
        numba is not installed.
    """

    first: int = 20
    steps: int = 8
    start: Admm = field(default_factory=Admm)

    def __post_init__(self) -> None:
        """Refuse settings that try nothing, and a missing library before any work."""
        if self.first < 1 or self.steps < 1:
            raise ProblemError(f"Newton needs first ≥ 1 and steps ≥ 1: {self.first} and {self.steps} were given.")
        if not all(importlib.util.find_spec(name) for name in ("numba", "threadpoolctl")):
            raise MissingExtraError("Newton needs numba and threadpoolctl: pip install 'nettrim[newton]'.")

    def refuses(self, problem: LayerProblem) -> str | None:
        """Take every problem."""
        return None

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Make Newton steps from a rough start, then alternate with ADMM until the certificate holds or time is up."""
        if problem.form == "halfspace" or problem.inputs.device.type != "cpu":
            return self.start.run(problem, limits, start)
        made, found = 0, None
        if start is not None or problem.samples >= 4 * problem.n_inputs:
            found = Steps(Scaled(problem, _working_dtype(problem, limits.tol)), limits)
            if start is not None:
                found.begin_at(start)
            else:
                found.begin(*self._rough(problem, found.scaled, limits))
            made = found.make(self.steps)
            if found.done:
                weight, gamma = found.scaled.back(found.best.weight, found.best.multipliers)
                return RawAnswer(weight, gamma, 0, Status.MAX_ITER, found.x.dtype, note=self.note(made))
        iteration = Iteration(problem, self.start, limits, start)
        if found is not None:
            inputs = iteration.scaled.problem.inputs
            iteration.best.consider(found.best.weight.to(inputs), found.best.multipliers.to(inputs))
        steps, last = Steps(iteration.scaled, limits, iteration.best), self.first
        while not iteration.done:
            iteration.until(min(last, self.start.max_iter))
            if iteration.done or iteration.steps >= self.start.max_iter:
                break
            steps.begin(iteration.variables.sparse.T, iteration.variables.lam())
            made += steps.make(self.steps)
            last *= 3
        return iteration.answer(self.note(made))

    @staticmethod
    def note(made: int) -> str:
        """Say how many steps there were."""
        return f"{made} Newton steps." if made else ""

    def _rough(self, problem: LayerProblem, scaled: Scaled, limits: Limits) -> tuple[Tensor, Tensor]:
        """Solve roughly on a quarter of the rows, and return the weight and ``λ`` in the units of `scaled`."""
        rows = torch.randperm(problem.samples, generator=torch.Generator().manual_seed(0))[: problem.samples // 4]
        share = len(rows) / problem.samples
        assert problem.active is not None
        quarter = replace(
            problem,
            inputs=problem.inputs[rows],
            targets=problem.targets[rows],
            ceiling=None if problem.ceiling is None else problem.ceiling[rows],
            active=problem.active[rows],
            radius=None if problem.radius is None else problem.radius * share**0.5,
            lam=None if problem.lam is None else problem.lam / share,
        )
        # no sharper: the quarter's optimum is not the whole's
        rough = Limits(0.3, limits.deadline)
        iteration = Iteration(quarter, self.start, rough, None)
        iteration.until(self.first)
        steps = Steps(iteration.scaled, rough)
        steps.begin(iteration.variables.sparse.T, iteration.variables.lam())
        steps.make(self.steps)
        weight, _ = steps.scaled.back(steps.u.T, steps.u[:0])
        lam = steps.lam * share / (steps.scaled.k * steps.scaled.size)
        return scaled.weight_into(weight).T, lam * (scaled.k * scaled.size)


def _working_dtype(problem: LayerProblem, tol: float) -> torch.dtype:
    """Return what the products run in: float32 where it resolves the radius and the gap, on large problems."""
    large = problem.samples * problem.n_inputs * problem.n_outputs >= 2e7
    fine = tol * min(1.0, 10 * relative_radius(problem)) < 5e-5
    return torch.float32 if large and not fine else torch.float64


class Steps:
    """Newton steps of all neurons together, on a scaled problem; `best` is offered every weight on the way."""

    def __init__(self, scaled: Scaled, limits: Limits, best: Best | None = None) -> None:
        from nettrim.core.solvers.kernels import Models

        p = scaled.problem
        self.scaled, self.limits, self.best = scaled, limits, best or Best(p)
        self.target = p.tightened(0.1 * limits.tol)
        assert p.active is not None and p.penalty is not None
        self.x, self.anchor = p.inputs, p.anchor.T.contiguous()
        self.penalty = p.penalty.to(p.inputs.dtype).contiguous()
        # R = max(Z − T, floor): −∞ on the active set, 0 off it
        self.floor = None if p.form == "linear" else torch.where(p.active.T, -torch.inf, 0.0).to(self.x).contiguous()
        self.models = Models(self.x, self.penalty, self.floor)

    @property
    def done(self) -> bool:
        """Whether the certificate holds."""
        return self.best.gap <= 0.9 * self.limits.tol

    def begin(self, weight: Tensor, lam: Tensor) -> None:
        """Start at a weight ``(M, N)`` and every neuron's ``λ (M,)``, both scaled."""
        self.u, self.lam = weight.to(self.x).contiguous(), lam.to(self.x)
        self.z = self.u @ self.x.T
        self.r = self._residual(self.z)

    def begin_at(self, start: Start) -> None:
        """Start at a nearby problem's weight and multipliers, in its own units; ``λ`` is ``‖Γ‖/‖R‖``."""
        p = self.scaled.problem
        weight, gamma = self.scaled.into(start)
        self.begin(weight.T, weight.new_full((p.n_outputs,), p.lam or 0.0))
        if p.lam is None:
            dims = 0 if p.per_neuron else None
            distance = torch.linalg.vector_norm(self.r.T, dim=dims)
            lam: Tensor = torch.linalg.vector_norm(gamma, dim=dims) / distance.clamp(min=1e-30)
            self.lam = lam.expand(p.n_outputs).contiguous()

    def make(self, steps: int) -> int:
        """Make `steps` steps at the most, and return how many were made."""
        if not 0 < float(self.lam.max()) < torch.inf:
            return 0  # nothing presses against the fit yet
        # a neuron without multipliers (a dead one) takes a λ like the others'
        self.lam = torch.where(self.lam > 0, self.lam, self.lam.max())
        g = self.r @ self.x
        made = 0
        while made < steps:
            made += 1
            model = self.models.directions(self.r, self.u, g, self.lam)
            self.lam, d = _meet_radius(self.target, self.lam, self.r, model)
            self._line_search(d, d @ self.x.T)
            g = self.r @ self.x
            self._offer(g)
            if self.done or self.limits.out_of_time():
                break
        return made

    def _offer(self, g: Tensor) -> None:
        """Offer the weight and its residual's multipliers, ``Γ = −λR``, whose products are all at hand."""
        p, r, lam = self.scaled.problem, self.r, self.lam
        norms = torch.linalg.vector_norm(r, dim=1).double()
        distance = float(norms.norm())
        violation = 0.0
        if isinstance(p.radius, Tensor):
            size = torch.where(p.radius > 0, p.radius, p.radius.mean())
            violation = max(0.0, float(((norms - p.radius) / size).max()))
        elif p.radius is not None:
            violation = max(0.0, (distance - p.radius) / p.radius)
        linear = -lam * (r * self.anchor).sum(1)
        scale, bound = best_bound(p, -(lam[:, None] * g).T, linear, (lam * norms.to(lam)) ** 2)
        self.best.keep(self.u.T, violation, distance, lambda: r.T * (-lam * scale), bound)

    def _residual(self, z: Tensor) -> Tensor:
        difference = z - self.anchor
        return difference if self.floor is None else torch.maximum(difference, self.floor, out=difference)

    def _line_search(self, d: Tensor, xd: Tensor) -> None:
        """Halve each neuron's step until ``Σ c|u| + (λ/2) dist²`` does not rise, five times at the most."""

        def value(weight: Tensor, r: Tensor) -> Tensor:
            return (self.penalty * weight.abs()).sum(1) + 0.5 * self.lam * (r * r).sum(1)

        before = value(self.u, self.r)
        allowed = before + 1e-5 * before.abs()
        alpha = torch.ones_like(before)
        for attempt in range(6):
            u, z = self.u + alpha[:, None] * d, self.z + alpha[:, None] * xd
            r = self._residual(z)
            worse = value(u, r) > allowed
            if attempt == 5 or not bool(worse.any()):
                break
            alpha = torch.where(worse, 0.5 * alpha, alpha)
        self.u, self.z, self.r = u, z, r


def _meet_radius(target: LayerProblem, lam: Tensor, r: Tensor, out: Any) -> tuple[Tensor, Tensor]:
    """Return ``λ'`` and the step to its minimiser in the model, where ``dist² = A + B/λ'²`` meets the radius.

    One ``λ`` moves by a factor of 1.6 at the most, because the model holds on one support.
    """
    d, v, linear, square, b = out
    if target.radius is None:
        return lam, d
    here = (r * r).sum(1, dtype=torch.float64) + 2 * linear + square  # the model's dist² at λ
    old = 1 / lam.double()
    if isinstance(target.radius, Tensor):
        wanted = target.radius**2
    else:
        # one λ for all
        here, b, old = here.sum()[None], b.sum()[None], old[:1]
        wanted = torch.full_like(here, target.radius**2)
    square_new = (wanted - (here - b * old**2)) / b.clamp(min=1e-300)
    new = torch.where((square_new > 0) & (b > 0), square_new.clamp(min=1e-300).sqrt(), old)
    new = torch.minimum(torch.maximum(new, old / 1.6), old * 1.6)
    d = d - (new - old).to(d)[:, None] * v
    return (1 / new).to(lam).expand(lam.shape).contiguous(), d
