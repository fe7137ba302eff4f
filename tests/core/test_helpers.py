"""The oracle fails on wrong answers, and the named problems are what they claim to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import (
    assert_certified,
    distance,
    dual_bound,
    fit_of,
    objective,
    reference_optimum,
    residual,
    violation,
)

from nettrim.core.cases import CASES, KINDS, dense_weight, random_layer
from nettrim.core.certificate import Certificate
from nettrim.core.problem import LayerProblem
from nettrim.core.solution import LayerSolution, SolveStats, Status
from nettrim.errors import UnknownNameError


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def truth() -> LayerSolution:
    """The case 'joint ball', solved by hand: Γ = 1 on the four active entries, bound 10 − 1·‖Γ‖ = 8."""
    case = CASES["joint ball"]()
    gamma = (case.problem.targets > 0).double()
    stats = SolveStats("by hand", 0.0, 0, "float64", "cpu")
    return LayerSolution(case.weight, gamma, Certificate(8.0, 8.0, 0.0, 0.0, 1.0), Status.SOLVED, stats, case.problem)


def claiming(solution: LayerSolution, **numbers: float) -> LayerSolution:
    return replace(solution, certificate=replace(solution.certificate, **numbers))


def test_the_truth_passes():
    assert_certified(truth(), 1e-12)


@pytest.mark.parametrize("name", ["weight", "multipliers"])
def test_the_truth_passes_as_numpy(name):
    solution = truth()
    assert_certified(replace(solution, **{name: getattr(solution, name).numpy()}), 1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"objective": 8.001}, "objective"),
        ({"objective": 8 + 1e-7}, "objective"),
        ({"distance": 1.001}, "distance"),
        ({"violation": 1e-3}, "violation"),
        ({"lower_bound": 8.001, "gap": -0.001 / 8}, "was claimed"),
        ({"gap": 1e-3}, "gap"),
        ({"lower_bound": 7.0}, "gap"),
        ({"lower_bound": 7.0, "gap": 1 / 8}, "exceeds"),
    ],
)
def test_false_claims_are_seen(numbers, message):
    with pytest.raises(AssertionError, match=message):
        assert_certified(claiming(truth(), **numbers), 1e-6)


def test_a_feasible_weight_that_is_not_optimal_is_seen():
    solution = truth()
    worse = replace(solution, weight=solution.problem.targets.T)
    with pytest.raises(AssertionError, match="gap"):
        assert_certified(claiming(worse, objective=10.0, distance=0.0, gap=0.2), 0.1)


def test_an_infeasible_weight_with_honest_numbers_is_seen():
    solution = truth()
    u = solution.weight - 0.1 * (solution.weight > 0).double()
    bold = claiming(replace(solution, weight=u), objective=7.6, distance=1.2, violation=0.2, gap=(7.6 - 8) / 7.6)
    with pytest.raises(AssertionError, match=r"violation 0\.2"):
        assert_certified(bold, 1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: 1.01 * g, "exceeds c"),
        (lambda g: -g, "was claimed"),
        (lambda g: 0 * g, "was claimed"),
        (lambda g: 0.999 * g, "was claimed"),
        (lambda g: g + 1e-6 * (g == 0), "off the active set"),
        (lambda g: g[:2], "shape"),
        (lambda g: g.T, "shape"),
        (lambda g: g * torch.nan, "not finite"),
    ],
    ids=["scaled", "sign", "zero", "shrunk", "positive off", "rows", "transposed", "nan"],
)
def test_spoilt_multipliers_are_seen(spoil, message):
    solution = truth()
    with pytest.raises(AssertionError, match=message):
        assert_certified(replace(solution, multipliers=spoil(solution.multipliers)), 1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u: u + 1e-3, "objective"),
        (lambda u: -u, "distance"),
        (lambda u: u.flip(0), "distance"),
        (lambda u: u.T, "shape"),
        (lambda u: u * torch.nan, "not finite"),
        (lambda u: torch.zeros_like(u), "objective"),
    ],
    ids=["shifted", "sign", "neurons swapped", "transposed", "nan", "zeros"],
)
def test_spoilt_weights_are_seen(spoil, message):
    solution = truth()
    with pytest.raises(AssertionError, match=message):
        assert_certified(replace(solution, weight=spoil(solution.weight)), 1e-6)


def test_a_free_column_must_be_centred():
    problem = CASES["free bias"]().problem
    # x·Γ = 1 in both; only the first has Σ Γ = 0
    assert dual_bound(problem, tensor([-0.5], [0.0], [0.5])) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match="exceeds c"):
        dual_bound(problem, tensor([-0.5], [0.0], [0.49]))


def test_bounds_of_the_other_forms():
    # half the ceiling case: Γ = (1, −1): ⟨Γ, T⟩ = 1 − 3, the norm counts the active entry alone
    assert dual_bound(CASES["positive ceiling"]().problem, tensor([1.0], [-1.0])) == pytest.approx(-2.5)
    assert dual_bound(CASES["negative ceiling"]().problem, tensor([1.0], [-1.0])) == pytest.approx(2.5)
    # Σ_m r_m‖Γ_m‖ = 1·√2 + 0.5·√2 with all ones
    gamma = torch.ones(2, 2, dtype=torch.float64)
    assert dual_bound(CASES["per-neuron balls"]().problem, gamma) == pytest.approx(10 - 1.5 * 2**0.5)
    # λ = 1/2: ⟨Γ, T⟩ − ‖Γ‖², and a linear layer has no sign to keep
    problem = LayerProblem(torch.eye(2, dtype=torch.float64), tensor([3.0], [-4.0]), form="linear", lam=0.5)
    assert dual_bound(problem, tensor([1.0], [-1.0])) == pytest.approx(5.0)


def test_residual_and_violation_by_hand():
    x, y = torch.eye(3, dtype=torch.float64), tensor([2.0], [0.0], [0.0])
    u = tensor([1.0, 3.0, -5.0])
    ball = LayerProblem(x, y, radius=2.0)
    np.testing.assert_array_equal(residual(ball, u), [[-1.0], [3.0], [0.0]])
    assert distance(ball, u) == pytest.approx(10**0.5)
    assert violation(ball, u) == pytest.approx(10**0.5 / 2 - 1)
    assert objective(ball, u) == 9.0
    hard = LayerProblem(x, y, form="halfspace", radius=2.0)
    np.testing.assert_array_equal(fit_of(hard, u), [1.0])
    assert violation(hard, u) == 1.5  # 3 above the ceiling, largest target 2
    assert violation(LayerProblem(x, y, form="linear", radius=7.0), u) == 0.0
    assert distance(LayerProblem(x, y, form="linear", radius=7.0), u) == pytest.approx(35**0.5)
    assert objective(LayerProblem(x, y, lam=0.5), u) == pytest.approx(9 + 2.5)


def test_one_ball_of_several_broken_is_seen():
    problem = CASES["per-neuron balls"]().problem
    u = tensor([3.0, 4.0], [1.0, 1.25])
    assert violation(replace(problem, radius=1.5), u) == 0.0
    assert violation(problem, u) == pytest.approx(0.5)


@pytest.mark.parametrize("name", CASES)
def test_optimum_of_a_case_is_what_another_method_finds(name):
    case = CASES[name]()
    assert case.name == name
    assert reference_optimum(case.problem) == pytest.approx(case.optimum, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", [name for name, make in CASES.items() if make().weight is not None])
def test_weight_of_a_case_attains_its_optimum(name):
    case = CASES[name]()
    assert objective(case.problem, case.weight) == pytest.approx(case.optimum, rel=1e-12, abs=1e-12)
    assert violation(case.problem, case.weight) < 1e-12


def test_reference_refuses_what_has_no_answer():
    # a linear layer with two equal inputs and targets 1 and 3 gets no nearer than √2
    problem = LayerProblem(tensor([1.0], [1.0]), tensor([1.0], [3.0]), form="linear", radius=1.0)
    with pytest.raises(AssertionError, match="infeasible"):
        reference_optimum(problem)


@pytest.mark.parametrize("form", ["ball", "halfspace", "linear", None])
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_feasible(kind, per_neuron, form):
    for seed in range(3):
        problem = random_layer(kind, seed, form=form, per_neuron=per_neuron)
        assert violation(problem, dense_weight(kind, seed)) < 1e-12
        assert violation(problem, 0 * dense_weight(kind, seed)) > 0.5  # nor is the answer trivial


def test_kinds_are_what_they_say():
    layer = {kind: random_layer(kind, 0) for kind in KINDS}
    assert torch.linalg.matrix_rank(layer["rank-deficient"].inputs) < layer["rank-deficient"].n_inputs
    assert layer["few samples"].samples < layer["few samples"].n_inputs
    assert layer["one sample"].samples == 1
    assert layer["all active"].active.all()
    assert layer["dead neuron"].active.any(0).tolist() == [True, False, True, True]
    assert not layer["dead input"].inputs[:, 2].any()
    assert layer["free bias"].penalty[:, -1].tolist() == [0.0] * 4
    assert (layer["constant column"].inputs[:, -1] == 1).all()
    for kind, sign in (("ceiling", False), ("cascade", True)):
        ceiling = layer[kind].ceiling[~layer[kind].active]
        assert (ceiling > 0).any()
        assert (ceiling < 0).any() == sign
    norms = torch.linalg.vector_norm(layer["scaled columns"].inputs, dim=0)
    assert norms.max() / norms.min() > 1e7
    assert random_layer("plain", 3, lam=0.5).lam == 0.5


def test_random_layers_are_reproducible_and_named():
    assert torch.equal(random_layer("plain", 5).inputs, random_layer("plain", 5).inputs)
    assert not torch.equal(random_layer("plain", 5).inputs, random_layer("plain", 6).inputs)
    with pytest.raises(UnknownNameError, match="'plane' is unknown: use one of plain,"):
        random_layer("plane", 0)
