"""An exact number of kept weights by convex programs alone: reweighted ``ℓ1``.

Candès, Wakin and Boyd, "Enhancing Sparsity by Reweighted ℓ1 Minimization", J. Fourier Anal. Appl. 2008: the program is
solved again and again with the penalties ``c_mn = 1/(|u_mn| + δ)`` of its last solution, so that large weights are
shrunk less and small ones vanish. Between the rounds the radius follows the count. The last support is cut to the count
and refitted one-sidedly. It is the purely convex route; `nettrim.core.refine` finds better supports.
"""

from __future__ import annotations

import time

import torch

from nettrim.core.onesided import OneSided
from nettrim.core.problem import LayerProblem, check_amount, check_count
from nettrim.core.refine import Refined, conclude
from nettrim.core.solution import FEASIBLE
from nettrim.core.solvers import Solver, solve_problem
from nettrim.errors import ProblemError

_DELTA = 0.1  # of the mean kept weight: below it a weight counts as small
_TINY = float(torch.finfo(torch.float64).tiny ** 0.5)


def reweighted(
    problem: LayerProblem,
    *,
    kept: int,
    rounds: int = 8,
    epsilon: float = 0.1,
    solver: str | Solver = "auto",
    tol: float = 1e-2,
    round_to: torch.dtype | None = None,
) -> Refined:
    """Return a weight with exactly `kept` non-zeros from reweighted convex programs and a refit.

    Parameters
    ----------
    problem : LayerProblem
        Of form "ball" or "linear"; its radius or ``λ`` plays no part. Columns with a penalty of 0 are not counted.
    kept : int
    rounds : int
        Programs to solve.
    epsilon : float
        Relative radius of the first.
    solver : str or Solver
    tol : float
        Relative gap of each program: the penalties of the next need no more.
    round_to : torch.dtype, optional
        As in `nettrim.refine`.

    Raises
    ------
    ProblemError
        `kept`, `rounds`, `epsilon` or `tol` is out of range, or the form is "halfspace".
    """
    began = time.monotonic()
    if problem.form == "halfspace":
        raise ProblemError("form='halfspace' has no exact count: use form='ball', which has the same guarantee.")
    assert problem.penalty is not None
    free = (problem.penalty == 0).all(0)
    available = int((~free).sum()) * problem.n_outputs
    kept, rounds = check_count("kept", kept), check_count("rounds", rounds)
    if kept > available:
        raise ProblemError(f"kept={kept} is out of range: the layer has {available} weights beside its free columns.")
    # where all targets are zero, any radius gives the zero weight
    radius = check_amount("epsilon", epsilon) * float(problem.targets.double().norm()) or _TINY
    penalty, floor = problem.penalty, 0.0
    history: dict[str, float] = {}
    best: torch.Tensor | None = None
    for k in range(rounds):
        solved = solve_problem(
            LayerProblem(
                problem.inputs, problem.targets, problem.form, radius, None, problem.ceiling, penalty, problem.active
            ),
            solver,
            tol=tol,
            on_failure="return",
        )
        size = solved.weight.double().abs()
        count = int((size[:, ~free] > 0).sum())
        history[f"kept in round {k + 1}"] = count
        # of the supports that hold enough, the last: it has been reweighted most
        if count >= kept or best is None or int((best[:, ~free] != 0).sum()) < count < kept:
            best = solved.weight.double()
        if solved.certificate.violation > FEASIBLE:
            # no weight may be that near, and a program without a solution takes the solver's longest
            floor = max(floor, 1.05 * solved.certificate.distance)
        if not count:  # nothing to weigh by, and all of it would become free
            radius = max(0.5 * radius, floor)
            continue
        typical = float(size[:, ~free].sum()) / count
        penalty = typical / (size + _DELTA * typical)
        penalty[:, free] = 0.0
        radius = max(radius * min(1.5, max(0.67, (count / kept) ** 0.5)), floor)
    assert best is not None
    scores = torch.where(free, -1.0, best.abs()).flatten()
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores, descending=True, stable=True)[:kept]] = True
    mask = mask.view(best.shape) | free
    weight = conclude(problem, torch.where(mask, best, 0.0), mask, None, round_to)
    loss = OneSided.of(problem, torch.float64).losses(weight.double()).sum()
    return Refined(
        weight=weight.to(problem.inputs.dtype),
        mask=mask,
        kept=kept,
        distance=float(loss.sqrt()),
        start=None,
        history=history,
        seconds=time.monotonic() - began,
        problem=problem,
    )
