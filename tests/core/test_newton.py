"""Newton's steps: the Hessians that are kept, hard ceilings, starts at another radius; and what `auto` chooses."""

from __future__ import annotations

import importlib.util
import threading
import time

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

import nettrim
from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solution import Status
from nettrim.core.solvers import Auto, auto, kernels, make_solver
from nettrim.core.solvers.base import Limits
from nettrim.core.solvers.halfspace import CeilingSteps
from nettrim.core.solvers.kernels import Models
from nettrim.core.solvers.newton import Newton
from nettrim.core.solvers.scaling import Scaled
from nettrim.core.solvers.steps import Steps


def layer(samples: int, inputs: int, outputs: int, seed: int = 0, density: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Activations with a column of ones, and what a sparse layer makes of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64).clamp(min=0)
    x = torch.cat([x, torch.ones(samples, 1, dtype=torch.float64)], 1)
    weight = torch.randn(outputs, inputs + 1, generator=generator, dtype=torch.float64)
    weight = weight * (torch.rand(weight.shape, generator=generator) < density)
    noise = 0.3 * torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return x, (x @ weight.T + noise).clamp(min=0)


def problem(form: str = "ball", epsilon: float = 0.2, **more: int) -> LayerProblem:
    shape = {"samples": 900, "inputs": 40, "outputs": 8, **more}
    x, y = layer(**shape)
    return build_problem(x, y, epsilon=epsilon, form=form)


def directions(models: Models, r: torch.Tensor, u: torch.Tensor, x: torch.Tensor, lam: torch.Tensor, off=None):
    pulls = r if off is None else torch.where(torch.from_numpy(models.on), r, off[:, None] * r)
    return models.directions(r, u, pulls @ x, lam, Limits(1e-6), off)


@pytest.mark.parametrize("ceiling", [False, True], ids=["ball", "halfspace"])
def test_a_kept_hessian_is_the_one_built_anew(ceiling):
    # samples come and go, columns come and go; what was kept must be what the present ones give
    p = problem()
    x, on = p.inputs, p.active.T.contiguous()
    penalty, lam = p.penalty.contiguous(), torch.full((p.n_outputs,), 0.5, dtype=torch.float64)
    off = torch.linspace(1, 50, p.n_outputs, dtype=torch.float64) if ceiling else None
    kept = Models(x, penalty, on)
    generator = torch.Generator().manual_seed(1)
    u = torch.zeros(p.n_outputs, p.n_inputs, dtype=torch.float64)
    for step in range(4):
        z = u @ x.T + 0.05 * step * torch.randn(p.samples, generator=generator, dtype=torch.float64)
        r = torch.where(on, z - p.anchor.T, (z - p.anchor.T).clamp(min=0))
        d = directions(kept, r, u, x, lam, off)[0]
        assert bool(d.any())
        for neuron, (columns, hessian, active) in kept.kept.items():
            block = x[torch.from_numpy(active)][:, torch.from_numpy(columns)]
            np.testing.assert_allclose(hessian, (block.T @ block).numpy(), rtol=1e-9, atol=1e-9, err_msg=str(neuron))
        u = u + d


def test_hessians_beyond_the_budget_are_built_at_every_step(monkeypatch):
    p = problem()
    monkeypatch.setattr(kernels, "_BUDGET", 8 * 8 * 10**2)
    solution = nettrim.solve_problem(p, Newton(), tol=1e-5)
    assert solution.stats.iterations == 0
    assert solution.certificate.gap <= 1e-5


def test_a_hard_ceiling_is_met_by_steps_alone():
    p = problem("halfspace", 0.3)
    solution = nettrim.solve_problem(p, Newton(), tol=1e-4)
    assert solution.stats.iterations == 0, "ADMM had to take over"
    reference = nettrim.solve_problem(p, nettrim.Clarabel(), tol=1e-6)
    assert solution.certificate.excess <= 1e-6 * float(p.targets.max())
    assert solution.certificate.objective >= reference.certificate.lower_bound * (1 - 1e-9)
    assert solution.certificate.lower_bound <= reference.certificate.objective * (1 + 1e-9)


def test_a_hard_ceiling_without_a_constant_column_is_met_too():
    x, y = layer(900, 40, 8)
    solution = nettrim.solve_layer(x[:, :-1], (y - 1).clamp(min=0), epsilon=0.3, form="halfspace", solver="newton")
    assert solution.certificate.violation <= 1e-6
    assert solution.certificate.gap <= 1e-3


def test_ceiling_steps_stop_where_they_get_nowhere():
    p = problem("halfspace", 0.3)
    steps = CeilingSteps(Scaled(p, torch.float64), Limits(1e-15))
    steps.begin(torch.zeros(p.n_outputs, p.n_inputs), torch.full((p.n_outputs,), 0.1))
    assert 12 < steps.make(100) < 600
    assert steps.best.gap < 1e-3


def test_steps_go_on_at_another_radius_without_a_new_start():
    p = problem(epsilon=0.3)
    steps = Newton().run(p, Limits(1e-6), None).carry
    assert isinstance(steps, Steps)
    smaller = p.with_radius(0.8 * p.radius)
    steps.resume(smaller, Limits(1e-6))
    assert steps.make(8) <= 5
    assert steps.done
    fresh = nettrim.solve_problem(smaller, Newton(), tol=1e-6)
    factor = steps.scaled.size / steps.scaled.k
    assert steps.best.objective * factor == pytest.approx(fresh.certificate.objective, rel=3e-6)


def test_a_path_takes_fewer_steps_than_its_radii_alone():
    x, y = layer(900, 40, 8)
    radii = [0.3, 0.27, 0.24, 0.21]

    def steps(solution):
        return int(solution.stats.note.split()[0])

    path = nettrim.solve_path(x, y, radii, solver="newton")
    alone = [nettrim.solve_layer(x, y, epsilon=epsilon, solver="newton") for epsilon in radii]
    assert sum(map(steps, path[1:])) < sum(map(steps, alone[1:]))


def test_a_problem_with_another_radius_is_the_same_otherwise():
    p = problem()
    other = p.with_radius(2 * p.radius)
    assert other.radius == 2 * p.radius
    assert p.radius != other.radius
    assert other.inputs is p.inputs
    assert other.active is p.active
    with pytest.raises(nettrim.errors.ProblemError):
        p.with_radius(-1.0)


def test_a_float32_run_of_admm_ends_on_the_radius():
    # one float32 sum over the whole layer was off by more than the margin, so nothing ever counted as feasible
    x, y = layer(20_000, 60, 60)
    p = build_problem(x, y, epsilon=0.3)
    solution = nettrim.solve_problem(p, nettrim.Admm(max_iter=400), tol=1e-3, on_failure="return")
    assert solution.stats.dtype == "float32"
    assert solution.status.name == "SOLVED"


@pytest.mark.parametrize(
    ("shape", "epsilon", "expected", "why"),
    [
        ((900, 40, 8), 0.1, "Admm", "small"),
        ((20_000, 100, 20), 0.1, "Admm", "only 100 inputs"),
        ((20_000, 200, 20), 0.1, "Newton", "weights are expected to stay"),
        ((200, 12_000, 10), 0.01, "Admm", "weights are expected to stay"),
    ],
)
def test_auto_says_what_it_chose_and_why(shape, epsilon, expected, why):
    generator = torch.Generator().manual_seed(0)
    p = build_problem(
        torch.rand(shape[0], shape[1], generator=generator),
        torch.rand(shape[0], shape[2], generator=generator),
        epsilon=epsilon,
    )
    chosen, reason = Auto().choose(p)
    assert type(chosen).__name__ == expected
    assert why in reason
    assert type(make_solver("auto")) is Auto


def test_auto_is_admm_without_numba(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(auto.importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    chosen, reason = Auto().choose(problem(samples=60_000))
    assert type(chosen).__name__ == "Admm"
    assert "nettrim[newton]" in reason


def test_what_auto_chose_stands_in_the_solution():
    solution = nettrim.solve_problem(problem())
    assert solution.stats.solver.startswith("auto: Admm(")
    assert "because the problem is small" in solution.stats.solver


def test_a_bound_with_free_columns_is_centred_before_it_is_believed():
    # uncentred, the bound was above the optimum, and the steps stopped a third too early
    generator = torch.Generator().manual_seed(21)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    y = (x @ torch.randn(12, 5, generator=generator, dtype=torch.float64) - 2).clamp(min=0)
    penalty = torch.ones(12, dtype=torch.float64)
    penalty[-1] = 0
    solution = nettrim.solve_layer(x, y, epsilon=0.2, penalty=penalty, solver="newton")
    assert solution.certificate.gap <= 1e-3


def test_a_neuron_without_active_samples_still_minds_its_ceiling():
    # nothing but the ceiling moves it, and its Hessian has no rows on the active set
    p = problem()
    on = p.active.T.contiguous()
    on[0] = False
    models = Models(p.inputs, p.penalty.contiguous(), on)
    r = torch.zeros(p.n_outputs, p.samples, dtype=torch.float64)
    r[0, ::3] = 0.5
    u = torch.zeros(p.n_outputs, p.n_inputs, dtype=torch.float64)
    ones = torch.ones(p.n_outputs, dtype=torch.float64)
    d = directions(models, r, u, p.inputs, ones, 40 * ones)[0]
    assert float((p.inputs @ d[0]).mean()) < 0


def test_after_the_deadline_neurons_stay_where_they_are():
    p = problem()
    late = Limits(1e-3, time.monotonic() - 1)
    models = Models(p.inputs, p.penalty.contiguous(), p.active.T.contiguous())
    zero = torch.zeros(p.n_outputs, p.n_inputs, dtype=torch.float64)
    r = torch.where(p.active.T, -p.anchor.T, 0.0).contiguous()
    d, v, *_ = models.directions(r, zero, r @ p.inputs, torch.ones(p.n_outputs, dtype=torch.float64), late)
    assert not bool(d.any())
    assert not bool(v.any())
    for form in ("ball", "halfspace"):
        assert Newton().run(problem(form), late, None).otherwise is Status.TIME_LIMIT


def test_a_program_that_cannot_be_solved_is_left_to_admm(monkeypatch):
    def singular(*_):
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(kernels, "_step", singular)
    solution = nettrim.solve_problem(problem(), Newton())
    assert solution.stats.iterations > 0
    assert solution.certificate.gap <= 1e-3


def test_hessians_beyond_the_budget_leave_the_answer_reproducible(monkeypatch):
    monkeypatch.setattr(kernels, "_BUDGET", 8 * 8 * 12**2)
    first, second = (nettrim.solve_problem(problem(), Newton(), tol=1e-5).weight for _ in range(2))
    assert torch.equal(first, second)


def test_two_solves_at_once_leave_the_threads_of_blas_as_they_were():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()

    def several():
        for _ in range(3):
            Newton().run(problem(), Limits(1e-5), None)

    solves = [threading.Thread(target=several) for _ in range(2)]
    for solve in solves:
        solve.start()
    for solve in solves:
        solve.join()
    assert threads() == before


@pytest.mark.parametrize("settings", [{"first": 0}, {"first": 2.5}, {"steps": "a"}, {"steps": True}, {"start": None}])
def test_settings_that_make_no_step_are_refused(settings):
    with pytest.raises(nettrim.errors.ProblemError, match=f"Newton's {next(iter(settings))}"):
        Newton(**settings)
