"""Newton steps for the ball and linear forms, all neurons in lock-step, so that products are GEMMs.

The one-sided loss is piecewise quadratic. On a neuron's support ``S`` its Hessian is ``X_SᵀX_S`` over the active
samples ``A = Ω ∪ {Z > T}``, so once signs and active samples are right, one step is exact. A step of all neurons:

1. residual ``R`` and gradient ``G = XᵀR`` (one GEMM);
2. for each neuron a working set (support, free columns, and what presses against the penalty), the Hessian over its
   active samples, the quadratic program with the ``ℓ1`` term by coordinate descent, then its exact solution on the
   support (`nettrim.core.solvers.kernels`);
3. with a radius, ``λ``: the step's own model says ``dist² = A + B/λ²`` on a fixed support, so the ``λ`` that meets the
   radius and the weights that go with it are found together;
4. a line search for each neuron (one GEMM).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nettrim.core.certificate import best_bound, feasible_multipliers
from nettrim.core.problem import LayerProblem
from nettrim.core.solvers.base import Limits
from nettrim.core.solvers.best import Best
from nettrim.core.solvers.scaling import Scaled


class Steps:
    """Newton steps of all neurons together, on a scaled problem; `best` is offered every weight on the way."""

    def __init__(self, scaled: Scaled, limits: Limits, best: Best | None = None) -> None:
        from nettrim.core.solvers.kernels import Models

        p = scaled.problem
        self.scaled, self.limits, self.best = scaled, limits, best or Best(p)
        self.target = p.tightened(self.margin)
        self.power, self.solved = 2.0, (0.0, 0.0)
        assert p.active is not None and p.penalty is not None
        self.x, self.anchor = p.inputs, p.anchor.T.contiguous()
        self.penalty = p.penalty.to(p.inputs.dtype).contiguous()
        self.on, linear = p.active.T.contiguous(), p.form == "linear"
        # R = max(Z − T, floor): −∞ on the active set, 0 off it
        self.floor = None if linear else torch.where(self.on, -torch.inf, 0.0).to(self.x)
        self.models = Models(self.x, self.penalty, None if linear else self.on)

    @property
    def margin(self) -> float:
        """The fraction by which a smaller radius is aimed at."""
        return 0.1 * self.limits.tol

    @property
    def done(self) -> bool:
        """Whether the certificate holds."""
        return self.best.gap <= 0.9 * self.limits.tol

    def begin(self, weight: Tensor, lam: Tensor, gamma: Tensor | None = None) -> None:
        """Start at a weight ``(M, N)`` and every neuron's ``λ (M,)``, both scaled; `gamma` is for hard ceilings."""
        self.u, self.lam = weight.to(self.x).contiguous(), lam.to(self.x)
        self.z = self.u @ self.x.T
        self.r = self._residual(self.z)
        self.v = torch.zeros_like(self.u)

    def begin_at(self, weight: Tensor, gamma: Tensor) -> None:
        """Start at a nearby problem's weight ``(N, M)`` and multipliers ``(P, M)``, scaled; ``λ`` is ``‖Γ‖/‖R‖``."""
        p = self.scaled.problem
        lam = torch.full((p.n_outputs,), p.lam or 1.0, dtype=torch.float64)
        if p.lam is None:
            assert p.active is not None
            residual = p.residual(p.inputs @ weight.to(p.inputs))
            if p.form == "halfspace":
                residual, gamma_on = torch.where(p.active, residual, 0.0), torch.where(p.active, gamma, 0.0)
            else:
                gamma_on = gamma
            dims = 0 if p.per_neuron else None
            distance = torch.linalg.vector_norm(residual.double(), dim=dims)
            lam = lam * torch.linalg.vector_norm(gamma_on.double(), dim=dims) / distance.clamp(min=1e-30)
        self.begin(weight.T, lam, gamma)

    def resume(self, problem: LayerProblem, limits: Limits) -> None:
        """Go on to the same problem at another radius, with a guess of its ``λ ∝ r^−power`` [measured: about 2]."""
        before, self.limits = self.scaled.problem, limits
        self.scaled.change_radius(problem)
        p = self.scaled.problem
        self.best, self.target = Best(p), p.tightened(self.margin)
        if p.radius is not None and before.radius is not None:
            ratio = torch.as_tensor(before.radius / p.radius)
            here = float(torch.as_tensor(before.radius).double().norm()), float(self.lam.double().mean())
            if 0 < self.solved[0] != here[0] > 0:
                power = math.log(here[1] / self.solved[1]) / math.log(self.solved[0] / here[0])
                self.power = min(3.0, max(1.0, power))
            self.solved = here
            lam = self.lam * torch.where(ratio > 0, ratio, 1.0).to(self.lam) ** self.power
            # along the path as far as the support stays; what would change its sign stops at zero
            u = self.u - (1 / lam - 1 / self.lam)[:, None] * self.v
            self.begin(torch.where(u * self.u < 0, 0.0, u), lam)

    def make(self, steps: int) -> int:
        """Make up to `steps` steps, as long as they get anywhere, and return how many were made."""
        if not 0 < float(self.lam.max()) < torch.inf:
            return 0  # nothing presses against the fit yet
        # a neuron without multipliers (a dead one) takes a λ like the others'
        self.lam = torch.where(self.lam > 0, self.lam, self.lam.max())
        g = self.r @ self.x
        made, lacking = 0, [float("inf")] * 4
        # what is lacking halves at least in three steps, or another start is needed
        while made < steps and (made < 4 or lacking[-1] < 0.5 * lacking[-4]) and not self.limits.out_of_time():
            made += 1
            model = self.models.directions(self.r, self.u, g, self.lam, self.limits)
            self.v = model[1]
            self.lam, d = _meet_radius(self.target, self.lam, self.r, model)
            if not bool(torch.isfinite(d).all()):
                break
            self._line_search(d, d @ self.x.T)
            g = self.r @ self.x
            self._offer(g)
            lacking.append(max(abs(self.best.last_gap), self.best.last_violation))
            if self.done:
                break
        return made

    def _offer(self, g: Tensor) -> None:
        """Offer the weight and its residual's multipliers, ``Γ = −λR``, whose products are all at hand."""
        p, r = self.scaled.problem, self.r
        norms = torch.linalg.vector_norm(r, dim=1).double()
        distance = float(norms.norm())
        violation = radius_violation(p, norms, distance)
        self._keep(self.u, violation, distance, r, g)

    def _keep(self, u: Tensor, violation: float, distance: float, pulls: Tensor, g: Tensor) -> None:
        """Offer a weight, and the multipliers ``−λ pulls`` with their products, ``g = pulls X``."""
        p, lam = self.scaled.problem, self.lam
        if bool((self.penalty == 0).any()):
            # free columns are to be centred first
            dual = feasible_multipliers(p, pulls.T * -lam, pulls.dtype)
            self.best.keep(u.T, violation, distance, lambda: dual.multipliers, dual.bound)
            return
        counted = torch.where(self.on, pulls, 0.0) if p.form == "halfspace" else pulls
        square = counted.square().sum(1) * lam**2
        linear = -lam * (pulls * p.anchor.T).sum(1)
        scale, bound = best_bound(p, -(lam[:, None] * g).T, linear, square)
        self.best.keep(u.T, violation, distance, lambda: pulls.T * (-lam * scale), bound)

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


def radius_violation(problem: LayerProblem, norms: Tensor, distance: float) -> float:
    """Return by how much residual norms ``(M,)`` exceed the radius, relative to it."""
    if isinstance(problem.radius, Tensor):
        size = torch.where(problem.radius > 0, problem.radius, problem.radius.mean())
        return max(0.0, float(((norms - problem.radius) / size).max()))
    return 0.0 if problem.radius is None else max(0.0, (distance - problem.radius) / problem.radius)
