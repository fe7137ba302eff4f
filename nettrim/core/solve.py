"""What a user calls for one layer: `solve_layer` and `solve_path`, arrays in, evidence out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from nettrim.core.problem import LayerProblem, build_problem, check_amount
from nettrim.core.refine import evidence_of, refine
from nettrim.core.solution import LayerSolution, Status, judge
from nettrim.core.solvers import Solver, Start, check_limits, make_solver, solve_from, solve_problem
from nettrim.core.support import kept_count
from nettrim.errors import ProblemError, SolverError

#: relative radii that are solved in turn until enough weights are left to choose from
_PATH = (0.3, 0.15, 0.07, 0.03)


def solve_layer(
    inputs: Any,
    targets: Any,
    *,
    epsilon: float | None = None,
    radius: float | Tensor | None = None,
    lam: float | None = None,
    sparsity: float | None = None,
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
        Relative radius ``r / ‖Y‖_F``. Exactly one of `epsilon`, `radius`, `lam`, `sparsity`.
    radius : float > 0, or Tensor, ndarray or list (M,)
        Absolute radius, in the units of `targets`.
    lam : float > 0
        ``λ`` of the regularised twin ``min Σ c|U| + (λ/2) dist²``.
    sparsity : float in [0, 1)
        Fraction of zeros, columns with a penalty of 0 not counted. The weight then has exactly that many, found by
        `nettrim.refine` from the convex solutions for smaller and smaller radii; the problem that is certified has the
        weight's own distance as its radius, and the status is REFINED.
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
    if sparsity is not None:
        amounts = {"epsilon": epsilon, "radius": radius, "lam": lam}
        given = [name for name, value in amounts.items() if value is not None]
        if given or per_neuron:
            also = ", ".join(given) or "per_neuron=True"
            raise ProblemError(f"sparsity={sparsity} stands alone: leave out {also}.")
        problem = build_problem(inputs, targets, epsilon=1.0, form=form, ceiling=ceiling, penalty=penalty)
        return _as_given(_solve_count(problem, sparsity, solver, tol, max_seconds, on_failure), inputs)
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


def _solve_count(
    problem: LayerProblem,
    sparsity: float,
    solver: str | Solver,
    tol: float,
    max_seconds: float | None,
    on_failure: str,
) -> LayerSolution:
    """Refine at an exact count, from the first convex solution on a path that keeps enough."""
    began = time.monotonic()
    chosen = make_solver(solver)
    check_limits(tol, max_seconds, on_failure)
    assert problem.penalty is not None and isinstance(problem.radius, float)
    free = (problem.penalty == 0).all(0)
    kept = kept_count(int((~free).sum()) * problem.n_outputs, sparsity)
    if problem.form == "halfspace":
        raise ProblemError("form='halfspace' has no exact count: use form='ball', which has the same guarantee.")
    start: Start | None = None
    for epsilon in _PATH:
        # a start needs no more than a rough answer: its support and its imputed targets are searched anyway
        found, carry = solve_from(
            problem.with_radius(epsilon * problem.radius), chosen, 1e-2, max_seconds, "return", start, None
        )
        if bool(found.multipliers.any()):
            start = Start(found.weight, found.multipliers, carry)
        if int((found.weight[:, ~free] != 0).sum()) >= kept:
            break
    refined = refine(problem, found.weight, kept=kept)
    at = problem.with_radius(max(refined.distance, 1e-9 * problem.radius))
    solved, _ = solve_from(at, chosen, tol, max_seconds, "return", start, None)
    evidence = evidence_of(at, refined.weight, solved.multipliers)
    status = judge(evidence.certificate, tol, Status.REFINED)
    said = f"No weight of this l1 norm is nearer than {evidence.nearest:.6g}."
    note = " ".join(filter(None, (solved.stats.note, said)))
    stats = replace(solved.stats, seconds=time.monotonic() - began, note=note)
    return LayerSolution(refined.weight, solved.multipliers, evidence.certificate, status, stats, at)


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
            solution, carry = solve_from(problem, chosen, float(tol), max_seconds, on_failure, start, None)
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
