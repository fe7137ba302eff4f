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
from nettrim.core.solvers.admm import Admm, Best, Iteration
from nettrim.core.solvers.base import Limits, RawAnswer, Start
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

    first: int = 30
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
        """Alternate ADMM and Newton steps, until the certificate holds, or the iterations or the clock run out."""
        iteration = Iteration(problem, self.start, limits, start)
        able = problem.form != "halfspace" and problem.inputs.device.type == "cpu"
        made = 0
        if able and start is None and problem.samples >= 8 * problem.n_inputs:
            made = self._coarse_to_fine(iteration.best, limits)
        last = self.first
        while not iteration.done:
            iteration.until(min(last, self.start.max_iter))
            if iteration.done or iteration.steps >= self.start.max_iter:
                break
            if able:
                variables = iteration.variables
                made += newton_steps(iteration.best, variables.sparse.T, variables.lam(), self.steps, limits).made
            last *= 3
        return iteration.answer(f"{made} Newton steps." if made else "")

    def _coarse_to_fine(self, best: Best, limits: Limits) -> int:
        """Solve roughly on a quarter of the rows, and make Newton steps on all of them from there."""
        p = best.problem
        rows = torch.randperm(p.samples, generator=torch.Generator().manual_seed(0))[: p.samples // 4]
        share = len(rows) / p.samples
        assert p.active is not None
        quarter = replace(
            p,
            inputs=p.inputs[rows],
            targets=p.targets[rows],
            ceiling=None if p.ceiling is None else p.ceiling[rows],
            active=p.active[rows],
            radius=None if p.radius is None else p.radius * share**0.5,
            lam=None if p.lam is None else p.lam / share,
        )
        # no sharper: the quarter's optimum is not the whole's
        rough = Limits(0.1, limits.deadline)
        coarse = Iteration(quarter, self.start, rough, None)
        coarse.until(self.first)
        found = newton_steps(coarse.best, coarse.variables.sparse.T, coarse.variables.lam(), self.steps, rough)
        weight, _ = coarse.scaled.back(found.weight.T, coarse.variables.step)
        lam = found.lam * (share / (coarse.scaled.k * coarse.scaled.size))
        return found.made + newton_steps(best, weight.to(p.inputs), lam, self.steps, limits).made


@dataclass(frozen=True, eq=False)
class Found:
    """Where some Newton steps led: how many were made, the weight ``(M, N)``, and every neuron's ``λ (M,)``."""

    made: int
    weight: Tensor
    lam: Tensor


def newton_steps(best: Best, weight: Tensor, lam: Tensor, steps: int, limits: Limits) -> Found:
    """Make Newton steps on the problem of `best`, to which every weight and multipliers on the way are offered."""
    from nettrim.core.solvers.kernels import directions

    p = best.problem
    if float(lam.max()) <= 0:
        return Found(0, weight, lam)  # nothing presses against the fit yet
    # a neuron without multipliers (a dead one) takes a λ like the others'
    lam = torch.where(lam > 0, lam, lam.max())
    target = p.tightened(0.1 * limits.tol)
    assert p.active is not None and p.penalty is not None
    x, anchor, penalty = p.inputs, p.anchor.T.contiguous(), p.penalty.to(p.inputs.dtype).contiguous()
    floor = None if p.form == "linear" else torch.where(p.active.T, -torch.inf, 0.0).to(x.dtype).contiguous()
    u, made = weight.contiguous(), 0
    z = u @ x.T
    r = _residual(z, anchor, floor)
    g = r @ x
    while made < steps:
        made += 1
        lam, d = _meet_radius(target, lam, r, directions(x, r, u, g, penalty, lam, floor))
        u, z = _line_search(u, z, d, d @ x.T, anchor, floor, penalty, lam)
        r = _residual(z, anchor, floor)
        g = r @ x
        _offer(best, u, lam, r, g, anchor)
        if best.gap <= 0.9 * limits.tol or limits.out_of_time():
            break
    return Found(made, u, lam)


def _offer(best: Best, u: Tensor, lam: Tensor, r: Tensor, g: Tensor, anchor: Tensor) -> None:
    """Offer a weight and its residual's multipliers, ``Γ = −λR``, whose products are all at hand."""
    p = best.problem
    norms = torch.linalg.vector_norm(r, dim=1).double()
    distance = float(norms.norm())
    violation = 0.0
    if isinstance(p.radius, Tensor):
        scale = torch.where(p.radius > 0, p.radius, p.radius.mean())
        violation = max(0.0, float(((norms - p.radius) / scale).max()))
    elif p.radius is not None:
        violation = max(0.0, (distance - p.radius) / p.radius)
    linear = -lam * (r * anchor).sum(1)
    scale, bound = best_bound(p, -(lam[:, None] * g).T, linear, (lam * norms.to(lam)) ** 2)
    best.keep(u.T, violation, distance, lambda: r.T * (-lam * scale), bound)


def _residual(z: Tensor, anchor: Tensor, floor: Tensor | None) -> Tensor:
    difference = z - anchor
    return difference if floor is None else torch.maximum(difference, floor, out=difference)


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


def _line_search(
    u: Tensor, z: Tensor, d: Tensor, xd: Tensor, anchor: Tensor, floor: Tensor | None, penalty: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Halve each neuron's step until ``Σ c|u| + (λ/2) dist²`` does not rise, five times at the most."""

    def value(weight: Tensor, outputs: Tensor) -> Tensor:
        r = _residual(outputs, anchor, floor)
        return (penalty * weight.abs()).sum(1) + 0.5 * lam * (r * r).sum(1)

    before = value(u, z)
    allowed = before + 1e-5 * before.abs()
    alpha = torch.ones_like(before)
    for _ in range(5):
        worse = value(u + alpha[:, None] * d, z + alpha[:, None] * xd) > allowed
        if not bool(worse.any()):
            break
        alpha = torch.where(worse, 0.5 * alpha, alpha)
    return u + alpha[:, None] * d, z + alpha[:, None] * xd
