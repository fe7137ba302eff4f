"""The root in λ: it ends on the radius, in few solves, and says so where there is none."""

from dataclasses import dataclass, field

import pytest
import torch

from nettrim.core.certificate import measure_fit
from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solution import Status
from nettrim.core.solve import solve_path
from nettrim.core.solvers import Admm, Osqp, Radius, Start, solve_problem
from nettrim.core.solvers.base import Limits, RawAnswer
from nettrim.core.solvers.radius import hair, join_neurons, one_neuron, zero_answer
from nettrim.errors import ProblemError

X1 = torch.eye(2, dtype=torch.float64)
Y1 = torch.tensor([[3.0], [4.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Shrink:
    """The exact solver where the inputs are the identity: ``u = soft(y, 1/λ)``. Remembers every λ."""

    seen: list[float] = field(default_factory=list)
    fails_from: float = float("inf")
    least: float = 0.0
    trouble: Status = Status.BACKEND_FAILED

    def refuses(self, problem: LayerProblem) -> str | None:
        return None if problem.lam is not None else "Shrink takes lam only."

    def run(self, problem: LayerProblem, limits: Limits, start: Start | None) -> RawAnswer:
        assert problem.lam is not None
        self.seen.append(problem.lam)
        if len(self.seen) >= self.fails_from:
            return zero_answer(problem, self.trouble, "Shrink failed.")
        cut = max(1 / problem.lam, self.least)
        weight = (problem.targets - cut).clamp(min=0).T.contiguous()
        gamma = problem.lam * (problem.targets - weight.T)
        return RawAnswer(weight, gamma, 1, Status.MAX_ITER, torch.float64)


def known_problem(radius: float = 1.0) -> LayerProblem:
    """The optimum is y − radius/√2 in both entries."""
    return build_problem(X1, Y1, radius=radius)


def test_root_of_a_known_problem() -> None:
    inner = Shrink()
    solution = solve_problem(known_problem(), Radius(inner), tol=1e-4)
    assert solution.certificate.objective == pytest.approx(7 - 2**0.5, rel=1e-5)
    assert solution.certificate.violation == 0
    assert 0 <= solution.certificate.gap <= 1e-5
    # on one piece the secant is exact: only the bracket takes solves
    assert len(inner.seen) <= 6
    assert solution.stats.iterations == len(inner.seen)
    assert "λ = 1.4142" in solution.stats.note


def test_the_distance_ends_a_hair_below_the_radius() -> None:
    problem = known_problem()
    answer = Radius(Shrink()).run(problem, Limits(1e-3), None)
    margin = hair(problem, 1e-3)
    assert 1 - 2 * margin <= measure_fit(problem, answer.weight).distance <= 1


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
def test_units_do_not_matter(factor: float) -> None:
    for problem in (
        build_problem(X1, factor * Y1, epsilon=0.2),
        build_problem(X1, Y1, epsilon=0.2, penalty=factor),
    ):
        inner = Shrink()
        if problem.penalty is not None and float(problem.penalty.max()) != 1:
            # Shrink knows penalties of one only; Osqp knows all
            solution = solve_problem(problem, Radius(Osqp()), tol=1e-4)
        else:
            solution = solve_problem(problem, Radius(inner), tol=1e-4)
            assert len(inner.seen) <= 8
        assert solution.status is Status.SOLVED


def test_a_start_gives_the_first_lam() -> None:
    inner = Shrink()
    problem = known_problem()
    before = solve_problem(problem, Radius(inner), tol=1e-4)
    cold = len(inner.seen)
    inner.seen.clear()
    solve_problem(problem, Radius(inner), tol=1e-4, start=Start(before.weight, before.multipliers))
    assert len(inner.seen) <= min(3, cold)


def test_path_with_per_neuron_balls() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).clamp(min=0)
    for per_neuron in (False, True):
        path = solve_path(x, y, [0.4, 0.1, 0.2], per_neuron=per_neuron, solver="osqp", tol=1e-4)
        assert [solution.status for solution in path] == [Status.SOLVED] * 3
        objectives = [solution.certificate.objective for solution in path]
        assert objectives[0] < objectives[2] < objectives[1]


def test_a_radius_that_does_not_bind() -> None:
    # the free column alone fits the first neuron: every λ does, and the weight costs nothing
    x = torch.cat([torch.rand(20, 3, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)], dim=1)
    y = torch.full((20, 1), 2.0, dtype=torch.float64)
    penalty = torch.tensor([1.0, 1.0, 1.0, 0.0])
    solution = solve_problem(build_problem(x, y, epsilon=0.1, penalty=penalty), Radius(Osqp()), tol=1e-4)
    assert solution.certificate.objective == 0
    assert not bool(solution.weight[:, :3].any())


@pytest.mark.parametrize("form", ["ball", "halfspace", "linear"])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_a_radius_out_of_reach(form: str, per_neuron: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    y = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    problem = build_problem(x, y, epsilon=1e-2, form=form, per_neuron=per_neuron)
    solution = solve_problem(problem, Radius(Osqp()), on_failure="return")
    assert solution.status is (Status.INFEASIBLE if form == "linear" else Status.NOT_FEASIBLE)
    assert "however large λ" in solution.stats.note
    # what is returned is the nearest that there is
    nearest = torch.linalg.lstsq(x, y).solution.T
    assert measure_fit(problem, solution.weight).distance <= 1.0001 * measure_fit(problem, nearest).distance


def test_an_inner_solver_that_never_gets_near() -> None:
    inner = Shrink(least=2.0)
    solution = solve_problem(known_problem(), Radius(inner), on_failure="return")
    assert solution.status is Status.NOT_FEASIBLE
    assert len(inner.seen) <= 10


@pytest.mark.parametrize("trouble", [Status.BACKEND_FAILED, Status.TIME_LIMIT])
def test_trouble_inside_keeps_the_best_so_far(trouble: Status) -> None:
    solution = solve_problem(known_problem(), Radius(Shrink(fails_from=1, trouble=trouble)), on_failure="return")
    assert solution.status in (trouble, Status.NOT_FEASIBLE)
    assert "Shrink failed." in solution.stats.note
    assert not bool(solution.weight.any())
    later = Radius(Shrink(fails_from=3, trouble=trouble)).run(known_problem(), Limits(1e-4), None)
    assert later.otherwise is trouble
    assert bool(later.weight.any())


def test_solves_run_out_on_the_feasible_end() -> None:
    problem = known_problem()
    answer = Radius(Shrink(), max_solves=2).run(problem, Limits(1e-9), None)
    assert measure_fit(problem, answer.weight).violation == 0


def test_the_clock_stops_the_search() -> None:
    inner = Shrink()
    answer = Radius(inner).run(known_problem(), Limits(1e-4, deadline=0.0), None)
    assert answer.otherwise is Status.TIME_LIMIT
    assert len(inner.seen) == 1


def test_refusals_and_settings() -> None:
    assert Radius(Shrink()).refuses(known_problem()) is None
    assert Radius(Radius(Shrink())).refuses(known_problem()) is None
    huge = build_problem(torch.ones(1, 1).expand(30_000, 800), torch.ones(30_000, 1), epsilon=0.1)
    refusal = Radius(Osqp()).refuses(huge)
    assert refusal is not None
    assert "admm" in refusal
    with pytest.raises(ProblemError, match="max_solves"):
        Radius(Shrink(), max_solves=1)


def test_lam_goes_to_the_inner_solver_as_it_is() -> None:
    inner = Shrink()
    problem = build_problem(X1, Y1, lam=2.0)
    solution = solve_problem(problem, Radius(inner))
    assert inner.seen == [2.0]
    assert torch.equal(solution.weight, torch.tensor([[2.5, 3.5]], dtype=torch.float64))


def test_any_solver_of_regularised_problems_will_do() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).clamp(min=0)
    problem = build_problem(x, y, epsilon=0.2)
    by_admm = solve_problem(problem, Radius(Admm()), tol=1e-3)
    by_osqp = solve_problem(problem, Radius(Osqp()), tol=1e-3)
    assert by_admm.certificate.objective == pytest.approx(by_osqp.certificate.objective, rel=2e-3)


def test_one_neuron_has_its_own_column_of_everything() -> None:
    y = torch.rand(5, 3, dtype=torch.float64)
    problem = LayerProblem(
        inputs=torch.rand(5, 4, dtype=torch.float64),
        targets=y,
        form="halfspace",
        radius=torch.tensor([0.0, 0.5, 1.0]),
        ceiling=-y,
        penalty=torch.rand(3, 4),
        active=y > 0.5,
    )
    one = one_neuron(problem, 1)
    assert one.radius == 0.5
    assert torch.equal(one.anchor, problem.anchor[:, 1:2])
    assert torch.equal(one.penalty, problem.penalty[1:2])
    # a radius of 0 is half of what counts as feasible, and a neuron's zero is measured against the mean
    assert one_neuron(problem, 0).radius == pytest.approx(0.5e-6 * 0.5)


def test_joined_answers_tell_the_trouble() -> None:
    problem = known_problem()
    fine, late = (zero_answer(problem, status, "note") for status in (Status.MAX_ITER, Status.TIME_LIMIT))
    joined = join_neurons([fine, late, fine])
    assert joined.weight.shape == (3, 2)
    assert joined.multipliers is not None
    assert joined.multipliers.shape == (2, 3)
    assert joined.otherwise is Status.TIME_LIMIT
    assert joined.note == "note"
