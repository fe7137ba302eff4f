"""A second opinion in plain NumPy: nothing here comes from `nettrim.core.certificate`.

Every check raises AssertionError by itself and returns None or the number that it computed; `test_helpers.py`
shows that each of them fails on a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from nettrim.core.problem import LayerProblem
from nettrim.core.solution import LayerSolution

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """A problem as float64 arrays: X (P, N), Y (P, M), T (P, M), active (P, M), c (N, M)."""

    x: Array
    y: Array
    t: Array
    active: NDArray[np.bool_]
    c: Array


def numbers(problem: LayerProblem) -> Numbers:
    y = array(problem.targets)
    active = problem.active.cpu().numpy().copy()
    above = np.zeros_like(y) if problem.ceiling is None else array(problem.ceiling)
    if problem.form == "linear":
        active = np.ones_like(active)
    return Numbers(array(problem.inputs), y, np.where(active, y, above), active, array(problem.penalty).T)


def array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.array(value, dtype=np.float64)


def residual(problem: LayerProblem, weight: Any) -> Array:
    """What of each pre-activation counts, entry by entry as the table of forms says."""
    n = numbers(problem)
    out = n.x @ array(weight).T - n.t
    return np.where(n.active, out, np.maximum(out, 0.0))


def fit_of(problem: LayerProblem, weight: Any) -> Array:
    """The distance of each neuron (M,); a hard ceiling is no part of it."""
    r = residual(problem, weight)
    if problem.form == "halfspace":
        r = np.where(numbers(problem).active, r, 0.0)
    return np.sqrt((r**2).sum(axis=0))


def distance(problem: LayerProblem, weight: Any) -> float:
    return float(np.sqrt((fit_of(problem, weight) ** 2).sum()))


def violation(problem: LayerProblem, weight: Any) -> float:
    worst = [0.0]
    if problem.lam is None and problem.per_neuron:
        radius = array(problem.radius)
        for d, r in zip(fit_of(problem, weight), radius, strict=True):
            worst.append((d - r) / (r if r > 0 else radius.mean()))
    elif problem.lam is None:
        worst.append((distance(problem, weight) - problem.radius) / problem.radius)
    if problem.form == "halfspace":
        n = numbers(problem)
        over = np.where(n.active, 0.0, n.x @ array(weight).T - n.t).max()
        size = np.abs(n.y).max()
        if over > 0:
            worst.append(over / size if size > 0 else np.inf)
    return float(max(worst))


def objective(problem: LayerProblem, weight: Any) -> float:
    value = float((numbers(problem).c.T * np.abs(array(weight))).sum())
    if problem.lam is not None:
        value += problem.lam / 2 * distance(problem, weight) ** 2
    return value


def dual_bound(problem: LayerProblem, multipliers: Any, rtol: float | None = None) -> float:
    """The lower bound of multipliers as they are, which must be feasible as they are."""
    rounding = 2.2e-16 if "float64" in str(multipliers.dtype) else 1.2e-7
    if rtol is None:
        rtol = 1e-9 if rounding < 1e-9 else 1e-5
    n, gamma = numbers(problem), array(multipliers)
    assert gamma.shape == n.y.shape, f"multipliers have shape {gamma.shape}, targets {n.y.shape}"
    assert np.isfinite(gamma).all(), "multipliers are not finite"
    assert (gamma[~n.active] <= 0).all(), f"a multiplier off the active set is {gamma[~n.active].max():g} > 0"
    # what the products would be if nothing cancelled: the size that rounding is relative to
    products, size = np.abs(n.x.T @ gamma), np.abs(n.x).T @ np.abs(gamma)
    allowed = np.where(n.c > 0, n.c * (1 + rtol) + 4 * rounding * size, rtol * size)
    assert (products <= allowed).all(), f"|XᵀΓ| exceeds c by {(products - allowed).max():g}"
    counted = np.where(n.active, gamma, 0.0) if problem.form == "halfspace" else gamma
    value = float((gamma * n.t).sum())
    if problem.lam is not None:
        return value - float((counted**2).sum()) / (2 * problem.lam)
    if problem.per_neuron:
        return value - float((array(problem.radius) * np.sqrt((counted**2).sum(axis=0))).sum())
    return value - problem.radius * float(np.sqrt((counted**2).sum()))


def assert_certified(solution: LayerSolution, tol: float) -> None:
    """The claimed numbers are the true ones, and they prove the weight optimal within `tol` and feasible."""
    problem, claim = solution.problem, solution.certificate
    weight = array(solution.weight)
    assert weight.shape == (problem.n_outputs, problem.n_inputs), f"weight has shape {weight.shape}"
    assert np.isfinite(weight).all(), "the weight is not finite"
    found = objective(problem, weight)
    np.testing.assert_allclose(claim.objective, found, rtol=1e-9, atol=1e-300, err_msg="objective")
    rounding = 1e-12 * np.linalg.norm(array(problem.targets))
    np.testing.assert_allclose(claim.distance, distance(problem, weight), rtol=1e-9, atol=rounding, err_msg="distance")
    broken = violation(problem, weight)
    np.testing.assert_allclose(claim.violation, broken, rtol=1e-9, atol=1e-9, err_msg="violation")
    bound = dual_bound(problem, solution.multipliers)
    slack = 1e-6 * max(abs(claim.lower_bound), abs(found))
    assert bound >= claim.lower_bound - slack, f"multipliers give {bound!r}, {claim.lower_bound!r} was claimed"
    gap = (found - claim.lower_bound) / found if found > 0 else 0.0
    np.testing.assert_allclose(claim.gap, gap, rtol=1e-6, atol=1e-9, err_msg="gap")
    assert broken <= 1e-6, f"violation {broken:g}"
    assert gap <= tol, f"gap {gap:g} exceeds {tol:g}"


def reference_optimum(problem: LayerProblem) -> float:
    """The optimum of a tiny problem by SLSQP on ``U = A − B, A, B ≥ 0``, accurate to 1e-6 or so."""
    n = numbers(problem)
    shape = (problem.n_outputs, problem.n_inputs)
    half = shape[0] * shape[1]
    cost = np.concatenate([n.c.T.ravel()] * 2)
    hard = problem.form == "halfspace"

    def weight(v: Array) -> Array:
        return (v[:half] - v[half:]).reshape(shape)

    def counted(v: Array) -> Array:
        r = residual(problem, weight(v))
        return np.where(n.active, r, 0.0) if hard else r

    def both_signs(gradient: Array) -> Array:
        return np.concatenate([gradient, -gradient], axis=-1)

    def value(v: Array) -> float:
        fit = 0.0 if problem.lam is None else problem.lam / 2 * float((counted(v) ** 2).sum())
        return float(cost @ v) + fit

    def slope(v: Array) -> Array:
        if problem.lam is None:
            return cost
        return cost + both_signs((problem.lam * counted(v).T @ n.x).ravel())

    constraints = []
    if problem.lam is None:
        # rows of `groups` say which neurons share a ball
        groups = np.eye(shape[0]) if problem.per_neuron else np.ones((1, shape[0]))
        square = np.atleast_1d(array(problem.radius)) ** 2

        def room(v: Array) -> Array:
            return 1 - groups @ (counted(v) ** 2).sum(axis=0) / square

        def room_slope(v: Array) -> Array:
            each = -2 * counted(v).T @ n.x
            return both_signs(np.stack([(g[:, None] * each).ravel() / s for g, s in zip(groups, square, strict=True)]))

        constraints.append({"type": "ineq", "fun": room, "jac": room_slope})
    if hard and not n.active.all():
        off = np.argwhere(~n.active)
        rows = np.zeros((len(off), *shape))
        for row, (p, m) in zip(rows, off, strict=True):
            row[m] = n.x[p]
        lines = both_signs(rows.reshape(len(off), half))
        limits = n.t[~n.active]
        constraints.append({"type": "ineq", "fun": lambda v: limits - lines @ v, "jac": lambda v: -lines})
    start = np.linalg.lstsq(n.x, n.t, rcond=None)[0].T.ravel()
    result = minimize(
        value,
        np.concatenate([np.maximum(start, 0), np.maximum(-start, 0)]),
        jac=slope,
        method="SLSQP",
        bounds=[(0, None)] * (2 * half),
        constraints=constraints,
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    assert violation(problem, weight(result.x)) < 1e-6, f"the reference is infeasible: {result.message}"
    return objective(problem, weight(result.x))
