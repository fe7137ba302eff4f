"""Every solver of the table meets every named case and every kind of random layer; all of them agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from oracle import array, assert_certified, numbers

from nettrim.core.cases import CASES, KINDS, dense_weight, random_layer
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import LayerSolution, Status
from nettrim.core.solve import solve_layer, solve_path
from nettrim.core.solvers import (
    SOLVERS,
    Admm,
    Osqp,
    Start,
    make_solver,
    solve_problem,
)
from nettrim.errors import ProblemError, SolverError, UnknownNameError, UnsupportedError

TOL = 1e-4
FORMS = ("ball", "halfspace", "linear")


def regularised(kind: str, form: str) -> LayerProblem:
    # a λ that leaves about half of the weights
    one = random_layer(kind, 0, form=form)
    return random_layer(kind, 0, form=form, lam=50 / float((one.inputs.T @ one.targets).abs().max()))


PROBLEMS: dict[str, Callable[[], LayerProblem]] = {}
for _name, _make in CASES.items():
    PROBLEMS[f"case {_name}"] = lambda make=_make: make().problem
for _kind in KINDS:
    PROBLEMS[f"{_kind}, seed 1"] = lambda kind=_kind: random_layer(kind, 1)
    for _form in FORMS:
        PROBLEMS[f"{_kind}, {_form}"] = lambda kind=_kind, form=_form: random_layer(kind, 0, form=form)
for _kind in ("plain", "dead neuron", "free bias", "cascade", "few samples"):
    for _form in FORMS:
        PROBLEMS[f"{_kind}, {_form}, per neuron"] = lambda kind=_kind, form=_form: random_layer(
            kind, 0, form=form, per_neuron=True
        )
        PROBLEMS[f"{_kind}, {_form}, lam"] = lambda kind=_kind, form=_form: regularised(kind, form)


@cache
def problem_of(name: str) -> LayerProblem:
    return PROBLEMS[name]()


@cache
def solved(name: str, solver: str) -> LayerSolution:
    return solve_problem(problem_of(name), solver, tol=TOL, on_failure="return")


def skip_where_refused(problem: LayerProblem, solver: str) -> None:
    """Skip what the solver refuses, after seeing that it does so by the error and with a way out."""
    reason = make_solver(solver).refuses(problem)
    if reason is not None:
        with pytest.raises(UnsupportedError, match="solver="):
            solve_problem(problem, solver)
        pytest.skip(reason)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_certified(name, solver):
    skip_where_refused(problem_of(name), solver)
    solution = solved(name, solver)
    assert_certified(solution, TOL)
    assert solution.status is Status.SOLVED
    assert solution.problem is problem_of(name)
    assert solution.weight.dtype == solution.multipliers.dtype == torch.float64


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CASES)
def test_known_optimum(name, solver):
    case = CASES[name]()
    skip_where_refused(case.problem, solver)
    solution = solved(f"case {name}", solver)
    assert solution.certificate.objective == pytest.approx(case.optimum, rel=2 * TOL, abs=1e-12)
    assert solution.certificate.lower_bound <= case.optimum * (1 + 1e-9) + 1e-12
    if case.weight is not None:
        np.testing.assert_allclose(array(solution.weight), array(case.weight), atol=0.02)
        assert not solution.weight[case.weight == 0].any(), "a pruned weight is not exactly zero"


def room(problem: LayerProblem, violation: float, multipliers: np.ndarray) -> float:
    """By how much a weight of this relative violation can be below a bound of these multipliers."""
    n, size = numbers(problem), np.abs(array(problem.targets)).max()
    hard = problem.form == "halfspace"
    gamma = np.where(n.active, multipliers, 0) if hard else multipliers
    extra = violation * size * np.abs(multipliers[~n.active]).sum() if hard else 0.0
    if problem.per_neuron:
        radius = array(problem.radius)
        radius = np.where(radius > 0, radius, radius.mean())
        return extra + violation * float((radius * np.sqrt((gamma**2).sum(axis=0))).sum())
    if problem.lam is None:
        return extra + violation * problem.radius * float(np.sqrt((gamma**2).sum()))
    return extra


@pytest.mark.parametrize("name", PROBLEMS)
def test_solvers_agree(name):
    problem = problem_of(name)
    takers = [s for s in SOLVERS if make_solver(s).refuses(problem) is None]
    assert len(takers) >= 2
    for one, other in permutations(takers, 2):
        a, b = solved(name, one), solved(name, other)
        slack = room(problem, b.certificate.violation, array(a.multipliers))
        slack += 1e-9 * b.certificate.objective
        assert a.certificate.lower_bound <= b.certificate.objective + slack, (one, other)
        if Status.SOLVED is a.status is b.status:
            apart = abs(a.certificate.objective - b.certificate.objective)
            gaps = abs(a.certificate.gap) + abs(b.certificate.gap)
            back = room(problem, a.certificate.violation, array(b.multipliers))
            top = max(a.certificate.objective, b.certificate.objective)
            assert apart <= gaps * top + slack + back, (one, other)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("ceiling", "cascade")])
def test_the_ball_is_never_dearer_than_the_halfspace(kind, solver):
    soft, hard = (solved(f"{kind}, {form}", solver).certificate for form in ("ball", "halfspace"))
    assert soft.lower_bound <= hard.objective * (1 + TOL)
    assert solved("case ball versus halfspace", solver).certificate.objective < 0.89
    assert solved("case halfspace versus ball", solver).certificate.lower_bound > 0.99


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["plain", "free bias", "few samples", "scaled columns", "cascade"])
def test_float32(kind, solver):
    p = random_layer(kind, 0)
    problem = LayerProblem(
        p.inputs.float(),
        p.targets.float(),
        p.form,
        p.radius,
        ceiling=None if p.ceiling is None else p.ceiling.float(),
        penalty=p.penalty,
    )
    solution = solve_problem(problem, solver, tol=1e-3, on_failure="return")
    assert solution.weight.dtype == torch.float32
    assert solution.multipliers.dtype == torch.float64
    assert_certified(solution, 1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(dtype, solver):
    p = random_layer("plain", 0)
    x, y = p.inputs.numpy().astype(dtype), p.targets.numpy().astype(dtype)
    kept = x.copy(), y.copy()
    solution = solve_layer(x, y, epsilon=0.2, solver=solver)
    assert type(solution.weight) is type(solution.multipliers) is np.ndarray
    assert (solution.weight.dtype, solution.multipliers.dtype) == (dtype, np.float64)
    assert_certified(solution, 1e-3)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(y, kept[1])
    again = solve_layer(torch.tensor(x), torch.tensor(y), epsilon=0.2, solver=solver)
    assert isinstance(again.weight, torch.Tensor)
    np.testing.assert_array_equal(array(again.weight), array(solution.weight))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_pruned_is_exactly_zero(solver):
    p = random_layer("plain", 0, epsilon=0.5)
    weight = solve_problem(p, solver, tol=TOL).weight
    exact, near = int((weight == 0).sum()), int((weight.abs() < 1e-5).sum())
    assert exact == near
    assert exact >= 4
    assert not solved("dead neuron, ball", solver).weight[1].any()
    assert not solved("dead input, ball", solver).weight[:, 2].any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("form", "per_neuron"), [("ball", False), ("ball", True), ("halfspace", False), ("linear", False)]
)
def test_a_path_is_its_separate_solves(form, per_neuron, solver):
    p = random_layer("plain", 0, form=form)
    x, y, epsilons = p.inputs, p.targets, [0.1, 0.6, 0.3]
    path = solve_path(x, y, epsilons, form=form, per_neuron=per_neuron, solver=solver, tol=TOL)
    for epsilon, along in zip(epsilons, path, strict=True):
        alone = solve_layer(x, y, epsilon=epsilon, form=form, per_neuron=per_neuron, solver=solver, tol=TOL)
        assert_certified(along, TOL)
        torch.testing.assert_close(
            torch.as_tensor(along.problem.radius), torch.as_tensor(alone.problem.radius), rtol=1e-12, atol=0
        )
        assert along.certificate.objective == pytest.approx(alone.certificate.objective, rel=2 * TOL)
    cost = [solution.certificate.objective for solution in path]
    assert cost[0] > cost[2] > cost[1]


def test_a_path_of_arrays_and_of_nothing():
    p = random_layer("plain", 0)
    x, y = p.inputs.numpy(), p.targets.numpy()
    assert all(type(solution.weight) is np.ndarray for solution in solve_path(x, y, [0.5, 2.0]))
    with pytest.raises(ProblemError, match="epsilons is empty"):
        solve_path(x, y, [])
    with pytest.raises(ProblemError, match="epsilons=0 is out of range"):
        solve_path(x, y, [0.5, 0.0])


@pytest.mark.parametrize("epsilon", [1.0, 1.5, 1e6])
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_epsilon_of_one_and_more_gives_zero_and_says_so(form, per_neuron, epsilon):
    for seed in range(4):
        p = random_layer("plain", seed, form=form)
        solution = solve_layer(p.inputs, p.targets, epsilon=epsilon, form=form, per_neuron=per_neuron)
        assert not solution.weight.any()
        assert "The zero weight is feasible" in solution.stats.note
        assert_certified(solution, 0.0)


@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_dead_neurons_is_zero(form, per_neuron):
    p = random_layer("plain", 0)
    solution = solve_layer(p.inputs, 0 * p.targets, epsilon=0.1, form=form, per_neuron=per_neuron)
    assert not solution.weight.any()
    assert solution.status is Status.SOLVED


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_radius_out_of_reach_is_named(solver):
    problem = LayerProblem(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), form="linear", radius=1.0)
    solution = solve_problem(problem, solver, on_failure="return")
    assert solution.status is Status.INFEASIBLE
    assert solution.certificate.violation > 0.1


def nothing_comes_in(**amount: float) -> LayerProblem:
    """What a layer sees when everything before it was pruned."""
    return LayerProblem(torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64), **amount)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_all_zero_reach_no_radius(solver):
    solution = solve_problem(nothing_comes_in(radius=0.5), solver, on_failure="return")
    assert solution.status in (Status.NOT_FEASIBLE, Status.INFEASIBLE)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_all_zero_leave_the_zero_weight(solver):
    # XᵀΓ = 0 limits no Γ, and Γ = λ Y proves the optimum λ‖Y‖²/2
    solution = solve_problem(nothing_comes_in(lam=2.0), solver, on_failure="return")
    assert not solution.weight.any()
    assert solution.certificate.objective == pytest.approx(3.0)
    assert_certified(solution, TOL)


def test_failure_raises_and_carries_the_solution():
    with pytest.raises(SolverError, match=r"NOT_FEASIBLE: gap .* after 1 iterations\. .*raise max_iter") as caught:
        solve_problem(random_layer("plain", 0), Admm(max_iter=1))
    assert caught.value.solution.status is Status.NOT_FEASIBLE
    assert caught.value.solution.certificate.violation > 1e-6


def test_failure_warns():
    with pytest.warns(UserWarning, match="NOT_FEASIBLE"):
        solution = solve_problem(random_layer("plain", 0), Admm(max_iter=1), on_failure="warn")
    assert solution.status is Status.NOT_FEASIBLE


def test_failure_returns():
    # feasible after some iterations, but not to so small a gap
    solution = solve_problem(random_layer("plain", 0), Admm(max_iter=60), tol=1e-12, on_failure="return")
    assert solution.status is Status.MAX_ITER
    assert "max_iter" in solution.status.remedy
    assert solution.certificate.violation <= 1e-6
    assert solution.certificate.gap > 1e-12


def test_the_clock_ends_it():
    problem = random_layer("plain", 0)
    solution = solve_problem(problem, Admm(check_every=60), tol=1e-12, max_seconds=1e-9, on_failure="return")
    assert solution.stats.iterations == 60
    assert solution.status is Status.TIME_LIMIT


def test_a_start_is_used():
    problem = random_layer("plain", 0)
    cold = solve_problem(problem, "admm", tol=TOL)
    warm = solve_problem(problem, "admm", tol=TOL, start=Start(cold.weight, cold.multipliers))
    assert warm.stats.iterations < cold.stats.iterations
    assert_certified(warm, TOL)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"on_failure": "ignore"}, "on_failure='ignore' is unknown: use raise, warn or return"),
        ({"tol": 0.0}, "tol=0 is out of range"),
        ({"max_seconds": -1.0}, "max_seconds=-1 is out of range"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ProblemError, match=message):
        solve_problem(random_layer("plain", 0), **keywords)


def test_unknown_and_unsuited_solvers():
    with pytest.raises(UnknownNameError, match="solver='simplex' is unknown: use one of auto, admm"):
        solve_problem(random_layer("plain", 0), "simplex")
    with pytest.raises(UnsupportedError, match=r"give lam, or use Radius\(Osqp\(\)\)"):
        solve_problem(random_layer("plain", 0), Osqp())


def test_the_dense_weight_costs_more():
    problem = random_layer("plain", 0)
    assert solved("plain, ball", "auto").certificate.objective < float(dense_weight("plain", 0).abs().sum())
    assert problem.radius == problem_of("plain, ball").radius
