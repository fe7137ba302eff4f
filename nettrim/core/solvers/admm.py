"""ADMM, the method of the Net-Trim papers, in a form that reaches a certified gap.

The splitting is the papers': ``W₁ = X Uᵀ`` meets the fit, ``W₂ = U`` is sparse, and one factorisation of
``a XᵀX + b I`` serves every iteration until ``b/a`` changes. What differs from them, and why:

* inputs, targets and penalty are scaled first, so that the same settings serve any units;
* the two penalties ``a`` (fit) and ``b`` (sparsity) are separate. ``a`` is a multiple of ``‖Γ‖/‖Y‖``, estimated on the
  way: less of it where the bound lags, more where feasibility does. (A fixed fraction of ``λ = ‖Γ‖/r`` serves wide
  balls only: at ``r = 10⁻³ ‖Y‖`` it never certified.) ``b`` is balanced by its residuals [Boyd et al. 2011, §3.4.1];
* over-relaxation by 1.8 [Boyd et al. 2011, §3.4.3];
* it aims at a radius a hair smaller, and the sparse iterate is made feasible before it is judged (`Repair`): scaled up
  onto the radius, which costs no more than the multipliers say, and lowered under the ceiling;
* it stops on the certificate (evaluated in the working dtype), on `max_iter`, on the clock, or where numbers overflow.

An iteration costs one GEMM pair, ``2 N² M`` flops more, and some passes over ``(P, M)`` arrays, of which six are held.
Nothing in it waits for a GPU; evaluations of the certificate do.

Tried and left out, on LeNet's fc2: Anderson acceleration (memory 5) saved 0 to 25 % of the iterations, for a dozen more
``(P, M)`` arrays. As multipliers, averages over iterations and the residual of the repaired weight were worse than the
step's, the best of each neuron's history no better; two steps of conjugate gradients on what ``XᵀΓ`` exceeds halved the
gap of the bound at best. Extrapolating each neuron's multipliers lowered it three- to fivefold near the end where six
were tried with products of their own; with the products that are free (``XᵀΓ = −b D₂``) it saved nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.core.linalg import RidgeInverse
from nettrim.core.problem import LayerProblem, check_amount, check_count
from nettrim.core.solution import Status
from nettrim.core.solvers.base import Limits, RawAnswer, Start, hair
from nettrim.core.solvers.best import Best
from nettrim.core.solvers.fused import Stages, check_memory, full_precision
from nettrim.core.solvers.scaling import Scaled, relative_radius
from nettrim.errors import ProblemError

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Admm:
    """ADMM on the layer program: all forms, joint or per-neuron balls, CPU or CUDA (where the tensors are).

    Parameters
    ----------
    max_iter : int
        Iterations at the most.
    relaxation : float in [1, 2)
        Over-relaxation.
    ratio : float > 0
        The first penalty of the fit, in units of ``‖Γ‖/‖Y‖``, the multipliers per unit of the targets.
    dtype : {"auto", "float32", "float64"}
        What the iterations run in. "auto" takes float32 for large problems whose radius and tolerance it resolves.
    check_every : int
        Iterations between two evaluations of the certificate, each about one GEMM pair.
    """

    max_iter: int = 20_000
    relaxation: float = 1.8
    ratio: float = 2.0
    dtype: str = "auto"
    check_every: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that make no iteration."""
        # stored as plain numbers: a run directory keeps the settings as text, and 1e4 iterations are 10000
        for name, check in (
            ("max_iter", check_count),
            ("check_every", check_count),
            ("relaxation", check_amount),
            ("ratio", check_amount),
        ):
            object.__setattr__(self, name, check(f"Admm's {name}", getattr(self, name)))
        if not 1 <= self.relaxation < 2:
            raise ProblemError(f"Admm's relaxation={self.relaxation:g} is out of range: it lies in [1, 2).")
        if not isinstance(self.dtype, str) or self.dtype not in ("auto", *_DTYPES):
            raise ProblemError(f"Admm's dtype={self.dtype!r} is unknown: use auto, float32 or float64.")

    def refuses(self, problem: LayerProblem) -> str | None:
        """Take every problem."""
        return None

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Iterate until the certificate holds, or the iterations or the clock run out.

        Raises
        ------
        UnsupportedError
            The GPU has not the memory.
        """
        check_memory(problem, self.working_dtype(problem, limits.tol))
        iteration = Iteration(problem, self, limits, start)
        iteration.until(self.max_iter)
        return iteration.answer()

    def working_dtype(self, problem: LayerProblem, tol: float) -> torch.dtype:
        """Return what the iterations run in."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        large = problem.samples * problem.n_inputs * problem.n_outputs >= 2e7
        # a hard ceiling is met to 1e-6 of the largest target, and a tiny radius to 1e-6 of itself: float32 has
        # 1e-7 in all. At a gap of 1e-4 it was seen to stall, a margin of a fifth of that above the radius
        coarse = tol >= 5e-4 and problem.form != "halfspace" and relative_radius(problem) >= 1e-2
        return torch.float32 if large and coarse else torch.float64


class Iteration:
    """A run that can be continued: the variables, the best answer so far, and when the penalties are adapted."""

    def __init__(self, problem: LayerProblem, settings: Admm, limits: Limits, start: Start | None) -> None:
        self.settings, self.limits = settings, limits
        self.scaled = Scaled(problem, settings.working_dtype(problem, limits.tol))
        margin = hair(problem, limits.tol)
        self.variables = _Variables(self.scaled, settings, margin)
        self.variables.begin(start)
        self.best = Best(self.scaled.problem, margin, self.variables.anchor, self.variables.floor)
        self.steps, self._balance_at = 0, 10
        self.otherwise = Status.MAX_ITER

    @property
    def done(self) -> bool:
        """Whether the certificate holds, the clock has run out, or the numbers have overflown."""
        return self.best.gap <= 0.9 * self.limits.tol or self.otherwise is Status.TIME_LIMIT or self.best.broken

    def until(self, last: int) -> None:
        """Go on to step number `last`, or until done."""
        with full_precision(self.scaled.problem.inputs.device):
            self._until(last)

    def _until(self, last: int) -> None:
        every, variables = self.settings.check_every, self.variables
        while self.steps < last and not self.done:
            self.steps += 1
            variables.advance()
            due = False
            if self.steps % every == 0 or self.steps == last:
                self.best.consider(variables.sparse, -variables.step)
                if self.limits.out_of_time():
                    self.otherwise = Status.TIME_LIMIT
                # later changes are rarer, so that the iteration settles
                if self.steps <= 20 * every or self.steps % (10 * every) == 0:
                    due = variables.adapt_ratio(self.best, self.limits.tol)
            if self.steps == self._balance_at:
                self._balance_at *= 2
                variables.balance_sparsity()
                due = True
            if due and not self.done:
                variables.refactor()

    def answer(self, note: str = "") -> RawAnswer:
        """Return the best answer in the units of the problem."""
        weight, multipliers = self.scaled.back(self.best.weight, self.best.multipliers)
        dtype, damping = self.scaled.problem.inputs.dtype, self.variables.inverse.damping
        note = " ".join(filter(None, (note, self.variables.stages.note)))
        return RawAnswer(weight, multipliers, self.steps, self.otherwise, dtype, damping, note)


class _Variables:
    """The variables of the iteration, in the scaled problem: ``U`` and ``W₂`` are ``(N, M)``, the rest ``(P, M)``."""

    def __init__(self, scaled: Scaled, settings: Admm, margin: float) -> None:
        self.scaled, self.problem, self.settings = scaled, scaled.problem, settings
        p = self.problem
        self.target = p.tightened(margin)
        self.anchor = p.anchor
        self.penalty = p.penalty.T.to(p.inputs.dtype)  # type: ignore[union-attr]
        # R = max(Z − T, floor): −∞ on the active set, 0 off it
        assert p.active is not None
        self.floor = None
        if p.form != "linear":
            zero = torch.zeros((), dtype=p.inputs.dtype, device=p.inputs.device)
            self.floor = torch.where(p.active, zero - torch.inf, zero)
        self.ratio = settings.ratio
        # with balls of their own, or with lam, the neurons are independent: each has an `a`, and they share b/a
        self.axis = 0 if p.per_neuron or p.lam is not None else None
        self.size = self._norm(self.anchor).clamp(min=1e-30)
        self.inverse = RidgeInverse(p.inputs)
        self.a = torch.ones_like(self.size)
        self.beta = 0.3 * (self.inverse.mean_diagonal or 1.0)
        self.stages = Stages(p.inputs.device)
        self.hard = p.active if p.form == "halfspace" else None
        self.radius = None
        if self.target.radius is not None:
            self.radius = torch.as_tensor(self.target.radius).to(p.inputs)

    def begin(self, start: Start | None) -> None:
        """Set the variables: to zero, or so that `start` is a fixed point where it is optimal."""
        p = self.problem
        new = p.inputs.new_zeros
        self.u, self.u_dual = new(p.n_inputs, p.n_outputs), new(p.n_inputs, p.n_outputs)
        self.z, self.z_dual = new(p.samples, p.n_outputs), new(p.samples, p.n_outputs)
        self.w2, self.step = self.u, torch.zeros_like(self.z)
        self.u_before = self.u
        gamma = None
        if start is not None:
            self.u, gamma = self.scaled.into(start)
            self.z = p.inputs @ self.u
        # without multipliers the residual is guessed to be the radius, or a tenth of the targets
        epsilon = 0.1 if p.radius is None else relative_radius(p)
        self.a = min(1.0, self.ratio * epsilon) * self._first_lam()
        if gamma is not None:
            wanted = self._wanted(gamma)
            self.a = torch.where(wanted > 0, wanted, self.a)
            self.z_dual = gamma / self.a
            self.u_dual = -(p.inputs.T @ gamma) / (self.beta * self.a)
        self.inverse.update(1.0, self.beta)

    def advance(self) -> None:
        """Make one iteration, without a word from the device: the next may be queued before this one is done."""
        p, alpha = self.problem, self.settings.relaxation
        self.u_before = self.u
        shrink = None if p.lam is None else p.lam / (p.lam + self.a)
        self.stages.fit(self.z, self.z_dual, self.step, self.anchor, self.floor, self.hard, self.radius, shrink, alpha)
        self.w2, t2 = self.stages.sparse(self.u, self.u_dual, self.penalty / (self.beta * self.a), alpha)
        self.u = self.inverse.apply((p.inputs.T @ self.z).add_(t2, alpha=self.beta))
        self.u_dual = t2.sub_(self.u)
        # Z goes where its dual was, and T₁ − Z where Z was
        self.z, self.z_dual = torch.mm(p.inputs, self.u, out=self.z_dual), self.z
        self.z_dual.sub_(self.z)

    @property
    def sparse(self) -> Tensor:
        """The sparse copy ``W₂ (N, M)``."""
        return self.w2

    def adapt_ratio(self, best: Best, tol: float) -> bool:
        """Move the fit's penalty towards what lags, the bound or the feasibility; say whether anything changed."""
        if self.problem.lam is None:
            # the objective, once repaired, is far ahead of the bound, so the gap is the bound's lag
            if best.last_violation < 0.1 * best.last_gap and best.last_gap > tol:
                self.ratio = max(0.05, self.ratio / 1.5)
            elif best.last_violation * self._price(best) > 0.5 * abs(best.last_gap):
                self.ratio = min(100.0, self.ratio * 1.5)
            self._follow()
        return self.problem.lam is None

    def _price(self, best: Best) -> float:
        """What a relative violation costs: the root of ``r ‖Γ‖ / objective``, 1 at the most.

        To first order the objective falls by ``‖Γ‖ dr``. Without this, the first violations of a narrow ball, a
        thousandfold of ``r``, drive ``a`` out of all proportion; the root was measured quicker than the cost itself.
        """
        p = self.target
        if p.form == "halfspace" or best.last_objective <= 0:
            return 1.0
        assert p.radius is not None
        gamma = self._norm(self.step) * self.a
        cost = float((gamma * torch.as_tensor(p.radius).to(gamma)).sum())
        return math.sqrt(min(1.0, cost / best.last_objective))

    def balance_sparsity(self) -> None:
        """Balance ``b = βa`` by its primal and dual residual, and follow the multipliers with ``a``."""
        primal = float(torch.linalg.vector_norm(self.w2 - self.u))
        dual = float(torch.linalg.vector_norm(self.u - self.u_before))
        if primal > 0 and dual > 0:
            factor = min(5.0, max(0.2, (primal / dual) ** 0.5))
            self.beta *= factor
            self.u_dual /= factor
        self._follow()

    def refactor(self) -> None:
        """Factorise for the present ``β``."""
        self.inverse.update(1.0, self.beta)

    def _follow(self) -> None:
        """Move ``a`` to where the present multipliers want it, by a factor of 5 at the most; ``b`` stays (nearly)."""
        wanted = self._wanted(self.step * self.a)
        wanted = torch.where(wanted > 0, wanted, self.a).clamp(self.a / 5, self.a * 5)
        change = self.a / wanted
        common = float(change.median())
        self.z_dual *= change
        self.u_dual *= change / common
        self.beta *= common
        self.a = wanted

    def _wanted(self, gamma: Tensor) -> Tensor:
        """``a = min(λ, ratio · ‖Γ‖/‖T‖)``: ``Γ`` per unit of the targets, and no stiffer than the squared distance."""
        wanted = self.ratio * self._norm(gamma) / self.size
        if self.problem.form == "halfspace":
            return wanted  # most of Γ belongs to the ceiling there, of which λ says nothing
        return torch.minimum(wanted, self._lam(gamma))

    def _norm(self, of: Tensor) -> Tensor:
        """The Frobenius norm, or each neuron's own where the neurons are independent."""
        norm: Tensor = torch.linalg.vector_norm(of, dim=self.axis)
        return norm

    def lam(self) -> Tensor:
        """Return the present ``λ`` of every neuron, ``(M,)``; the same for all where they share a ball."""
        return self._lam(self.step * self.a).expand(self.problem.n_outputs).contiguous()

    def _lam(self, gamma: Tensor) -> Tensor:
        """``λ``, the multiplier of half the squared distance: given, or ``‖Γ‖/r``."""
        p = self.target
        if p.lam is not None:
            return torch.full_like(self.size, p.lam)
        assert p.radius is not None
        return self._norm(gamma) / torch.as_tensor(p.radius).to(gamma).clamp(min=1e-30)

    def _first_lam(self) -> Tensor:
        """Guess ``λ``: where a (the median) neuron leaves zero, over ``ε²`` (measured: nearly ``λ ∝ ε⁻²``)."""
        p = self.problem
        if p.lam is not None:
            return torch.full_like(self.size, p.lam)
        pull = (p.inputs.T @ self.anchor).abs()
        leaves = torch.where((pull > 0) & (self.penalty > 0), self.penalty / pull, torch.inf).amin(0)
        finite = torch.isfinite(leaves)
        typical = leaves[finite].median() if bool(finite.any()) else leaves.new_ones(())
        epsilon = min(1.0, max(1e-4, relative_radius(p)))
        return (typical if self.axis is None else torch.where(finite, leaves, typical)) / epsilon**2
