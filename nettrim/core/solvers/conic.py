"""General conic solvers through cvxpy: slow, exact, and written by others, hence the reference for our own solvers.

============  ==============================================================================================
`Clarabel`    interior-point method on the homogeneous embedding [Goulart, Chen 2024, arXiv:2405.12762]
`Scs`         operator splitting on the homogeneous self-dual embedding [O'Donoghue et al. 2016,
              J. Optim. Theory Appl. 169; quadratic objectives: O'Donoghue 2021, SIAM J. Optim. 31]
`Osqp`        operator splitting for quadratic programs [Stellato et al. 2020, Math. Prog. Comp. 12]
============  ==============================================================================================

All three are fed by one model. With ``V = Uᵀ``, a residual ``R``, a slack ``S ≥ 0`` and the 0/1 masks ``on`` and
``off`` of the active set::

    minimise    Σ |c ∘ V| + Σ on ∘ S  (+ (λ/2) ‖R‖²)
    subject to  X V + off ∘ S − R = T                   (``on ∘ R`` for halfspace; no ``S`` for linear)
                ‖R‖ ≤ r                                 (unless there is λ)

Minus the dual of the equality is ``Γ``: stationarity in ``V`` is ``|XᵀΓ| ≤ c``, in ``S`` it is ``Γ ≤ 0`` off the
active set. ``on ∘ S`` in the objective and ``c`` inside the absolute value leave no variable free to run away,
which an interior-point method would follow.

Where the neurons are independent (``lam``, or a ball each), they are solved one after the other. Models are built
once per shape and then fed numbers. Not those of large problems, though: building a parametrised model takes memory
in proportion to variables times parameters, so there the numbers are constants of a model that is built for them.
"""

from __future__ import annotations

import threading
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nettrim.core.certificate import measure_fit
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import FEASIBLE, Status
from nettrim.core.solvers.base import (
    Limits,
    RawAnswer,
    Start,
    hair,
    join_neurons,
    one_neuron,
    zero_answer,
    zero_fits,
)
from nettrim.errors import ProblemError

Array = NDArray[np.float64]

# nonzeros of one model; measured: 8e6 build in 5 s and 1.2 GB, and Clarabel solves them in two minutes
_MAX_ENTRIES = 20_000_000
# variables × parameters of a model that is kept: 8 bytes each, three times, while it is built
_MAX_SHARED = 20_000_000
# a penalised weight below the first fraction of its neuron's largest is noise
_NOISE = 1e-8
# and below the first fraction of that or (where the whole neuron is noise) the second of the layer's unit, if its
# multiplier stays under the penalty by the third, which that of a kept weight does not
_SMALL, _TINY, _SLACK = 1e-3, 1e-6, 1e-4


@dataclass(frozen=True)
class _Backend:
    """What differs between the solvers: cvxpy's name, its options, and the name of the one for the clock."""

    name: str
    options: dict[str, Any]
    clock: str


@dataclass(frozen=True)
class _Conic(ABC):
    """What the three solvers share: two settings and everything but the names of the options."""

    tol: float
    max_iter: int

    def __post_init__(self) -> None:
        """Refuse settings that stop nowhere."""
        if not (self.tol > 0 and self.max_iter >= 1):
            raise ProblemError(
                f"{type(self).__name__} needs tol > 0 and max_iter ≥ 1: {self.tol} and {self.max_iter} were given."
            )

    def refuses(self, problem: LayerProblem) -> str | None:
        """Refuse what is too large for a conic model."""
        entries = problem.samples * problem.n_inputs * (problem.n_outputs if _coupled(problem) else 1)
        if entries <= _MAX_ENTRIES:
            return None
        return (
            f"{type(self).__name__} would need a conic model of {entries:.2g} entries (samples × inputs"
            f"{' × outputs' if _coupled(problem) else ''}), more than {_MAX_ENTRIES:.0e}: use solver='admm'."
        )

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        """Solve, always from zero, so that an answer does not depend on what was solved before."""
        if problem.n_outputs > 1 and not _coupled(problem):
            neurons = (one_neuron(problem, m) for m in range(problem.n_outputs))
            return join_neurons([_run_one(self._backend(), neuron, limits) for neuron in neurons])
        return _run_one(self._backend(), one_neuron(problem, 0) if problem.per_neuron else problem, limits)

    @abstractmethod
    def _backend(self) -> _Backend:
        """Return the backend with this solver's settings."""


@dataclass(frozen=True)
class Clarabel(_Conic):
    """Clarabel, an interior-point method: all forms, radius or lam, in some 20 iterations of one factorisation each.

    Parameters
    ----------
    tol : float > 0
        Its feasibility and gap tolerances, absolute and relative, in scaled units.
    max_iter : int
        Iterations at the most, for each model.

    Raises
    ------
    ProblemError
        A tolerance or limit ≤ 0.
    """

    tol: float = 1e-11
    max_iter: int = 200

    def _backend(self) -> _Backend:
        options = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), self.tol)
        # where it stalls, its last iterate: the certificate judges it
        return _Backend("CLARABEL", {**options, "max_iter": self.max_iter, "accept_unknown": True}, "time_limit")


@dataclass(frozen=True)
class Scs(_Conic):
    """SCS, a first-order conic method: all forms, radius or lam.

    Parameters
    ----------
    tol : float > 0
        Its ``eps_abs`` and ``eps_rel``, in scaled units.
    max_iter : int
        Iterations at the most, for each model.

    Raises
    ------
    ProblemError
        A tolerance or limit ≤ 0.
    """

    tol: float = 1e-9
    max_iter: int = 100_000

    def _backend(self) -> _Backend:
        options = {"eps_abs": self.tol, "eps_rel": self.tol, "max_iters": self.max_iter}
        return _Backend("SCS", options, "time_limit_secs")


@dataclass(frozen=True)
class Osqp(_Conic):
    """OSQP, a first-order method for quadratic programs: problems with `lam` only. ``Radius(Osqp())`` takes a radius.

    Parameters
    ----------
    tol : float > 0
        Its ``eps_abs`` and ``eps_rel``, in scaled units. Its last step, polishing, mostly reaches rounding.
    max_iter : int
        Iterations at the most, for each model.

    Raises
    ------
    ProblemError
        A tolerance or limit ≤ 0.
    """

    tol: float = 1e-8
    max_iter: int = 100_000

    def refuses(self, problem: LayerProblem) -> str | None:
        """Refuse a radius, and what is too large."""
        if problem.lam is None:
            return (
                "Osqp solves quadratic programs, which a radius is not: give lam, or use Radius(Osqp()) "
                "(solver='osqp'), 'scs', 'clarabel' or 'admm'."
            )
        return super().refuses(problem)

    def _backend(self) -> _Backend:
        options = {"eps_abs": self.tol, "eps_rel": self.tol, "max_iter": self.max_iter, "polishing": True}
        # its default of 1e-4 calls an extreme λ unbounded, which an objective ≥ 0 never is
        options |= {"eps_prim_inf": 1e-9, "eps_dual_inf": 1e-15}
        # in these units a penalty of 1 is nearly right; adapted every 50 iterations, as by default, it went up and
        # down without end on 11 of 84 small problems
        options |= {"rho": 1.0, "adaptive_rho_interval": 2000}
        return _Backend("OSQP", options, "time_limit")


@dataclass(frozen=True, eq=False)
class _Numbers:
    """One problem in scaled units: float64, transposed to the model's ``(N, M)`` and ``(P, M)``."""

    inputs: Array
    anchor: Array
    on: Array
    off: Array
    penalty: Array
    amount: float


@dataclass(frozen=True, eq=False)
class _Found:
    """What the backend said: ``V (N, M)`` and ``Γ (P, M)``, None where it has none."""

    status: str
    weight: Array | None = None
    multipliers: Array | None = None
    iterations: int = 0


class _Model:
    """The cvxpy model of one shape and kind, with parameters (`data` absent) or for the numbers in `data`."""

    def __init__(self, shape: tuple[int, int, int], form: str, regularised: bool, data: _Numbers | None = None) -> None:
        import cvxpy as cp

        samples, n_inputs, n_outputs = shape
        self.fed: dict[str, Any] = {}

        def leaf(name: str, *size: int, nonneg: bool = True) -> Any:
            if data is not None:
                return cp.Constant(getattr(data, name))
            self.fed[name] = cp.Parameter(size, nonneg=nonneg)
            return self.fed[name]

        inputs = leaf("inputs", samples, n_inputs, nonneg=False)
        anchor = leaf("anchor", samples, n_outputs, nonneg=False)
        penalty = leaf("penalty", n_inputs, n_outputs)
        # a radius or lam changes while the rest stays
        self.fed["amount"] = amount = cp.Parameter(nonneg=True)
        self.weight = cp.Variable((n_inputs, n_outputs))
        residual = cp.Variable((samples, n_outputs))
        cost = cp.sum(cp.abs(cp.multiply(penalty, self.weight)))
        outputs, counted = inputs @ self.weight, residual
        if form != "linear":
            on, off = leaf("on", samples, n_outputs), leaf("off", samples, n_outputs)
            slack = cp.Variable((samples, n_outputs), nonneg=True)
            outputs = outputs + cp.multiply(off, slack)
            cost = cost + cp.sum(cp.multiply(on, slack))
            if form == "halfspace":
                counted = cp.multiply(on, residual)
        self.fit = outputs - counted == anchor
        constraints = [self.fit]
        if regularised:
            cost = cost + amount / 2 * cp.sum_squares(residual)
        else:
            constraints.append(cp.norm(cp.vec(residual, order="F")) <= amount)
        self.problem = cp.Problem(cp.Minimize(cost), constraints)
        self.lock = threading.Lock()

    def solve(self, numbers: _Numbers, backend: _Backend, deadline: float | None) -> _Found:
        """Feed the numbers, solve, and read the answer before anybody else feeds others."""
        with self.lock, warnings.catch_warnings():
            # an inaccurate answer is judged by its certificate like any other
            warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
            for name, parameter in self.fed.items():
                parameter.value = getattr(numbers, name)
            options = dict(backend.options)
            if deadline is not None:
                # compiles before the backend's own clock starts
                self.problem.get_problem_data(backend.name)
                # SCS takes 0 for no limit
                options[backend.clock] = max(deadline - time.monotonic(), 1e-3)
            self.problem.solve(solver=backend.name, warm_start=False, **options)
            weight, dual = self.weight.value, self.fit.dual_value
            stats = self.problem.solver_stats
            iterations = int(stats.num_iters or 0) if stats is not None else 0
            if weight is None or dual is None or not (np.isfinite(weight).all() and np.isfinite(dual).all()):
                return _Found(self.problem.status, iterations=iterations)
            # cvxpy's Lagrangian is f + ⟨dual, left − right⟩, ours f − ⟨Γ, left − right⟩
            return _Found(self.problem.status, weight.copy(), -dual, iterations)


@lru_cache(maxsize=16)
def _shared_model(backend: str, shape: tuple[int, int, int], form: str, regularised: bool) -> _Model:
    """Return the parametrised model of this shape and kind. One per backend: cvxpy compiles anew where that changes."""
    return _Model(shape, form, regularised)


def _model_for(backend: _Backend, problem: LayerProblem, numbers: _Numbers) -> _Model:
    samples, n_inputs, n_outputs = shape = (problem.samples, problem.n_inputs, problem.n_outputs)
    variables = (2 * samples + 2 * n_inputs) * n_outputs
    parameters = samples * n_inputs + (3 * samples + n_inputs) * n_outputs
    if variables * parameters <= _MAX_SHARED:
        return _shared_model(backend.name, shape, problem.form, problem.lam is not None)
    return _Model(shape, problem.form, problem.lam is not None, numbers)


class _Scaled:
    """Units in which columns and targets have root mean square one and the penalties are near one."""

    def __init__(self, problem: LayerProblem) -> None:
        x, anchor = _numpy(problem.inputs), _numpy(problem.anchor)
        norms = np.sqrt((x * x).mean(0))
        self.empty = norms == 0
        typical = float(np.median(norms[~self.empty])) if not self.empty.all() else 1.0
        self.columns = np.where(self.empty, typical, norms)
        self.size = float(np.sqrt((anchor * anchor).mean())) or 1.0
        penalty = _numpy(problem.penalty).T / self.columns[:, None]
        positive = penalty[penalty > 0]
        # half way between the usual and the largest, where they differ: a column 1e-6 times the others has a penalty
        # 1e6 times theirs, and the backends' tolerances are relative to the largest number that they see
        self.k = float(np.sqrt(np.median(positive) * positive.max())) if positive.size else 1.0
        on = _numpy(problem.active)
        if problem.lam is None:
            assert isinstance(problem.radius, float)
            amount = problem.radius / self.size
        else:
            amount = problem.lam * self.size / self.k
        self.numbers = _Numbers(x / self.columns, anchor / self.size, on, 1 - on, penalty / self.k, amount)

    def pruned(self, found: _Found, noise_only: bool) -> Array:
        """Return ``V`` with exact zeros where a zero came out as noise."""
        assert found.weight is not None
        assert found.multipliers is not None
        size = np.abs(found.weight)
        largest = size.max(axis=0)
        penalty = self.numbers.penalty
        zero = size <= _NOISE * largest
        if not noise_only:
            pull = np.abs(self.numbers.inputs.T @ found.multipliers)
            zero |= (size <= np.maximum(_SMALL * largest, _TINY)) & (pull < (1 - _SLACK) * penalty)
        # a free weight is never pruned, however small, except where it multiplies nothing
        return np.where((zero & (penalty > 0)) | self.empty[:, None], 0.0, found.weight)

    def back(self, weight: Array, multipliers: Array) -> tuple[Tensor, Tensor]:
        """Return ``U (M, N)`` and ``Γ (P, M)`` in the units of the problem."""
        u = (weight * self.size / self.columns[:, None]).T
        return torch.from_numpy(np.ascontiguousarray(u)), torch.from_numpy(multipliers * self.k)


def _run_one(backend: _Backend, problem: LayerProblem, limits: Limits) -> RawAnswer:
    """Solve one model, with a smaller radius again where the exactly sparse answer misses the first."""
    if zero_fits(problem):
        return zero_answer(problem, Status.MAX_ITER)
    if limits.out_of_time():
        return zero_answer(problem, Status.TIME_LIMIT)
    scaled = _Scaled(problem)
    margin = hair(problem, limits.tol)
    margins = [0.0] if problem.radius is None else [margin, 4 * margin, 16 * margin]
    best: tuple[float, RawAnswer] | None = None
    iterations = 0
    model: _Model | None = None
    for shrink in margins:
        numbers = replace(scaled.numbers, amount=scaled.numbers.amount * (1 - shrink))
        try:
            model = model or _model_for(backend, problem, numbers)
            found = model.solve(numbers, backend, limits.deadline)
        except Exception as error:  # cvxpy and the backends raise many kinds, and none says more than "no answer"
            found = _Found(f"{type(error).__name__}: {error}")
        iterations += found.iterations
        if found.weight is None:
            break
        for noise_only in (False, True):
            assert found.multipliers is not None
            weight, gamma = scaled.back(scaled.pruned(found, noise_only), found.multipliers)
            # as it will be returned, rounded to the dtype of the problem
            violation = measure_fit(problem, weight.to(problem.inputs)).violation
            if best is None or violation < best[0]:
                best = violation, _answer(problem, weight, gamma, found, limits)
            if violation <= 0.5 * FEASIBLE:
                break
        # what misses by much more than a margin is no matter of rounding
        if best is None or not 0.5 * FEASIBLE < best[0] <= 100 * margin or limits.out_of_time():
            break
    if best is None:
        return _failure(backend, problem, found, limits)
    return replace(best[1], iterations=iterations)


def _answer(problem: LayerProblem, weight: Tensor, gamma: Tensor, found: _Found, limits: Limits) -> RawAnswer:
    device = problem.inputs.device
    otherwise = Status.TIME_LIMIT if found.status == "user_limit" and limits.out_of_time() else Status.MAX_ITER
    return RawAnswer(weight.to(device), gamma.to(device), found.iterations, otherwise, torch.float64)


def _failure(backend: _Backend, problem: LayerProblem, found: _Found, limits: Limits) -> RawAnswer:
    # "infeasible_inaccurate" is a guess, no proof
    known = {"infeasible": Status.INFEASIBLE, "infeasible_inaccurate": Status.NOT_FEASIBLE}
    otherwise = Status.TIME_LIMIT if limits.out_of_time() else Status.BACKEND_FAILED
    status = known.get(found.status, otherwise)
    return zero_answer(problem, status, f"{backend.name} said: {found.status}.")


def _coupled(problem: LayerProblem) -> bool:
    return problem.lam is None and not problem.per_neuron


def _numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    array: Array = tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
    return array
