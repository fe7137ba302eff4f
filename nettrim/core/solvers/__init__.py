"""The table of solvers, and the one loop around them: choose, run, certify, judge."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

from nettrim.core.certificate import certificate_of, feasible_multipliers, measure_fit
from nettrim.core.problem import LayerProblem, check_amount
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
    return solve_from(problem, make_solver(solver), float(tol), max_seconds, on_failure, start, round_to)[0]


def solve_from(
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
    "solve_from",
    "solve_problem",
]
