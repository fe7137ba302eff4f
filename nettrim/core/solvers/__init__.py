"""The table of solvers, and the one loop around them: choose, run, certify, judge."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim.core.certificate import certificate_of, feasible_multipliers, measure_fit
from nettrim.core.problem import LayerProblem, build_problem, check_amount
from nettrim.core.solution import FEASIBLE, LayerSolution, SolveStats, Status, judge
from nettrim.core.solvers.admm import Admm
from nettrim.core.solvers.auto import Auto
from nettrim.core.solvers.base import Limits, Solver, Start, zero_answer, zero_fits
from nettrim.core.solvers.conic import Clarabel, Osqp, Scs
from nettrim.core.solvers.newton import Newton
from nettrim.core.solvers.radius import Radius
from nettrim.errors import ProblemError, SolverError, UnknownNameError, UnsupportedError

_ZERO = "The zero weight is feasible, so it is the answer: the radius is at least the norm of the active targets."

#: name -> factory of the solver with its default settings
SOLVERS: dict[str, Callable[[], Solver]] = {
    "auto": Auto,
    "admm": Admm,
    "newton": Newton,
    "scs": Scs,
    "clarabel": Clarabel,
    "osqp": lambda: Radius(Osqp()),
}


def make_solver(solver: str | Solver) -> Solver:
    """Return the solver of that name, or the object itself.

    Raises
    ------
    UnknownNameError
        The name is not in `SOLVERS`.
    ProblemError
        The object is no solver: a class that is still to be called, None, or anything without `run` and `refuses`.
    """
    if not isinstance(solver, str):
        complete = all(callable(getattr(solver, name, None)) for name in ("refuses", "run"))
        if isinstance(solver, type) or not complete:
            found = f"the class {solver.__name__}" if isinstance(solver, type) else f"a {type(solver).__name__}"
            raise ProblemError(
                f"solver is {found}, and no solver object: use one of {', '.join(SOLVERS)}, or an object such as "
                "Admm()."
            )
        return solver
    if solver not in SOLVERS:
        raise UnknownNameError(f"solver={solver!r} is unknown: use one of {', '.join(SOLVERS)}, or a solver object.")
    return SOLVERS[solver]()


def check_limits(tol: float, max_seconds: float | None, on_failure: str) -> None:
    """Refuse a tolerance or a time that is not positive, and an unknown way to fail.

    Raises
    ------
    ProblemError
    """
    check_amount("tol", tol)
    if max_seconds is not None:
        check_amount("max_seconds", max_seconds)
    if on_failure not in ("raise", "warn", "return"):
        raise ProblemError(f"on_failure={on_failure!r} is unknown: use raise, warn or return.")


def solve_problem(
    problem: LayerProblem,
    solver: str | Solver = "auto",
    *,
    tol: float = 1e-3,
    max_seconds: float | None = None,
    on_failure: str = "raise",
    start: Start | None = None,
    round_to: torch.dtype | None = None,
) -> LayerSolution:
    """Solve one layer's problem and certify the answer.

    Parameters
    ----------
    problem : LayerProblem
    solver : str or Solver
        A name in `SOLVERS`, or an object such as ``Admm(max_iter=10_000)``.
    tol : float
        The relative duality gap that counts as solved.
    max_seconds : float, optional
        Wall-clock limit; what was reached by then is judged like any answer.
    on_failure : {"raise", "warn", "return"}
        What to do where the certificate does not say SOLVED.
    start : Start, optional
        Where to start from.
    round_to : torch.dtype, optional
        Round the weight to this dtype before it is certified, because it will be stored in it.

    Returns
    -------
    LayerSolution
        Its weight is a torch tensor in the dtype of the problem, its multipliers are float64.

    Raises
    ------
    SolverError
        With ``on_failure="raise"``, where the answer is not certified; the error's `solution` holds it.
    UnsupportedError
        The solver does not take such a problem; the text says what does.
    """
    check_limits(tol, max_seconds, on_failure)
    return _solve(problem, make_solver(solver), float(tol), max_seconds, on_failure, start, round_to)[0]


def _solve(
    problem: LayerProblem,
    chosen: Solver,
    tol: float,
    max_seconds: float | None,
    on_failure: str,
    start: Start | None,
    round_to: torch.dtype | None,
) -> tuple[LayerSolution, object]:
    """Do what `solve_problem` says, and return what the solver can go on from as well."""
    label = repr(chosen)
    if isinstance(chosen, Auto):
        chosen, reason = chosen.choose(problem)
        label = f"auto: {chosen!r}, {reason}"
    refusal = chosen.refuses(problem)
    if refusal is not None:
        raise UnsupportedError(refusal)
    began = time.monotonic()
    if zero_fits(problem):
        answer = zero_answer(problem, Status.MAX_ITER, _ZERO)
    else:
        deadline = None if max_seconds is None else began + max_seconds
        answer = chosen.run(problem, Limits(tol, deadline), start)
    # rounded first: what is certified is what is returned, and what will be stored
    weight = answer.weight.to(problem.inputs.dtype if round_to is None else round_to).to(problem.inputs)
    fit = measure_fit(problem, weight)
    # multipliers stay float64: rounded, they would break |XᵀΓ| ≤ c where columns differ much in size
    dual = feasible_multipliers(problem, -fit.residual if answer.multipliers is None else answer.multipliers)
    multipliers, certificate = dual.multipliers, certificate_of(problem, weight, fit, dual)
    status = judge(certificate, tol, answer.otherwise)
    if status is Status.NOT_FEASIBLE and _beyond_reach(problem):
        status = Status.INFEASIBLE
    stats = SolveStats(
        solver=label,
        seconds=time.monotonic() - began,
        iterations=answer.iterations,
        dtype=str(answer.dtype).removeprefix("torch."),
        device=str(problem.inputs.device),
        damping=answer.damping,
        note=" ".join(filter(None, (answer.note, certificate.note))),
    )
    solution = LayerSolution(weight, multipliers, certificate, status, stats, problem)
    if status is not Status.SOLVED and on_failure != "return":
        message = (
            f"{status.name}: gap {certificate.gap:.2e} (tol {tol:.0e}), violation {certificate.violation:.2e} "
            f"(allowed {FEASIBLE:.0e}) after {answer.iterations} iterations. {status.remedy}"
        )
        if on_failure == "raise":
            raise SolverError(message, solution)
        warnings.warn(message, stacklevel=3)
    return solution, answer.carry


def _beyond_reach(problem: LayerProblem) -> bool:
    """Whether the least-squares residual of a linear layer already exceeds the radius."""
    if problem.form != "linear" or problem.radius is None:
        return False
    x, y = problem.inputs.double(), problem.targets.double()
    best = torch.linalg.lstsq(x, y, driver="gelsd" if x.device.type == "cpu" else None).solution
    distance = torch.linalg.vector_norm(x @ best - y, dim=0 if problem.per_neuron else None)
    return bool((distance > torch.as_tensor(problem.radius, dtype=torch.float64) * (1 + FEASIBLE)).any())


def solve_layer(
    inputs: Any,
    targets: Any,
    *,
    epsilon: float | None = None,
    radius: float | Tensor | None = None,
    lam: float | None = None,
    form: str = "ball",
    ceiling: Any = None,
    penalty: Any = None,
    per_neuron: bool = False,
    solver: str | Solver = "auto",
    tol: float = 1e-3,
    max_seconds: float | None = None,
    on_failure: str = "raise",
) -> LayerSolution:
    """Find the weight of smallest ``ℓ1`` norm that reproduces a layer, with the evidence.

    Parameters
    ----------
    inputs : Tensor or ndarray (P, N)
        float32 or float64, one sample a row. Append a column of ones to fit a bias.
    targets : Tensor or ndarray (P, M)
        The dense layer's outputs: after the ReLU for ``ball`` and ``halfspace``, raw for ``linear``.
    epsilon : float > 0
        Relative radius ``r / ‖Y‖_F``. Exactly one of `epsilon`, `radius`, `lam`.
    radius : float > 0, or Tensor, ndarray or list (M,)
        Absolute radius, in the units of `targets`.
    lam : float > 0
        ``λ`` of the regularised twin ``min Σ c|U| + (λ/2) dist²``.
    form, ceiling, penalty
        As in `LayerProblem`.
    per_neuron : bool
        One ball per output neuron instead of a joint one; `epsilon` is then relative to each neuron's targets.
    solver, tol, max_seconds, on_failure
        As in `solve_problem`.

    Returns
    -------
    LayerSolution
        `weight (M, N)` is of the kind (torch or NumPy) and dtype of `inputs`, `multipliers (P, M)` is float64.

    Raises
    ------
    ProblemError, UnsupportedError, UnknownNameError
        Before any work.
    SolverError
        The answer is not certified (`on_failure="raise"`).

    Examples
    --------
    >>> import torch, nettrim
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> solution = nettrim.solve_layer(x, torch.tensor([[3.0], [4.0], [0.0]], dtype=torch.float64), epsilon=0.2)
    >>> solution.status.name, round(float(solution.certificate.objective), 2)
    ('SOLVED', 5.59)
    """
    problem = build_problem(
        inputs,
        targets,
        epsilon=epsilon,
        radius=radius,
        lam=lam,
        form=form,
        ceiling=ceiling,
        penalty=penalty,
        per_neuron=per_neuron,
    )
    with _failing_as_given(inputs):
        solution = solve_problem(problem, solver, tol=tol, max_seconds=max_seconds, on_failure=on_failure)
    return _as_given(solution, inputs)


def solve_path(
    inputs: Any,
    targets: Any,
    epsilons: Iterable[float],
    *,
    form: str = "ball",
    ceiling: Any = None,
    penalty: Any = None,
    per_neuron: bool = False,
    solver: str | Solver = "auto",
    tol: float = 1e-3,
    max_seconds: float | None = None,
    on_failure: str = "raise",
) -> list[LayerSolution]:
    """Solve for several relative radii, from sparse (largest) to dense, each from the one before.

    Parameters are those of `solve_layer`; `max_seconds` is for each radius. `epsilons` is any iterable of numbers, and
    the solutions come back in its order.
    """
    radii, chosen = _relative_radii(epsilons), make_solver(solver)
    check_limits(tol, max_seconds, on_failure)
    order = sorted(range(len(radii)), key=lambda i: -radii[i])
    found: dict[int, LayerSolution] = {}
    base = build_problem(
        inputs, targets, epsilon=1.0, form=form, ceiling=ceiling, penalty=penalty, per_neuron=per_neuron
    )
    assert base.radius is not None
    start: Start | None = None
    for i in order:
        problem = base.with_radius(base.radius * radii[i])
        with _failing_as_given(inputs):
            solution, carry = _solve(problem, chosen, float(tol), max_seconds, on_failure, start, None)
        if bool(solution.multipliers.any()):
            start = Start(solution.weight, solution.multipliers, carry)
        found[i] = _as_given(solution, inputs)
    return [found[i] for i in range(len(radii))]


def _relative_radii(epsilons: Any) -> list[float]:
    """Read the radii of a path, once: a generator has no second reading."""
    try:
        iterator = iter(epsilons)
    except TypeError as error:
        raise ProblemError(f"epsilons={epsilons!r} is no list: pass several numbers, as in [0.1, 0.2].") from error
    radii = [check_amount("epsilons", epsilon) for epsilon in iterator]
    if not radii:
        raise ProblemError("epsilons is empty: give at least one relative radius.")
    return radii


@contextmanager
def _failing_as_given(inputs: Any) -> Iterator[None]:
    """Hand the solution of a `SolverError` over in the kind of array that a returned one has."""
    try:
        yield
    except SolverError as error:
        if isinstance(error.solution, LayerSolution):
            error.solution = _as_given(error.solution, inputs)
        raise


def _as_given(solution: LayerSolution, inputs: Any) -> LayerSolution:
    """Return the solution with NumPy arrays where the user came with NumPy arrays."""
    if not isinstance(inputs, np.ndarray):
        return solution
    return replace(solution, weight=solution.weight.cpu().numpy(), multipliers=solution.multipliers.cpu().numpy())


__all__ = [
    "SOLVERS",
    "Admm",
    "Auto",
    "Clarabel",
    "Newton",
    "Osqp",
    "Radius",
    "Scs",
    "Solver",
    "Start",
    "check_limits",
    "make_solver",
    "solve_layer",
    "solve_path",
    "solve_problem",
]
