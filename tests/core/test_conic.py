"""The backends against each other and against ADMM: certified, sparse, reused, and honest where they fail."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from nettrim.core.certificate import feasible_multipliers
from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solution import FEASIBLE, LayerSolution, Status
from nettrim.core.solvers import Admm, Clarabel, Osqp, Radius, Scs, Solver, conic, solve_problem
from nettrim.core.solvers.base import Limits
from nettrim.errors import ProblemError, SolverError, UnsupportedError

FORMS = ("ball", "halfspace", "linear")
CONIC = {"scs": Scs(), "clarabel": Clarabel(), "osqp": Radius(Osqp())}
TOL = 1e-4
# what a backend leaves of a gap: the radius is shrunk by 0.02 TOL, which a slack bound can feel tenfold
REACHED = 2e-5


def make_data(form: str, samples: int = 30, n_inputs: int = 6, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in [0, 1] with a column of ones, targets of three sparse neurons with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, n_inputs, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    kept = torch.rand(3, n_inputs, generator=generator) < 0.7
    w = torch.randn(3, n_inputs, generator=generator, dtype=torch.float64) * kept
    w[:, -1] += 1  # so that most samples are active
    y = x @ w.T + 0.01 * torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    return x, y if form == "linear" else y.clamp(min=0)


def free_bias(n_inputs: int = 6) -> torch.Tensor:
    penalty = torch.ones(n_inputs, dtype=torch.float64)
    penalty[-1] = 0
    return penalty


def make_problem(form: str, amount: str, penalty: torch.Tensor | None = None) -> LayerProblem:
    x, y = make_data(form)
    if amount == "lam":
        return build_problem(x, y, lam=20.0, form=form, penalty=penalty)
    return build_problem(x, y, epsilon=0.1, form=form, penalty=penalty, per_neuron=amount == "per_neuron")


def solve(problem: LayerProblem, solver: Solver, reached: float = REACHED) -> LayerSolution:
    solution = solve_problem(problem, solver, tol=TOL)
    assert solution.status is Status.SOLVED
    assert solution.certificate.violation <= FEASIBLE
    # a violation within its allowance may put the objective as far below the optimum
    assert -FEASIBLE <= solution.certificate.gap <= reached
    return solution


def assert_agree(first: LayerSolution, second: LayerSolution) -> None:
    """Each bound lies below each objective, up to what the allowed violation is worth."""
    for one, other in ((first, second), (second, first)):
        excess = one.certificate.lower_bound - other.certificate.objective
        assert excess <= 1e-6 * other.certificate.objective


@pytest.mark.parametrize("free", [False, True], ids=["penalised", "free"])
@pytest.mark.parametrize("amount", ["radius", "per_neuron", "lam"])
@pytest.mark.parametrize("form", FORMS)
def test_backends_agree_on_a_certified_optimum(form: str, amount: str, free: bool) -> None:
    problem = make_problem(form, amount, free_bias() if free else None)
    solutions = [solve(problem, solver) for solver in CONIC.values()]
    solutions.append(solve(problem, Admm(max_iter=20_000), TOL))
    for i, first in enumerate(solutions):
        for second in solutions[:i]:
            assert_agree(first, second)
    supports = {tuple((solution.weight != 0).flatten().tolist()) for solution in solutions[:3]}
    assert len(supports) == 1


@pytest.mark.parametrize("name", CONIC)
def test_pruned_weights_are_exactly_zero(name: str) -> None:
    solution = solve(make_problem("ball", "radius"), CONIC[name])
    kept = solution.weight != 0
    assert 0 < int(kept.sum()) < kept.numel()
    pull = (solution.problem.inputs.T @ solution.multipliers).T.abs()
    assert bool((pull[kept] > 1 - 1e-3).all())
    assert bool((kept | (solution.weight.abs() == 0)).all())


@pytest.mark.parametrize("name", CONIC)
def test_neurons_that_need_no_weight_have_none(name: str) -> None:
    x, y = make_data("ball")
    y[:, 1] = 0
    for problem in (
        build_problem(x, y, epsilon=0.1),
        build_problem(x, y, epsilon=0.1, per_neuron=True),
        build_problem(x, y, lam=20.0),
        build_problem(x, 0 * y, lam=20.0),
    ):
        assert not bool(solve(problem, CONIC[name]).weight[1].any())


@pytest.mark.parametrize("name", CONIC)
@pytest.mark.parametrize("form", ["ball", "halfspace"])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_ceiling(form: str, name: str, per_neuron: bool) -> None:
    x, y = make_data(form)
    generator = torch.Generator().manual_seed(0)
    dense = torch.linalg.lstsq(x, y).solution
    ceiling = x @ dense + 0.2 * torch.rand(30, 3, generator=generator, dtype=torch.float64) - 0.05
    problem = build_problem(x, y, epsilon=0.3, form=form, ceiling=ceiling, penalty=free_bias(), per_neuron=per_neuron)
    solution = solve(problem, CONIC[name])
    assert_agree(solution, solve(problem, Clarabel()))
    excess = torch.where(problem.active, 0.0, x @ solution.weight.T - ceiling).max()
    assert (float(excess) <= FEASIBLE * float(y.max())) == (form == "halfspace")


@pytest.mark.parametrize("name", CONIC)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["inputs", "targets", "column"])
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_units_do_not_matter(form: str, what: str, factor: float, name: str) -> None:
    x, y = make_data(form)
    if what == "inputs":
        x = x * factor
    elif what == "targets":
        y = y * factor
    else:
        x[:, 2] *= factor
    for per_neuron in (False, True):
        problem = build_problem(x, y, epsilon=0.1, form=form, per_neuron=per_neuron)
        solution = solve(problem, CONIC[name])
        assert_agree(solution, solve(problem, Clarabel()))


@pytest.mark.parametrize("name", CONIC)
@pytest.mark.parametrize("form", FORMS)
def test_fewer_samples_than_inputs(form: str, name: str) -> None:
    x, y = make_data(form, samples=12, n_inputs=30)
    for problem in (
        build_problem(x, y, epsilon=0.05, form=form),
        build_problem(x, y, epsilon=0.05, form=form, per_neuron=True),
        build_problem(x, y, lam=20.0, form=form),
    ):
        assert_agree(solve(problem, CONIC[name]), solve(problem, Clarabel()))


@pytest.mark.parametrize("name", CONIC)
def test_columns_of_zeros(name: str) -> None:
    x, y = make_data("ball")
    spread = torch.cat([x, torch.zeros(30, 2, dtype=torch.float64)], dim=1)
    penalty = torch.ones(8, dtype=torch.float64)
    penalty[-1] = 0
    solution = solve(build_problem(spread, y, epsilon=0.1, penalty=penalty), CONIC[name])
    assert not bool(solution.weight[:, 6:].any())
    assert_agree(solution, solve(build_problem(x, y, epsilon=0.1), CONIC[name]))


@pytest.mark.parametrize("name", CONIC)
@pytest.mark.parametrize("form", FORMS)
def test_float32(form: str, name: str) -> None:
    x, y = make_data(form)
    solution = solve(build_problem(x.float(), y.float(), epsilon=0.1, form=form), CONIC[name])
    assert solution.weight.dtype == torch.float32


@pytest.mark.parametrize("name", CONIC)
def test_a_neuron_that_must_fit_exactly(name: str) -> None:
    x, y = make_data("ball", samples=12, n_inputs=30)
    radius = torch.tensor([0.0, 0.1, 0.1], dtype=torch.float64)
    solve(build_problem(x, y, radius=radius), CONIC[name])


@pytest.mark.parametrize("solver", [Scs(), Clarabel(), Osqp()], ids=["scs", "clarabel", "osqp"])
@pytest.mark.parametrize("form", FORMS)
def test_multipliers_are_the_dual_of_the_fit(form: str, solver: Solver) -> None:
    problem = make_problem(form, "lam", free_bias())
    answer = solver.run(problem, Limits(TOL), None)
    gamma, penalty = answer.multipliers, problem.penalty
    assert gamma is not None
    assert penalty is not None
    pull = (problem.inputs.T @ gamma).T
    assert bool((pull.abs() <= penalty + 1e-5).all())
    kept = (answer.weight != 0) & (penalty > 0)
    assert torch.allclose(pull[kept], answer.weight[kept].sign(), atol=1e-5)
    assert bool((gamma[~problem.active] <= 1e-6).all())
    # Γ = −λ R on the active samples
    residual = problem.inputs @ answer.weight.T - problem.anchor
    assert torch.allclose(gamma[problem.active], -20.0 * residual[problem.active], atol=1e-5)
    assert feasible_multipliers(problem, gamma).bound > 0.999 * float((penalty * answer.weight.abs()).sum())


def test_refusals_say_what_to_use() -> None:
    refusal = Osqp().refuses(make_problem("ball", "radius"))
    assert refusal is not None
    assert all(word in refusal for word in ("Radius(Osqp())", "lam", "scs", "clarabel", "admm"))
    with pytest.raises(UnsupportedError, match="Radius"):
        solve_problem(make_problem("ball", "radius"), Osqp())
    assert Osqp().refuses(make_problem("ball", "lam")) is None


def test_large_problems_are_refused_by_the_size_of_one_model() -> None:
    row, outputs = torch.ones(1, 1).expand(4000, 800), torch.ones(1, 1).expand(4000, 10)
    joint = build_problem(row, outputs, epsilon=0.1)
    for solver in (Scs(), Clarabel()):
        refusal = solver.refuses(joint)
        assert refusal is not None
        assert "admm" in refusal
        assert solver.refuses(build_problem(row, outputs, lam=1.0)) is None
        assert solver.refuses(build_problem(row, outputs, epsilon=0.1, per_neuron=True)) is None
    assert Osqp().refuses(replace(joint, radius=None, lam=1.0)) is None


@pytest.mark.parametrize("kind", [Scs, Clarabel, Osqp])
def test_settings_that_stop_nowhere_are_refused(kind: type) -> None:
    with pytest.raises(ProblemError, match="tol > 0"):
        kind(tol=0.0)
    with pytest.raises(ProblemError, match="max_iter ≥ 1"):
        kind(max_iter=0)


@pytest.mark.parametrize("name", ["scs", "clarabel"])
@pytest.mark.parametrize("form", ["ball", "halfspace"])
def test_infeasible(form: str, name: str) -> None:
    x, y = make_data(form)
    generator = torch.Generator().manual_seed(1)
    y = torch.where(y > 0, y + torch.rand(30, 3, generator=generator, dtype=torch.float64), 0.0)
    with pytest.raises(SolverError, match="INFEASIBLE"):
        solve_problem(build_problem(x, y, epsilon=1e-3, form=form), CONIC[name])
    with pytest.raises(SolverError, match="INFEASIBLE"):
        solve_problem(build_problem(x, y, epsilon=1e-3, form=form, per_neuron=True), CONIC[name])


def test_infeasible_ceiling_of_a_regularised_problem() -> None:
    x, y = make_data("halfspace")
    x[0], y[0] = 0, 0
    problem = build_problem(x, y, lam=20.0, form="halfspace", ceiling=torch.full_like(y, -1.0))
    for solver in (Scs(), Clarabel(), Osqp()):
        solution = solve_problem(problem, solver, on_failure="return")
        assert solution.status is Status.INFEASIBLE
        assert not bool(solution.weight.any())


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("NaN in A")])
def test_an_error_of_the_backend_becomes_a_status(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(conic._Model, "solve", broken)
    solution = solve_problem(make_problem("ball", "radius"), Scs(), on_failure="return")
    assert solution.status is Status.BACKEND_FAILED
    assert str(error) in solution.stats.note
    assert not bool(solution.weight.any())


def test_an_error_of_cvxpy_becomes_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = conic._Backend("SCS", {"no_such_option": 1}, "time_limit_secs")
    monkeypatch.setattr(Scs, "_backend", lambda self: backend)
    solution = solve_problem(make_problem("ball", "radius"), Scs(), on_failure="return")
    assert solution.status is Status.BACKEND_FAILED
    assert "SCS said" in solution.stats.note


@pytest.mark.parametrize("solver", [Scs(max_iter=3), Clarabel(max_iter=2)], ids=["scs", "clarabel"])
def test_too_few_iterations_are_judged_and_warn_of_nothing(solver: Solver) -> None:
    solution = solve_problem(make_problem("ball", "radius"), solver, tol=1e-6, on_failure="return")
    assert solution.status in (Status.MAX_ITER, Status.NOT_FEASIBLE, Status.BACKEND_FAILED)


def test_osqp_without_iterations() -> None:
    solution = solve_problem(make_problem("ball", "lam"), Osqp(max_iter=1), tol=1e-6, on_failure="return")
    assert solution.status in (Status.MAX_ITER, Status.BACKEND_FAILED)


@pytest.mark.parametrize("name", CONIC)
def test_no_time(name: str) -> None:
    for amount in ("radius", "per_neuron", "lam"):
        solution = solve_problem(make_problem("ball", amount), CONIC[name], max_seconds=1e-9, on_failure="return")
        assert solution.status in (Status.TIME_LIMIT, Status.NOT_FEASIBLE)
        assert solution.stats.iterations == 0


@pytest.mark.parametrize(
    "solver", [Scs(tol=1e-30, max_iter=10**8), Osqp(tol=1e-30, max_iter=10**8)], ids=["scs", "osqp"]
)
def test_the_backend_keeps_the_deadline(solver: Solver) -> None:
    began = time.monotonic()
    answer = solver.run(make_problem("ball", "lam"), Limits(TOL, began + 0.5), None)
    assert time.monotonic() - began < 5
    assert answer.otherwise is Status.TIME_LIMIT


def test_models_are_built_once_and_parametrised() -> None:
    conic._shared_model.cache_clear()
    x, y = make_data("ball")
    for amount in (0.1, 0.2):
        for factor in (1.0, 2.0):
            solve(build_problem(factor * x, y, epsilon=amount), Scs())
    solve(build_problem(x, y, epsilon=0.1, per_neuron=True), Scs())
    info = conic._shared_model.cache_info()
    assert info.misses == 2
    assert info.hits == 5
    for regularised in (False, True):
        for form in FORMS:
            assert conic._shared_model("SCS", (5, 4, 3), form, regularised).problem.is_dpp()


def test_an_answer_does_not_depend_on_the_one_before() -> None:
    problem = make_problem("ball", "radius")
    first = solve(problem, Scs()).weight
    solve(build_problem(*make_data("ball", seed=7), epsilon=0.3), Scs())
    assert torch.equal(first, solve(problem, Scs()).weight)


@pytest.mark.parametrize("name", CONIC)
def test_large_models_get_constants(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    problem = make_problem("halfspace", "radius", free_bias())
    shared = solve(problem, CONIC[name])
    monkeypatch.setattr(conic, "_MAX_SHARED", 0)
    conic._shared_model.cache_clear()
    assert_agree(shared, solve(problem, CONIC[name]))
    assert conic._shared_model.cache_info().misses == 0


def test_cvxpy_is_imported_by_the_first_solve_only() -> None:
    code = "import sys, nettrim.core.solvers; sys.exit('cvxpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
